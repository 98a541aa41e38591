"""The teacher's training: learning rate, clipping, moving average, loss.

tests/experiment/ trains whole teachers.
"""

import functools

from adamw_oracle import adamw
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from msfp_jax import diffusion
from msfp_jax.tune import pretrain

SCHEDULE = diffusion.make_schedule(
    'linear', num_train_steps=1000, beta_start=1e-4, beta_end=0.02)


def settings(**changes):
  return pretrain.PretrainSettings(
      **dict(common.get_config().pretrain) | changes)


def rate(i, highest, warmup, length):
  """Of update i: a line up from 0, then half a cosine down to 0."""
  if i < warmup:
    return highest * i / warmup
  progress = (i - warmup) / (length - warmup)
  return highest * (1 + np.cos(np.pi * progress)) / 2


@pytest.mark.parametrize('warmup', [0, 4])
def test_the_learning_rate_warms_up_and_falls_along_a_cosine(warmup):
  """And gradients whose norm is above 1 are scaled to it."""
  rng = np.random.default_rng(0)
  start = rng.standard_normal(5)
  gradients = rng.standard_normal((12, 5)) * np.geomspace(
      0.05, 5, 12)[:, None]
  norms = np.linalg.norm(gradients, axis=1, keepdims=True)
  assert norms.min() < 1 < norms.max()
  tx = pretrain.optimizer(settings(
      num_steps=12, warmup=warmup, learning_rate=0.2, weight_decay=0.1,
      clip_norm=1.0))
  params = jnp.float32(start)
  state, seen = tx.init(params), []
  for gradient in gradients:
    updates, state = tx.update(jnp.float32(gradient), state, params)
    params = optax.apply_updates(params, updates)
    seen.append(params)
  expected = adamw(
      start, gradients / np.maximum(norms, 1),
      [rate(i, 0.2, warmup, 12) for i in range(12)], b2=0.999,
      weight_decay=0.1)
  np.testing.assert_allclose(seen, expected, rtol=1e-5, atol=1e-5)
  updates, _ = tx.update(jnp.ones(5), state, params)
  assert np.abs(updates).max() < 1e-8  # the rate of an update too many


class Multiple(nn.Module):
  """Predicts a learned multiple of x; each channel has its own."""

  @nn.compact
  def __call__(self, x, t, *, train=False):
    return x * self.param('a', nn.initializers.zeros, (2,))


def start(tx):
  params = {'a': jnp.zeros(2)}
  return pretrain.PretrainState(
      step=jnp.zeros((), jnp.int32), params=params, ema_params=params,
      opt_state=tx.init(params))


def take(key):
  return jax.random.randint(key, (16, 4, 4, 2), 0, 256).astype(jnp.uint8)


def test_the_average_forgets_faster_at_the_start():
  """e += (1 - d) (p - e), where d = min(0.7, (1 + step) / (10 + step))."""
  tx = optax.sgd(0.3)
  update = jax.jit(functools.partial(pretrain.make_update(
      Multiple(), SCHEDULE, tx, 0.7, jax.random.key(1)), take=take))
  state, average = start(tx), np.zeros(2)
  for step in range(30):  # the two are equal at step 20
    state, _ = update(state)
    decay = min(0.7, (1 + step) / (10 + step))
    average = decay * average + (1 - decay) * np.float64(state.params['a'])
    np.testing.assert_allclose(
        state.ema_params['a'], average, rtol=1e-5, atol=1e-6)
  assert np.abs(average - state.params['a']).max() > 1e-3
  assert int(state.step) == 30


def test_the_loss_is_that_of_the_noise_in_x_t():
  """Predicting 0 misses noise of variance 1; a x_t misses by a formula.

  x_t = sqrt(bar) x + sqrt(1 - bar) noise, so the mean of (a x_t - noise)^2 is
  a^2 bar E[x^2] + (a sqrt(1 - bar) - 1)^2, averaged over all t.
  """
  tx = optax.sgd(0.0)
  update = jax.jit(functools.partial(pretrain.make_update(
      Multiple(), SCHEDULE, tx, 0.9, jax.random.key(2)),
      take=lambda key: take_many(key)))
  bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
  # Uniform over 0..255 in [-1, 1].
  power = np.mean((np.arange(256) / 127.5 - 1)**2)
  for a in (0.0, 0.8):
    losses = losses_of(update, start(tx), a)
    expected = np.mean(a**2 * bar * power + (a * np.sqrt(1 - bar) - 1)**2)
    assert np.mean(losses) == pytest.approx(expected, rel=0.02)
    assert len(set(losses)) == 8  # noise, timesteps and images are fresh


def losses_of(update, state, a):
  """The losses of 8 updates of a model that predicts a x_t."""
  state, losses = state.replace(params={'a': jnp.full(2, a)}), []
  for _ in range(8):
    state, scalars = update(state)
    losses.append(float(scalars['loss']))
  return losses


def take_many(key):
  return jax.random.randint(key, (2048, 4, 4, 2), 0, 256).astype(jnp.uint8)


def test_the_loss_of_a_flow_is_that_of_its_velocity():
  """x = (1 - s) x_0 + s noise, and the target is noise - x_0.

  A prediction of a x misses it by (a (1 - s) + 1)^2 E[x_0^2] + (a s - 1)^2.
  """
  tx = optax.sgd(0.0)
  update = jax.jit(functools.partial(pretrain.make_update(
      Multiple(), diffusion.FlowSchedule(1000), tx, 0.9, jax.random.key(2)),
      take=take_many))
  s = (np.arange(10_000) + 0.5) / 10_000
  power = np.mean((np.arange(256) / 127.5 - 1)**2)
  for a in (0.0, 0.8):
    losses = losses_of(update, start(tx), a)
    expected = np.mean((a * (1 - s) + 1)**2 * power + (a * s - 1)**2)
    assert np.mean(losses) == pytest.approx(expected, rel=0.02)
