"""Powers of two for channels of an input: recipes with '+smooth'."""

import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax.quant import calibrate as calibrate_lib
from msfp_jax.quant import recipes
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


def test_where_nothing_is_gained_nothing_is_smoothed():
  rows = np.float32(RNG.normal(size=(4000, 8)))
  kernel = np.float32(RNG.choice([-1, 1], size=(8, 6)))
  layer = fitted('msfp+smooth', rows, kernel)
  assert layer.around.smooth is None or loss_of(layer, rows, kernel) <= loss_of(
      fitted('msfp', rows, kernel), rows, kernel)


@pytest.mark.parametrize('name', ['svdquant+smooth', 'hadamard+smooth'])
def test_where_its_place_is_taken_it_is_refused(name):
  with pytest.raises(ValueError, match="stands around its products already"):
    recipes.get(name)
