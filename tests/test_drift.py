"""The drift of predictions: found, subtracted, kept in files."""

import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from packed_files import changed
from packed_files import rewrite
import pytest
import recursion
import tiny

import msfp_jax as msfp
from msfp_jax import diffusion
from msfp_jax.packed import file as packed_file
from msfp_jax.packed import model as packed_lib

SHAPE = (8, 8, 2)
MODEL = tiny.NET
OFF = np.float32([0.25, -0.75])
NOISY = diffusion.ddim_plan(tiny.SCHEDULE, 4, eta=0.5)


def noise(seed, batch=5):
  return jax.random.normal(jax.random.key(seed), (batch, *SHAPE))


class Linear(nn.Module):
  """Predicts noise pixel by pixel."""

  dtype: Any = None

  @nn.compact
  def __call__(self, x, t):
    return nn.Dense(x.shape[-1], dtype=self.dtype, name='only')(x)


PARAMS = {'only': {'kernel': np.float32([[0.9, 0.2], [-0.1, 0.8]]),
                   'bias': np.float32([0.0, 0.1])}}


def biased(plan):
  """The model with predictions that are off by OFF, whatever it is given."""
  kernel, bias = PARAMS['only']['kernel'], PARAMS['only']['bias']
  return packed_lib.full_precision(
      Linear(), {'only': {'kernel': kernel, 'bias': bias + OFF}}, plan)


@functools.cache
def quantized():
  """A model of one channel with errors of every kind."""
  return packed_lib.simulate(
      MODEL, tiny.params(MODEL), tiny.spec(MODEL), tiny.PLAN)


@functools.cache
def corrected():
  return msfp.correct_drift(
      quantized(), tiny.params(MODEL), tiny.noise(3, batch=7))


@pytest.mark.parametrize('plan', [
    NOISY, diffusion.dpm_solver_plan(tiny.SCHEDULE, 4)],
                         ids=['eta', 'multistep'])
def test_what_all_images_share_is_found_and_goes(plan):
  model = msfp.correct_drift(
      biased(plan), PARAMS, noise(1), key=jax.random.key(4))
  np.testing.assert_allclose(model.drift, [OFF] * 4, atol=1e-5)
  key, x = jax.random.key(5), noise(2)
  sample = lambda model: np.asarray(model.sample(x, key=key))
  expected = sample(packed_lib.full_precision(Linear(), PARAMS, plan))
  np.testing.assert_allclose(sample(model), expected, atol=1e-4)
  assert np.abs(sample(biased(plan)) - expected).max() > 0.1
  # Measured anew, and not added to what it has.
  again = msfp.correct_drift(model, PARAMS, noise(1), key=jax.random.key(4))
  np.testing.assert_array_equal(again.drift, model.drift)


def test_predictions_in_half_precision_are_corrected_in_float32():
  """1 less a thousandth is 1 in bfloat16."""
  model = packed_lib.full_precision(
      Linear(jnp.bfloat16), {'only': {
          'kernel': jnp.zeros((2, 2)), 'bias': jnp.ones(2)}}, NOISY)
  model = dataclasses.replace(model, drift=np.full((4, 2), 1e-3, np.float32))
  np.testing.assert_allclose(
      model.eps_fn(noise(0), jnp.zeros(5), 1), 0.999, rtol=1e-6)


def by_hand(x, y=None, drift=None):
  """Samples of DDIM step by step, in float64 but for the model.

  Args:
    x: noise, of the quantized model.
    y: the same noise, of full precision, which measures; or None.
    drift: that is subtracted where there is no y.

  Returns:
    The samples of the quantized model, and the drift.
  """
  model = quantized()
  teacher = packed_lib.full_precision(MODEL, tiny.params(MODEL), tiny.PLAN)
  predict, told = (jax.jit(of.eps_fn) for of in (model, teacher))
  found = []
  for i, t in enumerate(tiny.PLAN.timesteps):
    step = lambda x, eps, i=i: (
        np.float64(tiny.PLAN.x_coef[i]) * x - tiny.PLAN.eps_factor[i] * eps)
    eps_of = lambda fn, x, i=i, t=t: np.float64(
        fn(np.float32(x), tiny.t_of(t, len(x)), i))
    eps = eps_of(predict, x)
    if y is None:
      found.append(drift[i])
    else:
      target = eps_of(told, y)
      y = step(y, target)
      found.append(eps.mean((0, 1, 2)) - target.mean((0, 1, 2)))
    x = step(x, eps - found[-1])
  return x, np.stack(found)


