"""Training the full-precision teacher, for people without a checkpoint."""

from collections.abc import Callable
import contextlib
import functools
from typing import Any

from absl import logging
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from msfp_jax import convert
from msfp_jax import data
from msfp_jax import diffusion
from msfp_jax.base import pictures
from msfp_jax.base import writer as writer_lib
from msfp_jax.data import stream
from msfp_jax.models import unet
from msfp_jax.tune import loop


@flax.struct.dataclass
class PretrainState:
  step: jax.Array  # int32, updates done
  params: Any
  ema_params: Any
  opt_state: Any


def optimizer(
    config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """Makes AdamW with warm-up, cosine decay to zero and clipped gradients."""
  if not 0 <= config.warmup < config.num_steps:
    raise ValueError(
        f'config.pretrain: warmup={config.warmup} must be less than '
        f'num_steps={config.num_steps}')
  schedule = optax.warmup_cosine_decay_schedule(
      0.0, config.learning_rate, config.warmup, config.num_steps)
  return optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(schedule, weight_decay=config.weight_decay))


def init_state(model: unet.UNet, tx: optax.GradientTransformation,
               key: jax.Array) -> PretrainState:
  cfg = model.config
  shape = (1, cfg.image_size, cfg.image_size, cfg.in_channels)
  params = jax.jit(model.init)(key, jnp.zeros(shape), jnp.zeros((1,)))['params']
  return PretrainState(step=jnp.zeros((), jnp.int32), params=params,
                       ema_params=jax.tree.map(jnp.copy, params),
                       opt_state=tx.init(params))


# (state, key -> uint8 images `[B, H, W, C]`) -> (state, scalars)
Update = Callable[[PretrainState, Callable[[jax.Array], jax.Array]],
                  tuple[PretrainState, dict[str, jax.Array]]]


def make_update(model: unet.UNet, schedule: diffusion.NoiseSchedule,
                tx: optax.GradientTransformation, ema_decay: float,
                key: jax.Array) -> Update:
  """Makes the update on a batch (DDPM eq. 14), which is to be jitted.

  Args:
    model: predicts the noise.
    schedule: of the forward process.
    tx: the optimizer.
    ema_decay: reached after a warm-up of (1 + step) / (10 + step).
    key: folded with the step, so that a resumed run repeats itself.
  """

  def loss_fn(params, x, noise, t, key):
    x_t = diffusion.add_noise(schedule, x, noise, t)
    eps = model.apply({'params': params}, x_t, t, train=True,
                      rngs={'dropout': key})
    return jnp.mean((eps - noise)**2)

  def update(state, take):
    # One key each for rows, noise, timesteps and dropout, of the step alone.
    keys = jax.random.split(jax.random.fold_in(key, state.step), 4)
    x = data.to_float(take(keys[0]))
    noise = jax.random.normal(keys[1], x.shape)
    t = jax.random.randint(keys[2], (len(x),), 0, schedule.num_train_steps)
    loss, grads = jax.value_and_grad(loss_fn)(
        state.params, x, noise, t, keys[3])
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # Early averages would be of the initial weights: the warm-up forgets them.
    decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e),
                       state.ema_params, params)
    scalars = {'loss': loss, 'l2_grads': optax.tree.norm(grads)}
    return PretrainState(step=state.step + 1, params=params, ema_params=ema,
                         opt_state=opt_state), scalars

  return update


def make_step(update: Update, images: data.Images, batch_size: int, seed: int,
              stack: contextlib.ExitStack):
  """Makes the update that takes its images itself: state -> (state, scalars).

  An array is kept on the device, and every step draws from it with
  replacement. Other images are streamed in the order of the seed, every one
  once an epoch. Either way a step's images depend on the step alone.

  Args:
    update: of `make_update`.
    images: the data set.
    batch_size: images at a step.
    seed: of the order of streamed images.
    stack: ends the reading of streamed images when it is closed.

  Returns:
    The step. Of streamed images the first state given says where to begin;
    the states that follow must be the step's own.
  """
  if isinstance(images, np.ndarray):
    resident = jnp.asarray(images)

    # Inside of the program: no image crosses to the device while it trains.
    def take(key):
      rows = jax.random.randint(key, (batch_size,), 0, len(resident))
      return resident[rows]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: PretrainState):
      return update(state, take)

    return step

  @functools.partial(jax.jit, donate_argnums=0)
  def streamed(state: PretrainState, batch: jax.Array):
    return update(state, lambda unused_key: batch)

  batches = None

  def next_step(state: PretrainState):
    nonlocal batches
    if batches is None:
      batches = stack.enter_context(contextlib.closing(
          stream.batches(images, batch_size, seed, int(state.step))))
    return streamed(state, next(batches))

  return next_step


