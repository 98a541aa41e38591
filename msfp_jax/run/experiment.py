"""What a config stands for: model, sampler, data, calibration, workdir."""

from collections.abc import Callable
import dataclasses
import functools
import json
import pathlib
from typing import Any

from absl import logging
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from msfp_jax import convert
from msfp_jax import data
from msfp_jax import diffusion
from msfp_jax.base import files
from msfp_jax.models import autoencoder
from msfp_jax.models import unet
from msfp_jax.models.guided import Guided
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.calibrate import Activations
from msfp_jax.quant.calibrate import calibrate
from msfp_jax.quant.calibrate import collect
from msfp_jax.run import conditions

# In place of a checkpoint: an untrained model.
RANDOM = 'random'
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
    image_shape: (H, W, C) of what comes out in the end.
    images: the data; None where the config names none.
    draw_condition: what a conditional model is asked for.
    decode: latents `[B, h, w, c]` -> images, float32 in [-1, 1]; None where
      the model works on pixels.
  """

  config: ml_collections.ConfigDict
  model: nn.Module
  params: Any
  schedule: diffusion.NoiseSchedule
  plan: diffusion.SamplerPlan
  image_shape: tuple[int, int, int]
  images: data.Images | None
  draw_condition: conditions.Draw = conditions.none
  decode: Callable[[jax.Array], jax.Array] | None = None

  @property
  def sample_shape(self) -> tuple[int, int, int]:
    """`[H, W, C]` of what the model denoises."""
    cfg = self.model.config
    return cfg.image_size, cfg.image_size, cfg.in_channels

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
    batches = []
    for i in range(cfg.num_batches):
      noise_key = jax.random.fold_in(key, i)
      noise = jax.random.normal(
          noise_key, (cfg.batch_size, *self.sample_shape))
      batches.append((noise, *self.draw_condition(
          jax.random.fold_in(noise_key, 0), cfg.batch_size)))
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
  model, params = _load_model(config, workdir)
  images = None
  if config.data.name:
    images = data.load(config.data.name, config.data.path)
  decode, stride, channels = None, 1, model.config.in_channels
  if config.first_stage:
    decode, stage = _load_decoder(config, model.config)
    stride, channels = stage.stride, stage.out_channels
  if images is not None:
    check_images(images, model.config, stride, channels)
  image_shape = (*(model.config.image_size * stride,) * 2, channels)
  draw_condition = conditions.none
  if model.config.by_context:
    raise ValueError(
        f'the model takes a context of width {model.config.context_dim}, such '
        'as a text: experiments have none to give')
  if model.config.by_class:
    model, draw_condition = _conditional(model, config.guidance)
  schedule = diffusion.make_schedule(**config.schedule)
  return Experiment(
      config, model, params, schedule,
      diffusion.make_plan(schedule, **config.sampler), image_shape, images,
      draw_condition, decode)


def _load_model(config: ml_collections.ConfigDict, workdir: str
                ) -> tuple[unet.UNet, Any]:
  path = config.pretrained
  if path == RANDOM:
    model = unet.UNet(unet.UNetConfig(**config.model))
    return model, random_params(convert.abstract_params(model), config.seed)
  if not path:
    path = f'{workdir}/pretrain/model.safetensors'
    if not pathlib.Path(path).is_file():
      raise WorkdirError(f'no trained model at {path}: run train.py with this '
                         'config and workdir first, or set config.pretrained')
  return convert.load_pretrained(
      path, config.pretrained_config or None, config.ema)


def random_params(abstract: Any, seed: int) -> Any:
  """Parameters that keep activations near 1, none of them neutral."""
  rng = np.random.default_rng(seed)

  def draw(leaf):
    noise = rng.standard_normal(leaf.shape, np.float32)
    if len(leaf.shape) == 1:
      return jnp.asarray(0.2 * noise + 1)
    return jnp.asarray(noise / np.sqrt(np.prod(leaf.shape[:-1])), jnp.float32)

  return jax.tree.map(draw, abstract)


def _load_decoder(config: ml_collections.ConfigDict, of_unet: unet.UNetConfig
                  ) -> tuple[Callable[[jax.Array], jax.Array],
                             autoencoder.AutoencoderConfig]:
  """The first stage's decoder, jitted, and its configuration.

  Raises:
    ValueError: its latents are not what the UNet denoises.
  """
  if config.first_stage == RANDOM:
    stage = autoencoder.Autoencoder(
        autoencoder.AutoencoderConfig(**config.autoencoder))
    params = random_params(convert.abstract_autoencoder(stage), config.seed)
  else:
    stage, params = convert.load_first_stage(
        config.first_stage, config.first_stage_config or None)
  if stage.config.embed_dim != of_unet.in_channels:
    raise ValueError(
        f'{config.first_stage}: its latents have {stage.config.embed_dim} '
        f'channels, the UNet of {config.pretrained} takes '
        f'{of_unet.in_channels}: they do not belong together')
  # Parameters are an argument: as constants they would be folded.
  decode = jax.jit(lambda params, z: stage.apply(
      {'params': params}, z, method='decode'))
  return functools.partial(decode, params), stage.config


def _conditional(model: nn.Module, config: ml_collections.ConfigDict
                 ) -> tuple[nn.Module, conditions.Draw]:
  """The model with guidance, and the classes that it is asked for.

  The last class stands for none where the model is guided.
  """
  count = model.config.num_classes or model.config.context_classes
  if config.null_class:
    count -= 1
  if config.scale == 1.0:
    return model, conditions.classes(count)
  if not config.null_class:
    raise ValueError(
        f'config.guidance.scale={config.scale}: guidance needs a class that '
        'stands for none; set config.guidance.null_class if the last one does')
  return Guided(model, config.scale, count), conditions.classes(count)


def check_images(images: data.Images, config: unet.UNetConfig, stride: int,
                 channels: int) -> None:
  """Raises ValueError unless images are what the model's samples become.

  Args:
    images: the data.
    config: of the model.
    stride: pixels along a side of what the model denoises.
    channels: of its images.
  """
  if images.shape[-1] != channels:
    raise ValueError(
        f'the images have {images.shape[-1]} channels, the model makes '
        f'{channels}; convert the images, or train a model on them: '
        'config.pretrained empty, config.model.in_channels and out_channels '
        f'{images.shape[-1]}')
  side = config.image_size * stride
  height, width = images.shape[1:3]
  if stride == 1:
    config.check_size(height, width)
  if (height, width) != (side, side):
    raise ValueError(
        f'the images are {height} x {width} pixels, the model makes {side} x '
        f'{side}: resize the images, or choose another checkpoint')


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
