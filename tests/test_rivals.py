"""Rotation by layer, and quantizers chosen among those that follow the data."""

import kernel_oracle
import numpy as np
import pytest
from scipy import linalg

from msfp_jax.quant import block_formats
from msfp_jax.quant import calibrate as calibrate_lib
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import recipes
from msfp_jax.quant.around import Around
from msfp_jax.quant.around import Rotation
from msfp_jax.quant.around import Trial
from msfp_jax.quant.fit import BestOf
from msfp_jax.quant.fit import Seen

RNG = np.random.default_rng(0)


def seen_of(rows):
  return Seen(values=rows.ravel(), rows=rows, minimum=float(rows.min()),
              maximum=float(rows.max()))


def outliers(channels=32):
  """Inputs with one channel far larger than the rest: rotation's own case."""
  rows = RNG.normal(size=(200, channels)).astype(np.float32)
  rows[:, 3] *= 40
  return rows


def silu(channels=32):
  x = 2 * RNG.normal(size=(400, channels)).astype(np.float32)
  return x / (1 + np.exp(-x))


def trial_of(rows, kernel):
  int4 = block_formats.int_group(4)
  restored = lambda x, axis: np.asarray(fit_lib.restored(int4, x, axis))
  return Trial(seen_of(rows), kernel, lambda w: restored(w, -2),
               lambda seen: restored(seen.rows, -1))


@pytest.mark.parametrize('channels, size', [
    (64, 32), (96, 32), (24, 8), (6, 2), (7, 0), (1, 0), (3, 0)])
def test_blocks_are_as_large_as_the_channels_allow(channels, size):
  kernel = np.ones((channels, 2), np.float32)
  assert Rotation()(trial_of(
      np.ones((4, channels), np.float32), kernel)).rotation == size


def integers(channels=32):
  """Inputs that INT4 holds exactly, until they are rotated."""
  rows = RNG.integers(-7, 8, (50, channels)).astype(np.float32)
  rows[:, 0] = 7
  return rows


@pytest.mark.slow
@pytest.mark.parametrize('rows, rotated', [
    (outliers(), True), (integers(), False)], ids=['outliers', 'integers'])
def test_a_layer_is_rotated_where_its_output_gains(rows, rotated):
  kernel = RNG.normal(size=(3, 3, 32, 5)).astype(np.float32)
  trial = trial_of(rows, kernel)
  found = Rotation(only_if_better=True)(trial)
  assert found.rotation == (32 if rotated else 0)
  errors = [trial.error(around) for around in (Around(), Around(rotation=32))]
  assert (errors[1] < errors[0]) == rotated


@pytest.mark.slow
def test_the_error_of_a_trial_is_that_of_the_outputs():
  """In float64, by explicit matrices, with a branch and smoothing as well."""
  rows = outliers(8)
  kernel = RNG.normal(size=(2, 8, 5)).astype(np.float32)  # a window of 2
  around = Around(np.float32(RNG.uniform(.5, 2, 8)),
                  np.float32(RNG.normal(size=(2, 8, 1))),
                  np.float32(RNG.normal(size=(1, 5))), rotation=8)
  halves = lambda x: np.round(np.float64(x) * 2) / 2
  trial = Trial(seen_of(rows), kernel, halves, lambda seen: halves(seen.rows))
  matrix = linalg.hadamard(8) / np.sqrt(8)
  x = np.float64(rows) / around.smooth @ matrix
  expected = 0.0
  for tap in range(2):
    branch = np.float64(around.down[tap]) @ np.float64(around.up)
    w = matrix @ (around.smooth[:, None] * np.float64(kernel[tap])) - branch
    y = halves(x) @ halves(w) + x @ branch
    expected += ((y - np.float64(rows) @ kernel[tap])**2).sum()
  np.testing.assert_allclose(trial.error(around), expected, rtol=1e-4)


@pytest.mark.parametrize('shared, group', [
    ('group', 8), pytest.param('image', 0, marks=pytest.mark.slow),
    pytest.param('token', 0, marks=pytest.mark.slow)])
def test_the_best_of_those_that_follow_the_data(shared, group):
  """By brute force over all candidates, and unsigned where SiLU's tail is."""
  rows = silu(16)
  fit = BestOf(block_formats.mixup_candidates(shared, group))
  fitted = fit(seen_of(rows), 4, -1)
  errors = {}
  for quantizer in fit.make(4, seen_of(rows)):
    back = kernel_oracle.block(rows[None], quantizer, -1)
    errors[quantizer] = np.mean((back - rows)**2)
  np.testing.assert_allclose(fitted.mse, min(errors.values()), rtol=1e-3)
  assert not fitted.quantizer.fmt.signed
  assert fitted.quantizer.zero_point < 0
  signed = BestOf(block_formats.signed_candidates(shared, group))(
      seen_of(rows), 4, -1)
  assert signed.quantizer.fmt.signed and signed.mse > fitted.mse


def test_candidates_without_a_tail_need_no_zero_point():
  rows = np.abs(silu(16))
  zeros = {q.zero_point for q in block_formats.mixup_candidates('token')(
      4, seen_of(rows)) if not q.fmt.signed}
  assert zeros == {0.0}


# Of those that differ in kind, at 4 bits; the rest are slow tests.
QUICK = ('dual_scale', 'int4_minmax', 'svdquant')
# At 8 bits, whose many formats take long to search, one of each kind.
EIGHT = (*QUICK, 'int', 'msfp_group', 'hadamard', 'nvfp4', 'quartz')


@pytest.mark.parametrize('name, bits', [
    *[pytest.param(name, 4, marks=() if name in QUICK else pytest.mark.slow)
      for name in recipes.RECIPES],
    *[pytest.param(name, 8, marks=pytest.mark.slow) for name in EIGHT]])
def test_every_recipe_makes_a_layer(name, bits):
  """From rows alone, at the bits of the rest and at those of exceptions."""
  recipe = recipes.get(name)
  rows = silu(16)
  gram = np.float64(rows).T @ rows / len(rows)
  seen = Seen(rows.ravel(), float(rows.min()), float(rows.max()), rows,
              np.abs(rows).max(0), gram)
  kernel = RNG.normal(size=(16, 8)).astype(np.float32)
  layer = calibrate_lib.fit_layer(recipe, 'conv', seen, kernel, bits, bits)
  assert layer.weight.bits == layer.act.bits == bits
  assert layer.kind == 'AAL'
  w = kernel if layer.around is None else np.asarray(
      layer.around.residual(kernel))
  for quantizer, x, axis in ((layer.weight, w, -2), (layer.act, rows, -1)):
    back = np.asarray(fit_lib.restored(quantizer, x, axis))
    noise = ((back - x)**2).mean() / (x**2).mean()
    # 4 bits are good for 10 dB of anything, 8 for 30.
    assert noise < 10.0**(-1 if bits == 4 else -3)
