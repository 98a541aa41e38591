"""Training the full-precision teacher, for people without a checkpoint."""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
from typing import Any

from absl import logging
from clu import parameter_overview
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from msfp_jax import convert
from msfp_jax import data
from msfp_jax import diffusion
from msfp_jax.base import arguments
from msfp_jax.base import devices
from msfp_jax.base import pictures
from msfp_jax.base import writer as writer_lib
from msfp_jax.data import stream
from msfp_jax.diffusion import origin as origin_lib
from msfp_jax.diffusion import training
from msfp_jax.models import unet
from msfp_jax.tune import average
from msfp_jax.tune import loop
from msfp_jax.tune import memory as memory_lib
from msfp_jax.tune import parts
from msfp_jax.tune import remat
from msfp_jax.tune import speed
from msfp_jax.tune import step as step_lib

_RULES = {
    **dict.fromkeys(('num_steps', 'batch_size', 'save_every', 'log_every',
                     'sample_every', 'accumulate'), arguments.COUNT),
    **dict.fromkeys(('learning_rate', 'weight_decay'), arguments.RATE),
    'clip_norm': arguments.POSITIVE,
    'ema_decay': arguments.SHARE,
    'dtype': arguments.one_of(('float32', 'bfloat16')),
    'remat': arguments.one_of(remat.WAYS),
    'times': arguments.one_of(training.DENSITIES),
    'times_mean': arguments.NUMBER, 'times_std': arguments.POSITIVE,
}


@dataclasses.dataclass(frozen=True)
class PretrainSettings:
  """How a teacher is trained; configs/common.py has what is usual.

  Attributes:
    num_steps: updates in all.
    batch_size: images at each.
    learning_rate: the highest, at the end of the warm-up.
    warmup: updates over which it rises from 0, less than num_steps.
    weight_decay: of AdamW, a factor of the learning rate.
    clip_norm: gradients of a larger norm are scaled down to it.
    ema_decay: of the moving average of the parameters, which is what is kept.
    save_every: updates from one checkpoint to the next.
    log_every: updates whose metrics are fetched at once.
    sample_every: updates from one picture of samples to the next.
    flip: whether half of the images are mirrored.
    dtype: in which the model computes, 'float32' or 'bfloat16'.
    accumulate: parts of a batch whose gradients are computed one after the
      other and averaged; divides the batch.
    remat: which activations are computed twice, see `tune.remat`.
    times: how often each noise level is seen, see `training.Times`.
    times_mean: of its 'logit_normal'.
    times_std: likewise.

  Raises:
    ValueError: fields that no training can work with, a warm-up that does not
      end before it, or parts that do not divide a batch.
  """

  num_steps: int
  batch_size: int
  learning_rate: float
  warmup: int
  weight_decay: float
  clip_norm: float
  ema_decay: float
  save_every: int
  log_every: int
  sample_every: int
  flip: bool
  dtype: str
  accumulate: int
  remat: str
  times: str
  times_mean: float
  times_std: float

  def __post_init__(self):
    arguments.check_fields('config.pretrain', self, _RULES)
    if not 0 <= self.warmup < self.num_steps:
      raise ValueError(
          f'config.pretrain: warmup={self.warmup} must be less than '
          f'num_steps={self.num_steps}')
    parts.check('config.pretrain', self.batch_size, self.accumulate)


@flax.struct.dataclass
class PretrainState:
  step: jax.Array  # int32, updates done
  params: Any
  ema_params: Any
  opt_state: Any


def optimizer(settings: PretrainSettings) -> optax.GradientTransformation:
  """AdamW with warm-up, cosine decay to zero and clipped gradients."""
  schedule = optax.warmup_cosine_decay_schedule(
      0.0, settings.learning_rate, settings.warmup, settings.num_steps)
  return optax.chain(
      optax.clip_by_global_norm(settings.clip_norm),
      optax.adamw(schedule, weight_decay=settings.weight_decay))


def init_state(model: unet.UNet, tx: optax.GradientTransformation,
               key: jax.Array) -> PretrainState:
  """The state before the first update; the average is the parameters' own."""
  params = jax.jit(model.init)(
      key, jnp.zeros((1, *model.sample_shape)), jnp.zeros((1,)))['params']
  return PretrainState(step=jnp.zeros((), jnp.int32), params=params,
                       ema_params=jax.tree.map(jnp.copy, params),
                       opt_state=tx.init(params))


# (state, key -> uint8 images `[B, H, W, C]`) -> (state, scalars)
Update = Callable[[PretrainState, Callable[[jax.Array], jax.Array]],
                  tuple[PretrainState, dict[str, jax.Array]]]


