"""What stands around a product: smoothing, rotation, low-rank branches."""

import jax.numpy as jnp
from kernel_cases import jit
import kernel_oracle
import numpy as np
import pytest
from scipy import linalg

from msfp_jax import kernels
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import geometry as geometry_lib
from msfp_jax.quant.around import Around
from msfp_jax.quant.around import hadamard
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Static

WIDTH, OUT = 24, 6


@pytest.mark.parametrize('size', [1, 2, 8, 64])
def test_hadamard_is_sylvesters(size):
  """It is scipy's matrix, made orthonormal, on every block by itself."""
  x = np.random.default_rng(0).normal(size=(3, 192)).astype(np.float32)
  matrix = linalg.hadamard(size) / np.sqrt(size)
  expected = (x.reshape(3, -1, size) @ matrix).reshape(3, 192)
  np.testing.assert_allclose(hadamard(x, size), expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(hadamard(hadamard(x, size), size), x, rtol=1e-5,
                             atol=1e-6)


@pytest.mark.parametrize('size', [0, 3, 6, 16, -2])
def test_rotations_that_there_are_not(size):
  with pytest.raises(ValueError, match=f'rotation of {size} channels: must be '
                     'a power of two that divides 24'):
    hadamard(np.ones((2, 24), np.float32), size)


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def arounds(window):
  smooth = np.exp(draw(1, WIDTH))
  branch = {'down': jnp.bfloat16(draw(2, *window, WIDTH, 3)),
            'up': jnp.bfloat16(draw(3, 3, OUT))}
  return {'smoothing': Around(smooth=smooth), 'rotation': Around(rotation=8),
          'a branch': Around(**branch),
          'all': Around(smooth=smooth, rotation=4, **branch)}


KINDS = {'dense': ((5, WIDTH), ()), 'conv': ((2, 5, 4, WIDTH), (3, 3)),
         '1x1': ((2, 3, 3, WIDTH), (1, 1))}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', arounds(()))
def test_without_quantization_a_layer_is_itself(kind, name):
  """Whatever stands around, the layer's own result comes out.

  Weights are multiples of what 8 bits hold once moved: none is lost.
  """
  shape, window = KINDS[kind]
  around = arounds(window)[name]
  geometry, x = None, draw(4, *shape)
  if window:
    geometry = geometry_lib.resolve(shape, window, 1, 'SAME')
  # W' of integers up to 127; the kernel is what moves to it.
  moved = np.random.default_rng(5).integers(
      -127, 128, (*window, WIDTH, OUT)).astype(np.float32)
  kernel = np.float64(moved)
  if around.down is not None:
    kernel = kernel + np.float64(around.down) @ np.float64(around.up)
  if around.rotation:
    matrix = linalg.block_diag(*[
        linalg.hadamard(around.rotation) / np.sqrt(around.rotation)] * (
            WIDTH // around.rotation))
    kernel = np.einsum('ij,...jo->...io', matrix, kernel)
  if around.smooth is not None:
    kernel = kernel / np.float64(around.smooth)[:, None]
  np.testing.assert_allclose(
      around.residual(np.float32(kernel)), moved, rtol=1e-5, atol=1e-4)
  weight = Static(FPFormat.parse('E1M6'), np.float32(32)).quantize(
      moved, axis=-2)
  np.testing.assert_array_equal(weight.dequantize(), moved)
  layer = QLayer(weight, Full(), draw(6, OUT), around)
  expected = x @ kernel if geometry is None else kernel_oracle.conv(
      x, kernel, geometry.strides, geometry.padding, geometry.dilation)
  expected = expected + layer.bias
  run = jit(lambda x, layer: [kernels.run(layer, x, geometry), kernels.run(
      layer.replace(weight=packed), x, geometry)])
  packed = weight.packed()
  for found in run(x, layer):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=3e-6 * np.abs(
        expected).max())


def test_the_input_is_smoothed_before_it_is_rotated():
  around = Around(smooth=np.exp(draw(1, WIDTH)), rotation=8)
  x = draw(4, 5, WIDTH)
  np.testing.assert_allclose(
      around.input(x), hadamard(x / around.smooth, 8), rtol=1e-6, atol=1e-6)
  assert around.moves_input and not Around(
      down=np.ones((2, 1)), up=np.ones((1, 2))).moves_input


@pytest.mark.slow
def test_quantizers_are_fitted_to_what_the_product_sees():
  around = Around(smooth=np.exp(draw(1, WIDTH)), rotation=8)
  rows = draw(4, 50, WIDTH)
  taps = draw(5, 80, 2 * WIDTH)  # of a window of 2
  seen = around.seen(fit_lib.Seen(
      values=rows.ravel(), rows=rows, minimum=-9.0, maximum=9.0,
      gram=taps.T @ taps))
  matrix = linalg.block_diag(*[linalg.hadamard(8) / np.sqrt(8)] * 3)
  expected = (rows / around.smooth) @ matrix
  np.testing.assert_allclose(seen.rows, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(seen.values, expected.ravel(), rtol=1e-5,
                             atol=1e-5)
  np.testing.assert_allclose(
      (seen.minimum, seen.maximum), (expected.min(), expected.max()), rtol=1e-5)
  np.testing.assert_allclose(
      seen.channel_maxima, np.abs(expected).max(0), rtol=1e-5)
  moved = (taps.reshape(80, 2, WIDTH) / around.smooth) @ matrix
  moved = moved.reshape(80, -1)
  np.testing.assert_allclose(seen.gram, moved.T @ moved, rtol=1e-4, atol=1e-4)
  # Without whole vectors nothing is known of the moved input.
  assert around.seen(fit_lib.Seen(
      values=rows.ravel(), minimum=-9.0, maximum=9.0)) == fit_lib.Seen()
  same = fit_lib.Seen(values=rows.ravel())
  assert Around().seen(same) is same


def test_bits_are_counted():
  around = arounds((3, 3))['all']
  assert around.nbits == WIDTH * 32 + 9 * WIDTH * 3 * 16 + 3 * OUT * 16
  weight = Static(FPFormat.parse('E2M1'), np.float32(1)).quantize_banks(
      np.ones((2, 3, 3, WIDTH, OUT), np.float32))
  layer = QLayer(weight, Static(FPFormat.parse('E2M1'), np.float32(1)),
                 np.ones(OUT, np.float32), around)
  assert layer.num_banks == 2
  assert layer.nbits == (
      around.nbits + 2 * 9 * WIDTH * OUT * 4 + 32 + OUT * 32 + 32)
