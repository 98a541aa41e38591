"""Powers of two for channels of an input: recipes with '+smooth'."""

import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax.quant import around as around_lib
from msfp_jax.quant import calibrate as calibrate_lib
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import recipes
from msfp_jax.quant import smoothing
from msfp_jax.quant.fit import Seen

RNG = np.random.default_rng(0)
# Of eight channels, two of which a thousandth part of the others' and carry as
# much, by large weights; one is never anything but 0.
WIDTHS = np.float32([1, 1e-3, 1, 1, 1e-3, 1, 0, 1])
ROWS = WIDTHS * np.float32(RNG.normal(size=(4000, 8)))
KERNEL = np.float32(RNG.normal(size=(8, 6))) / np.where(WIDTHS, WIDTHS, 1)[
    :, None]


def seen(rows):
  return Seen(values=rows.ravel(), minimum=float(rows.min()),
              maximum=float(rows.max()), rows=rows,
              channel_maxima=np.abs(rows).max(0),
              gram=np.float64(rows).T @ rows / len(rows))


def fitted(name, rows=ROWS, kernel=KERNEL):
  return calibrate_lib.fit_layer(
      recipes.get(name), 'r', seen(rows), kernel, 4, 4)


def loss_of(layer, rows=ROWS, kernel=KERNEL):
  """Of the product that runs, over what it should be, in float64."""
  around = layer.around
  weight = (layer.rounded.weight.unpacked() if layer.rounded else
            layer.weight.quantize(
                jnp.asarray(kernel if around is None
                            else around.residual(kernel)), -2))
  x = rows if around is None else around.input(rows)
  product = np.float64(layer.act.fake_quant(jnp.asarray(x))) @ np.float64(
      weight.dequantize())
  expected = np.float64(rows) @ np.float64(kernel)
  return np.sum((product - expected)**2) / np.sum(expected**2)


@pytest.mark.parametrize('name', ['msfp', 'int', 'msfp+gptq', 'int4_minmax'])
def test_small_channels_that_count_are_not_lost(name):
  plain, smooth = fitted(name), fitted(f'{name}+smooth')
  scales = np.asarray(smooth.around.smooth)
  # Powers of two, exactly: neither input nor weights are rounded.
  assert (np.exp2(np.round(np.log2(scales))) == scales).all()
  assert scales[[0, 2, 3]].min() > 8 * scales[[1, 4]].max()
  np.testing.assert_array_equal(
      smooth.around.input(ROWS) * scales, jnp.asarray(ROWS))
  assert loss_of(smooth) < 0.2 * loss_of(plain)


def test_where_it_would_lose_the_layer_stays_as_it_is():
  """A channel of one large value: for its sake all weights would be coarser."""
  rows = np.float32(RNG.normal(size=(4000, 8)))
  rows[:, 0] *= 1e-3
  rows[7, 0] = 100
  kernel = np.float32(RNG.normal(size=(8, 6)))
  tried = []

  def error(around):
    tried.append(around)
    return real_error(around)

  trial = around_lib.Trial(
      seen(rows), kernel, lambda w: np.asarray(fit_lib.restored(
          recipes.get('int').weight(Seen.of_weights(w), 4, -2).quantizer, w,
          -2)), lambda moved: moved.rows)
  real_error, found = trial.error, smoothing.Smoothing()
  object.__setattr__(trial, 'error', error)
  chosen = found(trial)
  # Inputs stay exact, so that all there is to gain is the weights'.
  assert len(tried) > 2 and chosen.smooth is None


def test_an_input_after_silu_keeps_its_zero_point():
  """Its tail ends elsewhere once channels are scaled, and not at SiLU's."""
  x = RNG.normal(size=(4000, 8)) * np.array([4, 1, 4, 1, 4, 4, 1, 1])
  rows = np.float32(x / (1 + np.exp(-x)) * np.array(
      [1, 0.05, 1, 0.05, 1, 1, 0.05, 1]))
  kernel = np.float32(RNG.normal(size=(8, 6))) / rows.std(0)[:, None]
  found = calibrate_lib.fit_layer(
      recipes.get('msfp+smooth'), 'r', seen(rows), kernel, 4, 4)
  assert found.kind == 'AAL' and found.around.smooth is not None
  moved = np.asarray(found.around.input(rows))
  assert not found.act.fmt.signed
  # Lower than any zero point that is searched for SiLU itself.
  assert moved.min() < -0.4 and found.act.zero_point < -0.3
  plain = calibrate_lib.fit_layer(
      recipes.get('msfp'), 'r', seen(rows), kernel, 4, 4)
  assert loss_of(found, rows, kernel) < 0.5 * loss_of(plain, rows, kernel)


@pytest.mark.parametrize('name', ['svdquant+smooth', 'hadamard+smooth'])
def test_where_its_place_is_taken_it_is_refused(name):
  with pytest.raises(ValueError, match="stands around its products already"):
    recipes.get(name)
