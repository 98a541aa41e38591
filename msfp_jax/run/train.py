"""The whole of train.py: teacher, calibration, fine-tuning, packing."""

import dataclasses
import pathlib

from absl import logging
import jax
import ml_collections
import numpy as np

from msfp_jax import data
from msfp_jax import diffusion
from msfp_jax.base import devices
from msfp_jax.base import files
from msfp_jax.diffusion import origin as origin_lib
from msfp_jax.packed import drift as drift_lib
from msfp_jax.packed import file as packed_file
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import interception
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.quantize import check_layers
from msfp_jax.run import cluster
from msfp_jax.run import eval_settings
from msfp_jax.run import experiment as experiment_lib
from msfp_jax.run import teacher
from msfp_jax.run import workdir as workdir_lib
from msfp_jax.tune import finetune
from msfp_jax.tune import losses
from msfp_jax.tune import pretrain
from msfp_jax.tune import student as student_lib


def run(config: ml_collections.ConfigDict, workdir: str,
        command: str = '') -> None:
  """Teacher if needed, calibration, fine-tuning, packing.

  Running it again resumes. Leaves config.json, quant_spec.json (as
  calibrated), checkpoints/, metrics.jsonl, tensorboard/, router.json where
  there are banks to choose from, drift.json where it is corrected,
  packed.safetensors (see `packed.file`) and,
  of a teacher trained here, pretrain/ in the workdir; `evaluate.run` goes on
  from there.

  Args:
    config: an experiment (configs/).
    workdir: of this run alone.
    command: goes into the headers of the models that are written.
  """
  # What can be refused is refused first: a teacher may train for hours, and
  # what is wrong with fine-tuning is known before.
  if config.stage not in ('pretrain', 'quantize'):
    raise ValueError(f"config.stage {config.stage!r}: must be 'pretrain' or "
                     "'quantize'")
  experiment_lib.check(config)
  # Of eval.py, which comes last and has the same config.
  eval_settings.EvalSettings(**config.eval)
  with workdir_lib.hold(workdir):
    workdir_lib.check(config, workdir)
    _run(config, workdir, command)


def _run(config: ml_collections.ConfigDict, workdir: str,
         command: str) -> None:
  """The stages of `run`."""
  # Every stage looks for what it would make and goes on from there: the teacher
  # by its checkpoints, the spec by its file, banks by theirs.
  if config.stage == 'pretrain' or not config.pretrained:
    _train_teacher(config, workdir, command)
  if config.stage == 'pretrain':
    return
  experiment = experiment_lib.load(config, workdir)
  _check_gamma(experiment.schedule, experiment.plan, experiment.finetune)
  workdir_lib.prepare(config, workdir, taken=experiment.taken)
  # Its numbers survive as text, bit for bit: a run that resumes from the file
  # works with the same ones.
  spec = calibrated_spec(experiment, workdir)
  deployed = quantized(experiment, spec, workdir)
  path = f'{workdir}/{workdir_lib.PACKED_FILE}'
  devices.by_first(
      lambda: packed_file.save(path, deployed.packed(), command=command),
      'the packed model is written')
  logging.info('wrote %s', path)


def _train_teacher(config: ml_collections.ConfigDict, workdir: str,
                   command: str) -> None:
  """Unpacks what `pretrain.run` needs, and checks what comes after it."""
  settings = pretrain.PretrainSettings(**config.pretrain)
  images = data.load(config.data.name, config.data.path)
  model = teacher.untrained(config.model, images)
  teacher.conditional(model, config.guidance.scale, config.guidance.null_class)
  chosen = origin_lib.choose(
      origin_lib.Origin(), config.schedule, config.sampler)
  _check_gamma(chosen.schedule, chosen.plan,
               finetune.FinetuneSettings(**config.finetune))
  workdir_lib.prepare(config, workdir)
  pretrain.run(
      model, images, chosen.schedule, chosen.plan, settings,
      f'{workdir}/pretrain', seed=config.seed,
      origin=origin_lib.trained_on(chosen.schedule_fields),
      about={'command': command, 'data': config.data.name},
      layout=cluster.layout(config), memory=cluster.memory(config))


def _check_gamma(schedule: diffusion.Schedule,
                 plan: diffusion.SamplerPlan,
                 settings: finetune.FinetuneSettings) -> None:
  """Raises ValueError for a gamma of steps that the plan does not visit."""
  if settings.num_updates:
    losses.denoising_factors(schedule, plan, settings.gamma)