def run(config: ml_collections.ConfigDict, workdir: str,
        command: str = '') -> str:
  """Trains the teacher; returns the path of its safetensors file.

  Sample grids of the averaged parameters, all from one noise, go to
  `workdir`/samples. Resumes where the workdir's checkpoints end.

  Args:
    config: the experiment (configs/).
    workdir: where checkpoints, metrics, samples and the model go.
    command: written into the model's header.
  """
  cfg = config.pretrain
  images = data.load(config.data.name, config.data.path)
  model = unet.UNet(model_config(config.model, images))
  check_images(images, model.config)
  schedule = diffusion.make_schedule(**config.schedule)
  plan = diffusion.make_plan(schedule, **config.sampler)
  key = jax.random.key(config.seed)
  tx = optimizer(cfg)
  init = functools.partial(
      init_state, model, tx, jax.random.fold_in(key, 0))
  count = sum(leaf.size for leaf in jax.tree.leaves(
      jax.eval_shape(init).params))
  logging.info('pre-training a UNet of %s parameters on %d images of %s',
               f'{count:,}', len(images), images.shape[1:])
  update = make_update(
      model, schedule, tx, cfg.ema_decay, jax.random.fold_in(key, 1))
  noise = jax.random.normal(jax.random.fold_in(key, 2), (64, *images.shape[1:]))

  @jax.jit
  def draw(params):
    eps_fn = lambda x, t, i: model.apply({'params': params}, x, t)
    return data.to_uint8(diffusion.sample(
        eps_fn, plan, noise, jax.random.fold_in(key, 3)))

  with (contextlib.ExitStack() as stack,
        writer_lib.MetricWriter(workdir) as writer):
    step = make_step(update, images, cfg.batch_size, config.seed, stack)

    def on_step(done: int, state: PretrainState) -> None:
      if done % cfg.sample_every == 0 or done == cfg.num_steps:
        grid = pictures.image_grid(np.asarray(draw(state.ema_params)), 16)
        pictures.save_png(f'{workdir}/samples/step_{done:06d}.png', grid)
        writer.write_images(done, {'samples': grid[None]})

    state = loop.run(
        'pretrain', init, step, cfg.num_steps, workdir=workdir,
        writer=writer, save_every=cfg.save_every, log_every=cfg.log_every,
        on_step=on_step)
  path = f'{workdir}/model.safetensors'
  convert.save_pretrained(
      path, model.config, jax.device_get(state.ema_params), command=command,
      seed=str(config.seed), steps=str(cfg.num_steps), data=config.data.name)
  logging.info('wrote %s', path)
  return path


def model_config(fields: ml_collections.ConfigDict,
                 images: data.Images) -> unet.UNetConfig:
  """The UNetConfig of config.model; sizes and channels of 0 are the images'."""
  fields = dict(fields)
  height, width, channels = images.shape[1:]
  fields['image_size'] = fields['image_size'] or height
  fields['in_channels'] = fields['in_channels'] or channels
  fields['out_channels'] = fields['out_channels'] or channels
  config = unet.UNetConfig(**fields)
  config.check_size(height, width)
  return config


def check_images(images: data.Images, config: unet.UNetConfig) -> None:
  """Raises ValueError unless the images fit the model."""
  height, width, channels = images.shape[1:]
  config.check_size(height, width)
  if channels != config.in_channels:
    raise ValueError(
        f'the images have {channels} channels, the model takes '
        f'{config.in_channels}; convert the images, or train a model on them: '
        'config.pretrained empty, config.model.in_channels and out_channels '
        f'{channels}')