def make_update(model: unet.UNet, schedule: diffusion.Schedule,
                tx: optax.GradientTransformation, ema_decay: float,
                key: jax.Array, *, flip: bool = False,
                dtype: str = 'float32',
                times: training.Times = training.UNIFORM, accumulate: int = 1,
                how_remat: str = remat.NONE,
                layout: devices.Layout | None = None) -> Update:
  """Makes the update on a batch (DDPM eq. 14), which is to be jitted.

  Args:
    model: predicts the noise; of flow matching the velocity.
    schedule: of the forward process.
    tx: the optimizer.
    ema_decay: of the average, see `average.moved`.
    key: folded with the step, so that a resumed run repeats itself.
    flip: mirror every image with probability 1/2.
    dtype: 'float32' or 'bfloat16', of parameters and activations inside the
      model; what is kept, averaged and added to is float32.
    times: how often each noise level is seen.
    accumulate: parts of the batch, see `parts.run`. Without dropout they give
      what the whole does, up to roundings; with it each has its own.
    how_remat: which activations are computed twice, one of `remat.WAYS`.
    layout: of the batch; by default of all devices.

  Raises:
    ValueError: another dtype.
  """
  if dtype not in ('float32', 'bfloat16'):
    raise ValueError(f"config.pretrain.dtype {dtype!r}: must be 'float32' or "
                     "'bfloat16'")
  layout = layout or devices.layout()

  def loss_fn(params, x, noise, t, key):
    x_t = diffusion.add_noise(schedule, x, noise, t)
    # Cast inside of the loss: gradients come back in float32, to float32
    # parameters.
    params, x_t = jax.tree.map(lambda v: v.astype(dtype), (params, x_t))
    with remat.blocks(how_remat):
      found = model.apply({'params': params}, x_t, t, train=True,
                          rngs={'dropout': key})
    return jnp.mean((found.astype(noise.dtype)
                     - training.target(schedule, x, noise))**2)

  def update(state, take):
    # One key each for rows, noise, timesteps and dropout, of the step alone.
    step_key = jax.random.fold_in(key, state.step)
    keys = jax.random.split(step_key, 4)
    x = data.to_float(take(keys[0]))
    if flip:
      # A key beside the four: without flips their draws are as ever.
      mirrored = jax.random.bernoulli(
          jax.random.fold_in(step_key, len(keys)), shape=(len(x), 1, 1, 1))
      x = jnp.where(mirrored, x[:, :, ::-1], x)
    noise = jax.random.normal(keys[1], x.shape)
    t = times.draw(keys[2], schedule, len(x))

    def work(part):
      x, noise, t, row = part
      # The first row that a part has: a key for each of several.
      key = keys[3] if accumulate == 1 else jax.random.fold_in(keys[3], row[0])
      return jax.value_and_grad(loss_fn)(state.params, x, noise, t, key), ()

    (loss, grads), _ = parts.run(
        work, (x, noise, t, jnp.arange(len(x))), accumulate, layout)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = average.moved(state.ema_params, params, ema_decay, state.step)
    scalars = {'loss': loss, 'l2_grads': optax.tree.norm(grads)}
    return PretrainState(step=state.step + 1, params=params, ema_params=ema,
                         opt_state=opt_state), scalars

  return update


def make_step(update: Update, images: data.Images, batch_size: int, seed: int,
              stack: contextlib.ExitStack,
              layout: devices.Layout | None = None) -> step_lib.Step:
  """Makes the update that takes its images itself.

  An array is kept on the device, and every step draws from it with
  replacement. Other images are streamed in the order of the seed, every one
  once an epoch. Either way a step's images depend on the step alone.

  Args:
    update: of `make_update`.
    images: the data set; an array may be on the devices already.
    batch_size: images at a step.
    seed: of the order of streamed images.
    stack: ends the reading of streamed images when it is closed.
    layout: where parameters and images lie; by default on all devices, each of
      which has all parameters.

  Returns:
    The step. Of streamed images the first state given says where to begin;
    the states that follow must be the step's own.
  """
  layout = layout or devices.layout()
  if isinstance(images, np.ndarray | jax.Array):
    resident = layout.put(jnp.asarray(images), layout.whole)

    # Inside of the program: no image crosses to the device while it trains.
    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: PretrainState, resident: jax.Array):

      def take(key):
        rows = jax.random.randint(key, (batch_size,), 0, len(resident))
        return layout.constrain(resident[rows], layout.batch)

      return layout.after_step(*update(state, take), layout.of_weights)

    return step_lib.Step(step, lambda state: (resident,), (resident,))

  @functools.partial(jax.jit, donate_argnums=0)
  def streamed(state: PretrainState, batch: jax.Array):
    return layout.after_step(
        *update(state, lambda unused_key: batch), layout.of_weights)

  batches = None

  def given(state: PretrainState) -> tuple[jax.Array]:
    nonlocal batches
    # Opened at the first step, which knows where a resumed run stands.
    if batches is None:
      batches = stack.enter_context(contextlib.closing(
          stream.batches(images, batch_size, seed, int(state.step),
                         layout.rows(batch_size))))
    return (layout.put_rows(next(batches), batch_size),)

  return step_lib.Step(streamed, given, (jax.ShapeDtypeStruct(
      (batch_size, *images.shape[1:]), jnp.uint8,
      sharding=None if layout.is_single else layout.batch),))


