"""DualScale: its search, its product, and what training moves of it."""

import jax
import jax.numpy as jnp
import kernel_oracle
import numpy as np
import pytest

from msfp_jax import kernels
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import geometry
from msfp_jax.quant import serialize
from msfp_jax.quant.dual_scale import DualScale
from msfp_jax.quant.dual_scale import FitDualScale
from msfp_jax.quant.fit import Seen
from msfp_jax.quant.numbers import formats_of_width
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.quantizers import Static

E2M1 = FPFormat.parse('E2M1')
QUANTIZER = DualScale(E2M1, jnp.float32(0.5), jnp.float32(0.125))


def silu(seed, *shape):
  x = 2 * np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  return x / (1 + np.exp(-x))


def by_hand(x, quantizer):
  """Each sign by itself, float64."""
  scale, ratio = float(quantizer.scale), float(quantizer.negative)
  side = lambda scale: kernel_oracle.fake_quant(x, quantizer.fmt, scale)
  return np.where(x < 0, side(scale * ratio), side(scale))


def test_each_sign_has_its_scale():
  x = silu(0, 5, 6)
  tensor = QUANTIZER.quantize(x)
  expected = by_hand(x, QUANTIZER)
  np.testing.assert_array_equal(tensor.dequantize(), np.float32(expected))
  np.testing.assert_array_equal(QUANTIZER.fake_quant(x), tensor.dequantize())
  assert tensor.nbits == 30 * 4 + 2 * 32  # both scales


def test_the_search_finds_the_two_scales_of_least_error():
  """No pair of a fine grid, in any format, does better than by 2 %."""
  x = silu(1, 2000)
  fitted = FitDualScale()(Seen(values=x), 4, -1)
  least = {}
  for fmt in formats_of_width(4, signed=True):
    for positive, part in ((True, x[x >= 0]), (False, x[x < 0])):
      errors = [((kernel_oracle.fake_quant(part, fmt, c / fmt.max) - part)**2
                 ).sum() for c in np.linspace(.3, 1.1, 81) * abs(part).max()]
      least[fmt, positive] = min(errors)
  best = min(least[fmt, True] + least[fmt, False]
             for fmt in formats_of_width(4, signed=True)) / x.size
  assert fitted.mse <= 1.02 * best
  error = np.mean((by_hand(x, fitted.quantizer) - x)**2)
  np.testing.assert_allclose(fitted.mse, error, rtol=1e-4)
  # What it is for: one scale for both signs is worse.
  assert fitted.mse < 0.8 * fit_lib.SIGNED.search(x, 4).mse


@pytest.mark.parametrize('x', [
    np.abs(silu(0, 64)), -np.abs(silu(0, 64)), np.zeros(64, np.float32)],
                         ids=['positive', 'negative', 'zeros'])
def test_inputs_of_one_sign(x):
  quantizer = FitDualScale()(Seen(values=x), 4, -1).quantizer
  assert float(quantizer.scale) > 0 and float(quantizer.negative) > 0
  assert np.isfinite(quantizer.quantize(x[None]).dequantize()).all()


@pytest.mark.parametrize('window', [(), (1, 1), (3, 3)], ids=str)
def test_its_product_is_a_sum_of_two(window):
  """Within float32's rounding of float64, simulated and packed."""
  rng = np.random.default_rng(2)
  x = silu(3, 2, 5, 5, 6)
  weight = Static(E2M1, rng.uniform(.1, .2, (1,) * (len(window) + 1) + (4,))
                  .astype(np.float32))
  kernel = rng.normal(size=(*window, 6, 4)).astype(np.float32)
  bias = rng.normal(size=4).astype(np.float32)
  tensor = weight.quantize(kernel, axis=-2)
  place = geometry.resolve(x.shape, window) if window else None
  found = [kernels.run(QLayer(w, QUANTIZER, bias), x, place)
           for w in (tensor, tensor.packed())]
  padded = np.pad(by_hand(x, QUANTIZER), [(0, 0), *[(1, 1)] * 2, (0, 0)]
                  if window == (3, 3) else [(0, 0)] * 4)
  w = np.float64(tensor.dequantize())
  w = w.reshape(*(window or (1, 1)), 6, 4)
  expected = bias + sum(
      padded[:, i:i + 5, j:j + 5] @ w[i, j]
      for i in range(w.shape[0]) for j in range(w.shape[1]))
  for out in found:
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(*found)


def test_training_moves_both_scales():
  """Gradients by the rule of `fake_quant`, each sign's values for its own."""
  x, g = silu(4, 7, 9), np.random.default_rng(5).normal(size=(7, 9))

  def loss(offsets):
    return jnp.sum(g * QUANTIZER.moved(offsets).fake_quant(x))

  offsets = QUANTIZER.offsets()
  jax.tree.map(np.testing.assert_array_equal, QUANTIZER.moved(offsets),
               QUANTIZER)
  gradient = jax.grad(loss)(offsets)
  scales = np.where(x < 0, 0.0625, 0.5)
  u = np.float64(x) / scales
  outside = np.abs(u) > E2M1.max
  q = by_hand(x, QUANTIZER) / scales
  # d/dlog(scale) = scale (q - u), or scale q outside.
  each = g * scales * np.where(outside, q, q - u)
  np.testing.assert_allclose(gradient['log_scale'], each.sum(), rtol=1e-4)
  np.testing.assert_allclose(gradient['log_negative'], each[x < 0].sum(),
                             rtol=1e-4)


def test_it_goes_into_a_file_and_back():
  back = serialize.quantizer_from_dict(serialize.quantizer_to_dict(QUANTIZER))
  jax.tree.map(np.testing.assert_array_equal, back, QUANTIZER)
  assert back.fmt == E2M1


def test_what_it_is_not_for():
  with pytest.raises(ValueError, match='UE2M2 has no negative values'):
    DualScale(FPFormat.parse('UE2M2'), jnp.float32(1), jnp.float32(1))
  with pytest.raises(ValueError, match='for inputs, not for weights'):
    QUANTIZER.quantize(np.ones((4, 3), np.float32), axis=-2)
  with pytest.raises(ValueError, match='DualScale is for inputs'):
    FitDualScale()(Seen.of_weights(np.ones((4, 3), np.float32)), 4, -2)
  row = serialize.quantizer_to_dict(QUANTIZER)
  with pytest.raises(ValueError, match='negative that is not positive'):
    serialize.quantizer_from_dict(row | {'negative': {'value': -1.0}})
