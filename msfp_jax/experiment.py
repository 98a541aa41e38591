"""What a config stands for: model, sampler, data, calibration, workdir."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

from absl import logging
import flax.linen as nn
import jax
import ml_collections
import numpy as np

from msfp_jax import convert
from msfp_jax import data
from msfp_jax import diffusion
from msfp_jax import files
from msfp_jax import pretrain
from msfp_jax import spec as spec_lib
from msfp_jax.calibrate import Activations
from msfp_jax.calibrate import calibrate
from msfp_jax.calibrate import collect

# Uses of the seed; each folds its own number into the key.
CALIBRATION, BANKS, TRAJECTORIES, SAMPLES = range(10, 14)


class WorkdirError(ValueError):
  """A workdir that belongs to another config, or lacks what is asked of it."""


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The fixed parts of an experiment.

  Attributes:
    config: what it was made from.
    model: the full-precision teacher.
    params: its parameters.
    schedule: of the forward process.
    plan: the sampler.
    images: the data, uint8 `[N, H, W, C]`.
  """

  config: ml_collections.ConfigDict
  model: nn.Module
  params: Any
  schedule: diffusion.NoiseSchedule
  plan: diffusion.SamplerPlan
  images: np.ndarray

  def key(self, use: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(self.config.seed), use)

  def variant(self, config: ml_collections.ConfigDict) -> 'Experiment':
    """The same model and data under a config that only quantizes otherwise.

    Keeps the calibration activations, which do not depend on config.quant or
    config.finetune.
    """
    other = dataclasses.replace(self, config=config)
    if (config.seed, config.calibrate) == (
        self.config.seed, self.config.calibrate):
      other.__dict__['activations'] = self.activations
    return other

  @functools.cached_property
  def activations(self) -> dict[str, Activations]:
    """Seen along the teacher's trajectories, as config.calibrate says."""
    cfg = self.config.calibrate
    key = self.key(CALIBRATION)
    batches = [
        jax.random.normal(jax.random.fold_in(key, i),
                          (cfg.batch_size, *self.images.shape[1:]))
        for i in range(cfg.num_batches)]
    logging.info('calibrating on %d trajectories of %d steps',
                 cfg.batch_size * cfg.num_batches, self.plan.num_steps)
    return collect(
        self.model, self.params, self.plan, batches,
        samples_per_layer=cfg.samples_per_layer,
        key=jax.random.fold_in(key, cfg.num_batches))

  def calibrate(self, recipe: str | None = None, bits: int | None = None,
                act_bits: int | None = None) -> spec_lib.QuantSpec:
    """The spec of config.quant, with what is given here in its place."""
    cfg = self.config.quant
    return calibrate(
        self.model, self.params, recipe=recipe or cfg.recipe,
        bits=bits or cfg.weight_bits, act_bits=act_bits or cfg.act_bits,
        exceptions=cfg.exceptions, activations=self.activations)


def load(config: ml_collections.ConfigDict, workdir: str) -> Experiment:
  """Loads the teacher and the data.

  A config without `pretrained` finds the teacher that `pretrain.run` left in
  `workdir`/pretrain.

  Raises:
    WorkdirError: it is not there.
    ValueError: the data does not fit the model.
  """
  path = config.pretrained
  if not path:
    path = f'{workdir}/pretrain/model.safetensors'
    if not pathlib.Path(path).is_file():
      raise WorkdirError(f'no trained model at {path}: run train.py with this '
                         'config and workdir first, or set config.pretrained')
  model, params = convert.load_pretrained(path)
  images = data.load(config.data.name, config.data.path)
  pretrain.check_images(images, model.config)
  schedule = diffusion.make_schedule(**config.schedule)
  return Experiment(config, model, params, schedule,
                    diffusion.make_plan(schedule, **config.sampler), images)


def prepare_workdir(config: ml_collections.ConfigDict, workdir: str,
                    free: tuple[str, ...] = ('eval',)) -> None:
  """Claims a workdir: writes config.json, or checks that it is the same.

  A config.json alone claims nothing: its run was refused, or had no time.

  Args:
    config: of the run.
    workdir: made where missing.
    free: parts of the config that may change between runs of one workdir, as
      they do not reach into what is stored there.

  Raises:
    WorkdirError: it was made by another config; the differences are listed.
    OSError: it cannot be written.
  """
  path = pathlib.Path(workdir) / 'config.json'
  new = json.loads(config.to_json_best_effort())
  if path.is_file() and any(file != path for file in path.parent.iterdir()):
    try:
      old = json.loads(path.read_text())
      if not isinstance(old, dict):
        raise ValueError('it holds no fields')
    except ValueError as error:
      raise WorkdirError(f'{path} is damaged ({error}); delete the workdir, '
                         'or restore the file') from error
    differences = [
        line for key in sorted(old.keys() | new.keys()) if key not in free
        for line in _differences(old.get(key), new.get(key), key)]
    if differences:
      raise WorkdirError(
          f'{workdir} was made by another config; use another --workdir, or '
          'undo:\n  ' + '\n  '.join(differences))
  files.write_json(path, new)


def _differences(old: Any, new: Any, name: str) -> list[str]:
  if isinstance(old, dict) and isinstance(new, dict):
    return [line for key in sorted(old.keys() | new.keys())
            for line in _differences(old.get(key), new.get(key),
                                     f'{name}.{key}')]
  return [] if old == new else [f'{name}: {old!r} there, {new!r} now']