def _make_draw(model: unet.UNet, plan: diffusion.SamplerPlan,
               start_key: jax.Array, step_key: jax.Array,
               layout: devices.Layout) -> Callable[[Any], jax.Array]:
  """params -> 64 samples, uint8; the noise is the same at every call."""
  # Once, so that pictures of different steps show the same samples growing.
  noise = jax.random.normal(start_key, (64, *model.sample_shape))

  @jax.jit
  def draw(params: Any) -> jax.Array:
    eps_fn = lambda x, t, index: model.apply({'params': params}, x, t)
    return layout.constrain(data.to_uint8(
        diffusion.sample(eps_fn, plan, noise, step_key)), layout.whole)

  return draw


def run(model: unet.UNet, images: data.Images,
        schedule: diffusion.Schedule, plan: diffusion.SamplerPlan,
        settings: PretrainSettings, workdir: str, *, seed: int,
        origin: origin_lib.Origin | None = None,
        about: Mapping[str, str] | None = None,
        layout: devices.Layout | None = None, memory: float = 0.0) -> str:
  """Trains the teacher; returns the path of its safetensors file.

  Sample grids of the averaged parameters, all from one noise, go to
  `workdir`/samples. Resumes where the workdir's checkpoints end.

  Args:
    model: an unconditional UNet.
    images: what it learns to make, of its `sample_shape`.
    schedule: of the forward process.
    plan: the sampler of the pictures.
    settings: how long and how fast.
    workdir: where checkpoints, metrics, samples and the model go.
    seed: of all randomness.
    origin: goes into the model's file, which then tells its schedule.
    about: goes into the model's header, beside seed and steps.
    layout: as of `make_step`.
    memory: bytes that each device has; 0: as it says itself.

  Raises:
    errors.MemoryLackError: a step needs more; looked at before it begins.
    errors.DivergedError: names the step.
    checkpoint.Preempted: the run was asked to stop, and has saved.
  """
  layout = (layout or devices.layout()).for_batch(
      'config.pretrain.batch_size', settings.batch_size, settings.accumulate)
  key = jax.random.key(seed)
  tx = optimizer(settings)
  init = functools.partial(
      init_state, model, tx, jax.random.fold_in(key, 0))
  parameter_overview.log_parameter_overview(
      jax.eval_shape(init).params, include_stats=False)
  logging.info('pre-training it on %d images of %s', len(images),
               images.shape[1:])
  update_of = lambda settings: make_update(
      model, schedule, tx, settings.ema_decay, jax.random.fold_in(key, 1),
      flip=settings.flip, dtype=settings.dtype, times=training.Times(
          settings.times, settings.times_mean, settings.times_std),
      accumulate=settings.accumulate, how_remat=settings.remat, layout=layout)
  draw = _make_draw(model, plan, jax.random.fold_in(key, 2),
                    jax.random.fold_in(key, 3), layout)
  if isinstance(images, np.ndarray):
    # Once, for all steps that are tried.
    images = layout.put(jnp.asarray(images), layout.whole)
  with (contextlib.ExitStack() as stack,
        writer_lib.MetricWriter(workdir) as writer):
    step_of = lambda settings: make_step(
        update_of(settings), images, settings.batch_size, seed, stack, layout)
    step = step_of(settings)

    def on_step(done: int, state: PretrainState) -> None:
      if done % settings.sample_every == 0 or done == settings.num_steps:
        grid = pictures.image_grid(np.asarray(draw(state.ema_params)), 16)
        if devices.is_first():
          pictures.save_png(f'{workdir}/samples/step_{done:06d}.png', grid)
        writer.write_images(done, {'samples': grid[None]})

    state = loop.run(
        'pretrain', init, step, settings.num_steps, workdir=workdir,
        writer=writer, save_every=settings.save_every,
        log_every=settings.log_every, on_step=on_step,
        images_per_step=settings.batch_size, layout=layout,
        measure=lambda: speed.of(
            step, settings.dtype, settings.accumulate),
        shardings=layout.of_weights, prepare=lambda state: memory_lib.check(
            'pretrain', step, state, limit=memory,
            remedies=memory_lib.remedies(
                'pretrain', settings, layout, step_of)))
  path = f'{workdir}/model.safetensors'
  params = devices.fetch(state.ema_params)
  devices.by_first(lambda: convert.save_pretrained(
      path, model, params, origin, seed=str(seed),
      steps=str(settings.num_steps), **(about or {})), 'the teacher is written')
  logging.info('wrote %s', path)
  return path
