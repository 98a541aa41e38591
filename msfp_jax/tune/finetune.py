"""Fine-tuning TALoRA against the full-precision teacher with DFA."""

from collections.abc import Mapping
import dataclasses
import functools
import json
import pathlib
from typing import Any

from absl import logging
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from msfp_jax import diffusion
from msfp_jax.base import files
from msfp_jax.base import writer as writer_lib
from msfp_jax.diffusion import sampling
from msfp_jax.packed import file as export
from msfp_jax.packed import model as packed
from msfp_jax.quant import spec as spec_lib
from msfp_jax.run import conditions
from msfp_jax.run import experiment as experiment_lib
from msfp_jax.tune import loop
from msfp_jax.tune import losses
from msfp_jax.tune import pretrain
from msfp_jax.tune import student as student_lib
from msfp_jax.tune import talora

# The packed model, in a workdir.
PACKED_FILE = 'packed.safetensors'


@flax.struct.dataclass
class FinetuneState:
  step: jax.Array  # int32, updates done
  trainable: Any  # banks, router, ranges, biases
  opt_state: Any
  position: sampling.Position  # where the teacher's trajectory stands


def make_student(model: nn.Module, params: Any, spec: spec_lib.QuantSpec,
                 num_train_steps: int, config: ml_collections.ConfigDict
                 ) -> student_lib.Student:
  """The student of `config` (its `finetune` part).

  Banks go to the layers whose weights have the spec's fewest bits: the
  exceptions at 8 bits keep theirs.
  """
  bits = {name: layer.weight.bits for name, layer in spec.layers.items()
          if layer.weight is not None}
  if not bits:
    raise ValueError('nothing to fine-tune: the spec quantizes no weight')
  banked = tuple(n for n, width in bits.items() if width == min(bits.values()))
  router = None
  if config.num_banks > 1:
    router = talora.Router(
        num_layers=len(banked), num_banks=config.num_banks,
        num_train_steps=num_train_steps, prior=config.router_prior)
  return student_lib.Student(
      model, params, spec, router, banked, config.router_temperature,
      config.base_weight)


