"""Fine-tuning TALoRA against the full-precision teacher with DFA."""

from collections.abc import Mapping
import functools
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from msfp_jax import diffusion
from msfp_jax.base import devices
from msfp_jax.base import files
from msfp_jax.base import writer as writer_lib
from msfp_jax.diffusion import conditions
from msfp_jax.quant import interception
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.quantize import check_layers
from msfp_jax.tune import average
from msfp_jax.tune import loop
from msfp_jax.tune import losses
from msfp_jax.tune import memory as memory_lib
from msfp_jax.tune import parts
from msfp_jax.tune import remat
from msfp_jax.tune import step as step_lib
from msfp_jax.tune import student as student_lib
from msfp_jax.tune import talora
from msfp_jax.tune import trajectories as trajectories_lib
from msfp_jax.tune.finetune_settings import FinetuneSettings
from msfp_jax.tune.finetune_state import check_parts
from msfp_jax.tune.finetune_state import FinetuneState
from msfp_jax.tune.finetune_state import RememberingState
from msfp_jax.tune.finetune_state import shardings


def make_student(model: nn.Module, params: Any, spec: spec_lib.QuantSpec,
                 num_train_steps: int, settings: FinetuneSettings,
                 continuous: bool = False) -> student_lib.Student:
  """A calibrated model with banks, ready to be trained.

  Banks go to the layers whose weights have the spec's fewest bits: the
  exceptions at 8 bits keep theirs.

  Args:
    model: the full-precision linen model.
    params: its parameters.
    spec: what calibration found.
    num_train_steps: of the schedule that the model was trained on.
    settings: how it will be trained.
    continuous: whether timesteps are real numbers, as of flow matching.

  Raises:
    ValueError: the spec quantizes no weight, or is of another model; several
      banks and differences.
  """
  check_layers(spec, interception.leaves(params, 'kernel'))
  bits = {name: layer.weight.bits for name, layer in spec.layers.items()
          if not layer.weight.is_full}
  if not bits:
    raise ValueError('nothing to fine-tune: the spec quantizes no weight')
  if spec.differences and settings.num_banks > 1:
    raise ValueError(f'num_banks={settings.num_banks}: {spec_lib.ONE_BANK}')
  banked = tuple(n for n, width in bits.items() if width == min(bits.values()))
  router = None
  if settings.num_banks > 1:
    router = talora.Router(
        num_layers=len(banked), num_banks=settings.num_banks,
        num_train_steps=num_train_steps, prior=settings.router_prior,
        continuous=continuous)
  return student_lib.Student(
      model, params, spec, router, banked, settings.router_temperature,
      settings.base_weight, settings.dtype)


def optimizer(settings: FinetuneSettings) -> optax.GradientTransformation:
  """AdamW with linear decay to zero; a rate each for banks, router, rest."""
  adamw = lambda rate: optax.adamw(
      optax.linear_schedule(rate, 0.0, settings.num_updates),
      b2=settings.adam_b2, weight_decay=settings.weight_decay)
  return average.behind(optax.multi_transform(
      {'banks': adamw(settings.learning_rate),
       'router': adamw(settings.router_learning_rate),
       'ranges': adamw(settings.range_learning_rate),
       'biases': adamw(settings.range_learning_rate)},
      # By name of the part: {'banks': every leaf -> 'banks', ...}.
      lambda tree: {name: jax.tree.map(lambda _, name=name: name, part)
                    for name, part in tree.items()}), settings.ema_decay)


def trajectories_of(plan: diffusion.SamplerPlan, settings: FinetuneSettings
                    ) -> trajectories_lib.Trajectories:
  """The trajectories that the settings ask for."""
  return trajectories_lib.Trajectories(
      plan, settings.driver, settings.steer, settings.window_steps)


def init_state(student: student_lib.Student, tx: optax.GradientTransformation,
               plan: diffusion.SamplerPlan, sample_shape: tuple[int, ...],
               key: jax.Array, settings: FinetuneSettings) -> FinetuneState:
  """The state before the first update: the calibrated model, unchanged."""
  trainable = student.init(
      key, settings.num_banks, settings.rank, settings.learn_act_ranges,
      settings.learn_weight_scales, settings.learn_biases)
  noise = jnp.zeros((settings.batch_size, *sample_shape))
  state = FinetuneState(
      step=jnp.zeros((), jnp.int32), trainable=trainable,
      opt_state=tx.init(trainable),
      position=trajectories_of(plan, settings).start(noise))
  memory = student.memory(noise)
  if memory is None:
    return state
  check_parts(student, noise, memory, settings.accumulate)
  return RememberingState(**vars(state), memory=memory)