def calibrated_spec(experiment: experiment_lib.Experiment,
                    workdir: str) -> spec_lib.QuantSpec:
  """The workdir's quant_spec.json; calibrates first where there is none.

  Raises:
    ValueError: the file is damaged, or of another model.
  """
  path = pathlib.Path(workdir) / 'quant_spec.json'
  # One answer for all processes, of which the first writes the file.
  if devices.agreed(path.is_file()):
    try:
      spec = spec_lib.QuantSpec.load(path)
    except ValueError as error:
      raise ValueError(f'{path} is damaged ({error}); delete it, and it is '
                       'made again, the same') from error
    try:
      # It may be older than the checkpoint, or written by hand.
      check_layers(spec, interception.leaves(experiment.params, 'kernel'))
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from error
    return spec
  spec = experiment.calibrate()
  devices.by_first(lambda: spec.save(path), 'the spec is written')
  logging.info('wrote %s', path)
  return spec


def quantized(experiment: experiment_lib.Experiment, spec: spec_lib.QuantSpec,
              workdir: str) -> packed_lib.PackedModel:
  """A calibrated model, fine-tuned where the config asks for it."""
  if experiment.finetune.num_updates:
    return fit(experiment, spec, workdir)[0]
  return simulated(experiment, spec, workdir)


def simulated(experiment: experiment_lib.Experiment, spec: spec_lib.QuantSpec,
              workdir: str | None = None) -> packed_lib.PackedModel:
  """A calibrated model without fine-tuning.

  Args:
    experiment: which tells whether its drift is corrected.
    spec: how it is quantized.
    workdir: which keeps the drift of what it keeps; None of other models.
  """
  return _corrected(experiment, packed_lib.simulate(
      experiment.model, experiment.params, spec, experiment.plan), workdir)


def fit(experiment: experiment_lib.Experiment, spec: spec_lib.QuantSpec,
        workdir: str) -> tuple[packed_lib.PackedModel, spec_lib.QuantSpec]:
  """Fine-tunes a calibrated model; see `finetune.train`.

  Returns:
    The model that this leaves, quantized but not packed, and its spec, with
    the ranges as they were learned.
  """
  settings = experiment.finetune
  student = finetune.make_student(
      experiment.model, experiment.params, spec,
      experiment.schedule.num_train_steps, settings,
      continuous=isinstance(experiment.schedule, diffusion.FlowSchedule))
  trainable = finetune.train(
      student, experiment.schedule, experiment.plan, settings, workdir,
      sample_shape=experiment.sample_shape,
      bank_key=experiment.key(experiment_lib.BANKS),
      trajectory_key=experiment.key(experiment_lib.TRAJECTORIES),
      draw_condition=experiment.draw_condition, layout=experiment.layout,
      memory=experiment.memory)
  deployed = packed_lib.deploy(student, trainable, experiment.plan)
  return (_corrected(experiment, deployed, workdir),
          student_lib.with_ranges(spec, trainable['ranges']))


def _corrected(experiment: experiment_lib.Experiment,
               deployed: packed_lib.PackedModel, workdir: str | None
               ) -> packed_lib.PackedModel:
  """The model with its drift corrected, where the config asks for it."""
  count = experiment.quant.drift_images
  if not count:
    return deployed
  path = None if workdir is None else pathlib.Path(workdir) / 'drift.json'
  if path is not None and devices.agreed(path.is_file()):
    return _with_kept(deployed, experiment.sample_shape[-1], path)
  key = experiment.key(experiment_lib.DRIFT)
  noise = jax.random.normal(
      jax.random.fold_in(key, 0), (count, *experiment.sample_shape))
  condition = experiment.draw_condition(jax.random.fold_in(key, 1), count)
  found = drift_lib.correct_drift(
      deployed, experiment.params, noise, *condition,
      key=jax.random.fold_in(key, 2), layout=experiment.layout.for_batch(
          'config.quant.drift_images', count))
  if path is not None:
    devices.by_first(
        lambda: files.write_json(path, {'drift': found.drift.tolist()}),
        'the drift is written')
  return found


def _with_kept(deployed: packed_lib.PackedModel, channels: int,
               path: pathlib.Path) -> packed_lib.PackedModel:
  """The model with the drift that a workdir keeps, bit for bit as measured."""
  again = 'delete it, and it is measured again, the same'
  content = files.read_json(path, again)
  try:
    drift = np.asarray(content['drift'], np.float32)
    if drift.shape[1:] != (channels,) or not np.isfinite(drift).all():
      raise ValueError(f'numbers of shape {drift.shape}')
    return dataclasses.replace(deployed, drift=drift)
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f'{path} is damaged ({error!r}); {again}') from error
