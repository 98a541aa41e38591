"""Flips and bfloat16 in the training of a teacher."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from msfp_jax import data
from msfp_jax import diffusion
from msfp_jax.tune import pretrain

KEY = jax.random.key(5)
IMAGES = np.random.default_rng(0).integers(0, 256, (64, *tiny.IMAGE), np.uint8)
EMA_DECAY = 0.999


def take(key):
  return jnp.asarray(IMAGES)[jax.random.permutation(key, len(IMAGES))]


class Net:
  """`tiny.NET` with the arguments that pre-training gives."""

  def apply(self, variables, x, t, *, train, rngs):
    assert train and rngs.keys() == {'dropout'}
    return tiny.NET.apply(variables, x, t)


class Scale:
  """The least that can be trained."""

  def apply(self, variables, x, t, *, train, rngs):
    return variables['params'] * x


def state_at(step, tx, params):
  params = jax.tree.map(jnp.copy, params)
  return pretrain.PretrainState(
      step=jnp.int32(step), params=params, ema_params=params,
      opt_state=tx.init(params))


def update_of(model, tx, **kwargs):
  return pretrain.make_update(
      model, tiny.SCHEDULE, tx, EMA_DECAY, KEY, **kwargs)


@pytest.fixture
def draw(monkeypatch):
  """(step, flip) -> the images, the noise and the timesteps of that step."""
  add_noise = diffusion.add_noise

  def of(step, flip):
    seen = []

    def recorded(schedule, x, noise, t):
      seen.append([np.asarray(v) for v in (x, noise, t)])
      return add_noise(schedule, x, noise, t)

    monkeypatch.setattr(diffusion, 'add_noise', recorded)
    tx = optax.sgd(0.1)
    update_of(Scale(), tx, flip=flip)(state_at(step, tx, jnp.ones(())), take)
    (values,) = seen
    return values

  return of


def mirrored(flipped, images):
  """Which images are mirrored; every one is, or is as it was."""
  same = (flipped == images).all(axis=(1, 2, 3))
  mirror = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
  np.testing.assert_array_equal(same, ~mirror)
  return mirror


@pytest.mark.slow
def test_flips_mirror_half_of_the_images_by_the_step(draw):
  by_step = []
  for step in range(3):
    images, noise, t = draw(step, flip=False)
    flipped, same_noise, same_t = draw(step, flip=True)
    by_step.append(mirrored(flipped, images))
    assert 16 <= by_step[-1].sum() <= 48  # of 64
    np.testing.assert_array_equal(noise, same_noise)
    np.testing.assert_array_equal(t, same_t)
    np.testing.assert_array_equal(flipped, draw(step, flip=True)[0])
  assert not np.array_equal(by_step[0], by_step[1])
  assert not np.array_equal(by_step[1], by_step[2])


def plain_update(state, tx):
  """The update without flips and in float32, written out."""
  keys = jax.random.split(jax.random.fold_in(KEY, state.step), 4)
  x = data.to_float(take(keys[0]))
  noise = jax.random.normal(keys[1], x.shape)
  t = jax.random.randint(keys[2], (len(x),), 0, 1000)
  x_t = diffusion.add_noise(tiny.SCHEDULE, x, noise, t)
  loss, grads = jax.value_and_grad(lambda params: jnp.mean(
      (tiny.NET.apply({'params': params}, x_t, t) - noise)**2))(state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  decay = jnp.minimum(EMA_DECAY, (1.0 + state.step) / (10.0 + state.step))
  ema = jax.tree.map(
      lambda e, p: e + (1 - decay) * (p - e), state.ema_params, params)
  return pretrain.PretrainState(
      step=state.step + 1, params=params, ema_params=ema,
      opt_state=opt_state), loss


@pytest.mark.slow
def test_without_flips_a_step_draws_and_computes_what_it_always_did():
  tx = optax.adamw(1e-3)
  state = state_at(7, tx, tiny.params(tiny.NET))
  expected, loss = jax.jit(lambda state: plain_update(state, tx))(state)
  found, scalars = jax.jit(
      lambda state: update_of(Net(), tx)(state, take))(state)
  assert scalars['loss'] == loss
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
def test_bfloat16_inside_the_model_and_float32_outside():
  inside = set()

  def interceptor(call, args, kwargs, context):
    out = call(*args, **kwargs)
    if context.method_name == '__call__':
      inside.add((type(context.module).__name__, out.dtype.name))
    return out

  tx = optax.adamw(1e-3)
  state = state_at(3, tx, tiny.params(tiny.UNET))
  update = update_of(tiny.UNET, tx, dtype='bfloat16')
  with nn.intercept_methods(interceptor):
    found, scalars = jax.eval_shape(lambda state: update(state, take), state)
  assert {'Conv', 'Dense', 'GroupNorm'} <= {name for name, _ in inside}
  assert {dtype for _, dtype in inside} == {'bfloat16'}
  assert jax.tree.map(lambda v: v.dtype, found) == jax.tree.map(
      lambda v: v.dtype, state)
  assert {v.dtype for v in scalars.values()} == {np.dtype(np.float32)}


@pytest.mark.slow
def test_bfloat16_is_float32_rounded():
  tx = optax.adamw(1e-3)
  state = state_at(3, tx, tiny.params(tiny.NET))
  scalars = [
      jax.jit(lambda state, d=dtype: update_of(Net(), tx, dtype=d)(
          state, take)[1])(state) for dtype in ('float32', 'bfloat16')]
  for name, expected in scalars[0].items():
    assert float(scalars[1][name]) == pytest.approx(float(expected), rel=0.02)
    assert scalars[1][name] != expected


def test_an_unknown_dtype_is_named():
  with pytest.raises(ValueError, match="'float16'.*'float32'.*'bfloat16'"):
    update_of(Net(), optax.sgd(0.1), dtype='float16')