def make_step(student: student_lib.Student, plan: diffusion.SamplerPlan,
              gamma: np.ndarray, tx: optax.GradientTransformation,
              key: jax.Array, draw_condition: conditions.Draw = conditions.none,
              layout: devices.Layout | None = None, *, accumulate: int = 1,
              how_remat: str = remat.NONE,
              trajectories: trajectories_lib.Trajectories | None = None,
              direction: float = 0.0) -> step_lib.Step:
  """The update: state -> (state, scalars).

  One update per denoising step, along trajectories that begin with fresh noise
  whenever they end; both predict the noise at the position, and the student
  descends on `losses.dfa_loss`.

  Args:
    student: what is trained.
    plan: the sampler.
    gamma: denoising factors `[S]` in the plan's order.
    tx: the optimizer.
    key: folded with the trajectory's number. Of what that gives, 0 is the
      noise that it starts from, 1 that of its steps, 2 its condition: were two
      the same, a sampler that adds noise would add what it started from.
    draw_condition: of every trajectory, for conditional models.
    layout: where weights, banks and trajectories lie; by default on all
      devices, each of which has all weights.
    accumulate: parts of the batch, see `parts.run`; scales that a quantizer
      takes from all of its input are then those of a part.
    how_remat: which activations are computed twice, one of `remat.WAYS`.
    trajectories: how they go on; by default the teacher drives.
    direction: of `losses.dfa_loss`.
  """
  layout = layout or devices.layout()
  trajectories = trajectories or trajectories_lib.Trajectories(plan)
  # The trajectory, of S steps, and the updates n that go along it:
  #
  #   n            0      1      ..  S - 1    S      ..
  #   index        0      1      ..  S - 1    0      ..   n % S
  #   trajectory   0      0      ..  0        1      ..   n // S
  #   teacher      x_T -> x'  -> ..  -> x_0   x_T -> ..
  #
  # Where the teacher drives, the student's errors do not add up over a
  # trajectory, and a batch costs one prediction of each; where the student
  # does, two of the teacher.
  steps = plan.steps() | {'gamma': jnp.asarray(gamma, jnp.float32)}

  def loss_fn(trainable, student, x, step, condition, target, memory):
    with remat.blocks(how_remat):
      eps, choices, memory = student.predict_next(
          trainable, x, step['t'], *condition, step=step['index'],
          memory=memory, fresh=trajectories.begins(step))
    loss = losses.dfa_loss(step['gamma'], target, eps, direction)
    return loss, (_bank_shares(student, choices), (eps, memory))

  # The teacher's parameters, and weights that calibration rounded, are an
  # argument: as constants they would be folded for a minute of compilation.
  @functools.partial(jax.jit, donate_argnums=0)
  def update(state: FinetuneState, arrays: Any, draw: conditions.Draw):
    index = state.step % plan.num_steps
    step = jax.tree.map(lambda a: a[index], steps)
    run_key = jax.random.fold_in(key, state.step // plan.num_steps)
    # Drawn at every step, and taken at the first of a trajectory alone: one
    # program for all steps.
    noise = jax.random.normal(
        jax.random.fold_in(run_key, 0),
        trajectories.inputs(state.position)[0].shape)
    noise = layout.constrain(noise, layout.batch)
    position = jax.tree.map(
        functools.partial(jnp.where, index == 0),
        trajectories.start(noise), state.position)
    inputs = trajectories.inputs(position)
    # By the trajectory's key: the condition stays the same along it.
    condition = draw(jax.random.fold_in(run_key, 2), len(noise))
    noise_key = jax.random.fold_in(run_key, 1)
    ours = student.with_arrays(arrays)

    def teach(part):
      inputs, condition = part
      return (), tuple(
          ours.teach(x, step['t'], *condition) for x in inputs)

    def work(part):
      x, condition, target, memory = part
      (loss, (shares, rows)), grads = jax.value_and_grad(
          loss_fn, has_aux=True)(
              state.trainable, ours, x, step, condition, target, memory)
      return ((loss, shares), grads), rows

    _, taught = parts.run(teach, (inputs, condition), accumulate, layout)
    target = trajectories.target(step, position, taught, noise_key)
    if state.memory is not None:
      check_parts(ours, inputs[0], state.memory, accumulate)
    ((loss, shares), grads), (eps, memory) = parts.run(
        work, (inputs[0], condition, target, state.memory), accumulate, layout)
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    scalars = {
        'loss': loss, 'mse': losses.dfa_loss(1.0, taught[0], eps),
        't': step['t'],
        'l2_grads': optax.tree.norm(grads),
        **{f'l2_grads_{name}': optax.tree.norm(part)
           for name, part in grads.items() if jax.tree.leaves(part)},
        **shares,
    }
    after = state.replace(
        step=state.step + 1,
        trainable=optax.apply_updates(state.trainable, updates),
        opt_state=opt_state,
        position=trajectories.advance(
            step, position, taught, eps, noise_key)).remembering(memory)
    return layout.after_step(
        after, scalars, functools.partial(shardings, layout))

  # Likewise an argument, as it may hold embeddings of many prompts.
  draw = layout.put(conditions.as_argument(draw_condition), layout.whole)
  arrays = layout.put(student.arrays)
  return step_lib.Step(update, lambda state: (arrays, draw), (arrays, draw))


def _bank_shares(student, choices) -> dict[str, jax.Array]:
  """Share of the layers that chose each bank at this timestep."""
  if student.router is None:
    return {}
  return {f'bank_{i}': jnp.mean(choices == i)
          for i in range(student.router.num_banks)}


def train(student: student_lib.Student, schedule: diffusion.Schedule,
          plan: diffusion.SamplerPlan, settings: FinetuneSettings,
          workdir: str, *, sample_shape: tuple[int, ...], bank_key: jax.Array,
          trajectory_key: jax.Array,
          draw_condition: conditions.Draw = conditions.none,
          layout: devices.Layout | None = None, memory: float = 0.0) -> Any:
  """Fine-tunes a student against the model that it was made from.

  Resumes where the workdir's checkpoints end; if they are complete, only
  loads. Writes router.json: the bank of every layer at every step.

  Args:
    student: of `make_student`.
    schedule: of the forward process.
    plan: the sampler whose trajectories are followed.
    settings: how long, how fast, and what moves.
    workdir: where checkpoints and metrics go.
    sample_shape: (H, W, C) of what the model denoises.
    bank_key: of the parameters at the start.
    trajectory_key: of the noise, see `make_step`.
    draw_condition: what a conditional model is asked for.
    layout: as of `make_step`.
    memory: bytes that each device has; 0: as it says itself.

  Returns:
    What `Student.init` returned, trained.

  Raises:
    ValueError: quantizers of other steps than the plan's; windows of steps that
      it has not.
    errors.MemoryLackError: a step needs more; looked at before it begins.
    errors.DivergedError: names the step and the timestep.
    checkpoint.Preempted: the run was asked to stop, and has saved.
  """
  layout = (layout or devices.layout()).for_batch(
      'config.finetune.batch_size', settings.batch_size, settings.accumulate)
  # Once, for all steps that are tried.
  student = student.with_arrays(layout.put(student.arrays))
  spec_lib.check_steps({name: layer.act for name, layer
                        in student.spec.layers.items()}, plan.num_steps)
  tx = optimizer(settings)
  init = functools.partial(
      init_state, student, tx, plan, sample_shape, bank_key, settings)
  gamma = losses.denoising_factors(schedule, plan, settings.gamma)
  step_of = lambda settings: make_step(
      student, plan, gamma, tx, trajectory_key, draw_condition, layout,
      accumulate=settings.accumulate, how_remat=settings.remat,
      trajectories=trajectories_of(plan, settings),
      direction=settings.direction)
  step = step_of(settings)
  with writer_lib.MetricWriter(workdir) as writer:
    state = loop.run(
        'finetune', init, step, settings.num_updates, workdir=workdir,
        writer=writer, save_every=settings.save_every,
        log_every=settings.log_every, layout=layout,
        shardings=functools.partial(shardings, layout),
        prepare=lambda state: memory_lib.check(
            'finetune', step, state, limit=memory,
            remedies=memory_lib.remedies(
                'finetune', settings, layout, step_of)))
  trainable = average.of(state.trainable, state.opt_state)
  if not layout.is_single:
    # What follows is not split over the devices.
    trainable = jax.tree.map(jnp.asarray, devices.fetch(trainable))
  if student.router is not None and devices.is_first():
    _write_router(f'{workdir}/router.json', plan, student.choices(
        trainable, plan.timesteps))
  return trainable


def _write_router(path: str, plan: diffusion.SamplerPlan,
                  choices: Mapping[str, jax.Array]) -> None:
  content = {'timesteps': plan.timesteps.tolist(),
             'banks': {name: np.asarray(choice).tolist()
                       for name, choice in choices.items()}}
  files.write_text(path, json.dumps(content) + '\n')