def optimizer(
    config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """AdamW with linear decay to zero; a rate each for banks, router, rest."""
  adamw = lambda rate: optax.adamw(
      optax.linear_schedule(rate, 0.0, config.num_updates),
      b2=config.adam_b2, weight_decay=config.weight_decay)
  return optax.multi_transform(
      {'banks': adamw(config.learning_rate),
       'router': adamw(config.router_learning_rate),
       'ranges': adamw(config.range_learning_rate),
       'biases': adamw(config.range_learning_rate)},
      lambda tree: {name: jax.tree.map(lambda _, name=name: name, part)
                    for name, part in tree.items()})


def init_state(student: student_lib.Student, tx: optax.GradientTransformation,
               plan: diffusion.SamplerPlan, image_shape: tuple[int, ...],
               key: jax.Array, config: ml_collections.ConfigDict
               ) -> FinetuneState:
  """The state before the first update: the calibrated model, unchanged."""
  trainable = student.init(
      key, config.num_banks, config.rank, config.learn_act_ranges,
      config.learn_weight_scales, config.learn_biases)
  return FinetuneState(
      step=jnp.zeros((), jnp.int32), trainable=trainable,
      opt_state=tx.init(trainable),
      position=sampling.start(
          plan, jnp.zeros((config.batch_size, *image_shape))))


def make_step(student: student_lib.Student, plan: diffusion.SamplerPlan,
              gamma: np.ndarray, tx: optax.GradientTransformation,
              key: jax.Array, draw_condition: conditions.Draw = conditions.none
              ):
  """The update: state -> (state, scalars).

  One update per denoising step. The teacher alone moves the trajectory, from
  fresh noise whenever one ends; both predict the noise at its position, and
  the student descends on `losses.dfa_loss`.

  Args:
    student: what is trained.
    plan: the sampler.
    gamma: denoising factors `[S]` in the plan's order.
    tx: the optimizer.
    key: folded with the trajectory's number.
    draw_condition: of every trajectory, for conditional models.
  """
  # The trajectory, of S steps, and the updates n that go along it:
  #
  #   n            0      1      ..  S - 1    S      ..
  #   index        0      1      ..  S - 1    0      ..   n % S
  #   trajectory   0      0      ..  0        1      ..   n // S
  #   teacher      x_T -> x'  -> ..  -> x_0   x_T -> ..
  #
  # The student sees the teacher's x alone, so its errors do not add up over a
  # trajectory, and a batch costs one prediction of each.
  steps = plan.steps() | {'gamma': jnp.asarray(gamma, jnp.float32)}

  def loss_fn(trainable, params, x, step, condition, eps_teacher):
    eps, choices = dataclasses.replace(student, params=params).predict(
        trainable, x, step['t'], *condition)
    loss = losses.dfa_loss(step['gamma'], eps_teacher, eps)
    return loss, (losses.dfa_loss(1.0, eps_teacher, eps), choices)

  # The teacher's parameters are an argument: as constants they would be
  # folded for a minute of compilation.
  @functools.partial(jax.jit, donate_argnums=0)
  def update(state: FinetuneState, params: Any):
    index = state.step % plan.num_steps
    step = jax.tree.map(lambda a: a[index], steps)
    run_key = jax.random.fold_in(key, state.step // plan.num_steps)
    # Drawn at every step, and taken at the first of a trajectory alone: one
    # program for all steps.
    noise = jax.random.normal(
        jax.random.fold_in(run_key, 0), state.position.x.shape)
    position = jax.tree.map(
        functools.partial(jnp.where, index == 0),
        sampling.start(plan, noise), state.position)
    x = position.x
    # By the trajectory's key: the condition stays the same along it.
    condition = draw_condition(jax.random.fold_in(run_key, 2), len(x))
    eps_teacher = student.model.apply(
        {'params': params}, x, jnp.full(x.shape[:1], step['t']), *condition)
    (loss, (mse, choices)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.trainable, params, x, step, condition, eps_teacher)
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    scalars = {
        'loss': loss, 'mse': mse, 't': step['t'],
        'l2_grads': optax.tree.norm(grads),
        **{f'l2_grads_{name}': optax.tree.norm(part)
           for name, part in grads.items() if jax.tree.leaves(part)},
        **_bank_shares(student, choices),
    }
    return FinetuneState(
        step=state.step + 1,
        trainable=optax.apply_updates(state.trainable, updates),
        opt_state=opt_state,
        position=sampling.advance(
            plan, step, position, eps_teacher,
            jax.random.fold_in(run_key, 1))), scalars

  return lambda state: update(state, student.params)


def _bank_shares(student, choices) -> dict[str, jax.Array]:
  """Share of the layers that chose each bank at this timestep."""
  if student.router is None:
    return {}
  return {f'bank_{i}': jnp.mean(choices == i)
          for i in range(student.router.num_banks)}


def fit(experiment: experiment_lib.Experiment, spec: spec_lib.QuantSpec,
        workdir: str) -> student_lib.Deployed:
  """`train`, and the model that it leaves, quantized."""
  student, trainable = train(experiment, spec, workdir)
  return student.deploy(trainable, experiment.plan.timesteps)


def train(experiment: experiment_lib.Experiment, spec: spec_lib.QuantSpec,
          workdir: str) -> tuple[student_lib.Student, Any]:
  """Fine-tunes a calibrated model, as config.finetune says.

  Resumes where the workdir's checkpoints end; if they are complete, only
  loads. Writes router.json: the bank of every layer at every step.

  Returns:
    The student and what was trained of it.

  Raises:
    loop.DivergedError: names the step and the timestep.
    checkpoint.Preempted: the run was asked to stop, and has saved.
  """
  cfg = experiment.config.finetune
  student = make_student(experiment.model, experiment.params, spec,
                         experiment.schedule.num_train_steps, cfg)
  tx = optimizer(cfg)
  plan = experiment.plan
  init = functools.partial(
      init_state, student, tx, plan, experiment.sample_shape,
      experiment.key(experiment_lib.BANKS), cfg)
  gamma = losses.denoising_factors(experiment.schedule, plan, cfg.gamma)
  step = make_step(student, plan, gamma, tx,
                   experiment.key(experiment_lib.TRAJECTORIES),
                   experiment.draw_condition)
  with writer_lib.MetricWriter(workdir) as writer:
    state = loop.run(
        'finetune', init, step, cfg.num_updates, workdir=workdir,
        writer=writer, save_every=cfg.save_every, log_every=cfg.log_every)
  if student.router is not None:
    _write_router(f'{workdir}/router.json', plan, student.choices(
        state.trainable, plan.timesteps))
  return student, state.trainable


def _write_router(path: str, plan: diffusion.SamplerPlan,
                  choices: Mapping[str, jax.Array]) -> None:
  content = {'timesteps': plan.timesteps.tolist(),
             'banks': {name: np.asarray(choice).tolist()
                       for name, choice in choices.items()}}
  files.write_text(path, json.dumps(content) + '\n')


def run(config: ml_collections.ConfigDict, workdir: str,
        command: str = '') -> None:
  """The whole of train.py: teacher if needed, calibration, fine-tuning.

  Running it again resumes. Leaves config.json, quant_spec.json (as
  calibrated), checkpoints/, metrics.jsonl, tensorboard/, router.json where
  there are banks to choose from, packed.safetensors (see `export`) and, of a
  teacher trained here, pretrain/ in the workdir; `evaluate.run` goes on from
  there.

  Args:
    config: an experiment (configs/).
    workdir: of this run alone.
    command: goes into the headers of the models that are written.
  """
  experiment_lib.prepare_workdir(config, workdir)
  if config.stage not in ('pretrain', 'quantize'):
    raise ValueError(f"config.stage {config.stage!r}: must be 'pretrain' or "
                     "'quantize'")
  if config.stage == 'pretrain' or not config.pretrained:
    pretrain.run(config, f'{workdir}/pretrain', command)
  if config.stage == 'pretrain':
    return
  experiment = experiment_lib.load(config, workdir)
  spec = calibrated_spec(experiment, workdir)
  if config.finetune.num_updates:
    deployed = fit(experiment, spec, workdir)
  else:
    deployed = student_lib.calibrated(
        experiment.model, experiment.params, spec, experiment.plan.timesteps)
  path = f'{workdir}/{PACKED_FILE}'
  export.save(path, packed.pack(deployed, experiment.plan), command=command)
  logging.info('wrote %s', path)


def calibrated_spec(experiment: experiment_lib.Experiment,
                    workdir: str) -> spec_lib.QuantSpec:
  """The workdir's quant_spec.json; calibrates first where there is none."""
  path = pathlib.Path(workdir) / 'quant_spec.json'
  if path.is_file():
    try:
      return spec_lib.QuantSpec.load(path)
    except ValueError as error:
      raise ValueError(f'{path} is damaged ({error}); delete it, and it is '
                       'made again, the same') from error
  spec = experiment.calibrate()
  spec.save(path)
  logging.info('wrote %s', path)
  return spec