@pytest.mark.slow
def test_it_is_measured_along_corrected_trajectories():
  x = np.float64(tiny.noise(3, batch=7))
  _, expected = by_hand(x, x)
  assert np.abs(expected).min() > 1e-3
  np.testing.assert_allclose(corrected().drift, expected, atol=1e-4)
  other = tiny.noise(6)
  np.testing.assert_allclose(
      corrected().sample(other),
      by_hand(np.float64(other), drift=corrected().drift)[0], atol=1e-3)


@pytest.mark.slow
def test_of_differences_between_steps():
  """Of the first step, which is taken twice, the second time counts."""
  model = recursion.simulated()
  means = []
  full = [np.float64(recursion.PARAMS[name]['kernel'])
          for name in ('first', 'last')]

  def teacher(x, i):
    h = np.tanh((x + recursion.PLAN.timesteps[i] / 1000) @ full[0]
                + np.float64(recursion.PARAMS['first']['bias'])) @ full[1]
    means.append(h.mean((0, 1, 2)))
    return h

  recursion.by_hand(teacher)
  drift, inner, steps = [], recursion.ByHand(model), iter(means)

  def predict(x, i):
    eps = inner(x, i)
    drift.append(eps.mean((0, 1, 2)) - next(steps))
    return eps - drift[-1]

  expected = recursion.by_hand(predict)
  found = msfp.correct_drift(model, recursion.PARAMS, recursion.X,
                             key=recursion.KEY)
  np.testing.assert_allclose(found.drift, drift[1:], atol=1e-4)
  np.testing.assert_allclose(found.sample(recursion.X, key=recursion.KEY),
                             expected, atol=1e-3)


@pytest.mark.optimized
@pytest.mark.parametrize('differences, version', [
    (False, 4), pytest.param(True, 5, marks=pytest.mark.slow)])
def test_files_keep_it(tmp_path, differences, version):
  """Bit for bit, and what does not fit is refused."""
  model = dataclasses.replace(recursion.simulated(), differences=differences)
  drift = np.arange(20, dtype=np.float32).reshape(5, 4) / 20
  model = dataclasses.replace(model, drift=drift)
  path = tmp_path / 'model'
  packed_file.save(path, model.packed())
  assert f'msfp-jax/packed/{version}'.encode() in path.read_bytes()
  loaded = packed_file.load(path, recursion.MODEL)
  assert loaded.differences == differences
  np.testing.assert_array_equal(loaded.drift, drift)
  np.testing.assert_array_equal(
      loaded.sample(recursion.X, key=recursion.KEY),
      model.sample(recursion.X, key=recursion.KEY))
  plain = dataclasses.replace(model, drift=None)
  assert model.stored_bytes - plain.stored_bytes == drift.nbytes
  for odd, part in ((drift[1:], 'drift is float32 (4, 4), expected'),
                    (drift[:, 1:], 'drift is float32 (5, 3), expected'),
                    (drift * np.nan, 'drift holds values that are not finite')):
    rewrite(path, changed('drift', odd))
    with pytest.raises(ValueError, match=re.escape(part)):
      packed_file.load(path, recursion.MODEL)
  rewrite(path, lambda tensors: tensors.pop('drift'))
  with pytest.raises(ValueError, match='missing drift'):
    packed_file.load(path, recursion.MODEL)


def test_what_it_cannot_be_measured_of():
  model = quantized()
  with pytest.raises(TypeError, match='packed is None'):
    msfp.correct_drift(None, PARAMS, noise(0))
  with pytest.raises(ValueError, match='params are of another model'):
    msfp.correct_drift(model, recursion.PARAMS, tiny.noise(0))
  with pytest.raises(ValueError, match='int32'):
    msfp.correct_drift(model, tiny.params(MODEL), jnp.zeros((1, 8, 8, 1), int))
  with pytest.raises(ValueError, match='NaN or infinite'):
    msfp.correct_drift(
        model, tiny.params(MODEL), jnp.full((1, 8, 8, 1), jnp.nan))
  for shape in ((3, 1), (4,)):
    with pytest.raises(ValueError, match=re.escape(f'drift of shape {shape}')):
      dataclasses.replace(model, drift=np.zeros(shape, np.float32))
