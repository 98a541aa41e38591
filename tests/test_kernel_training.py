"""Gradients of layers in training, against those of the plain product."""

import jax
import jax.numpy as jnp
import kernel_cases
import kernel_oracle
import numpy as np
import pytest

from msfp_jax import kernels
from msfp_jax.quant import geometry as geometry_lib
from msfp_jax.quant.around import Around
from msfp_jax.quant.around import hadamard
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qlayer import Latent
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Static

pytestmark = pytest.mark.gpu

E2M1, UE2M2 = FPFormat.parse('E2M1'), FPFormat.parse('UE2M2')
INT = FPFormat.parse('UE1M3')
RNG = np.random.default_rng(0)
draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)
WIDTH, OUT = 8, 5
AROUND = {
    'nothing': Around(),
    'smoothing': Around(smooth=np.float32(np.exp(0.3 * draw(WIDTH)))),
    'rotation': Around(rotation=4),
    'a branch': {'rank': 2},
    'all': {'rank': 2, 'rotation': 8,
            'smooth': np.float32(np.exp(0.3 * draw(WIDTH)))},
}
QUANTIZERS = {  # of weights `[..., I, O]`, of inputs
    'static': (Static(E2M1, np.float32(np.exp(0.3 * draw(1, OUT)) / 3)),
               Static(UE2M2, np.float32(0.3), np.float32(-0.8))),
    'static INT': (Static(INT, np.float32(np.exp(0.3 * draw(1, OUT))),
                          draw(1, OUT) - 1),
                   Static(INT, np.float32(1.5), np.float32(-1))),
    'block': (Block(E2M1, group=4), Block(INT, 'token')),
    'static, block': (Static(E2M1, np.float32(np.exp(
        0.3 * draw(1, OUT)) / 3)), Block(E2M1, 'image')),
    'full weights': (Full(), Static(E2M1, np.float32(0.4))),
    'full inputs': (Block(E2M1, group=4), Full()),
}
CONV = geometry_lib.resolve((2, 4, 4, WIDTH), (3, 3), strides=2, padding='SAME')
KINDS = {'dense': ((3, WIDTH), (), None), 'conv': ((2, 4, 4, WIDTH), (3, 3),
                                                   CONV)}


def make(kind, quantizers, around):
  """Makes a layer in training and its input."""
  x_shape, window, _ = KINDS[kind]
  weight, act = QUANTIZERS[quantizers]
  if isinstance(weight, Static):  # [1, O] -> [1, ..., O]
    wide = lambda part: None if part is None else part.reshape(
        (1,) * (len(window) + 1) + (-1,))
    weight = weight.replace(scale=wide(weight.scale),
                            zero_point=wide(weight.zero_point))
  around = AROUND[around]
  if isinstance(around, dict):
    options = dict(around)
    rank = options.pop('rank')
    around = Around(**options, down=jnp.bfloat16(draw(*window, WIDTH, rank)),
                    up=jnp.bfloat16(draw(rank, OUT)))
  return QLayer(Latent(draw(*window, WIDTH, OUT), weight), act, draw(OUT),
                around), draw(*x_shape)


def plain(layer, x, geometry):
  """The formula: fake-quantized values through XLA's own product."""
  around, latent = layer.around, layer.weight
  seen = x if around.smooth is None else x / around.smooth
  if around.rotation:
    seen = hadamard(seen, around.rotation)
  v, w = layer.input.fake_quant(seen), latent.quantizer.fake_quant(
      latent.kernel, axis=-2)

  def product(x, w):
    if geometry is None:
      return jnp.dot(x, w, precision='highest')
    return jax.lax.conv_general_dilated(
        x, w, geometry.strides, geometry.padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision='highest')

  y = product(v, w) + layer.bias
  if around.down is not None:
    y += jnp.dot(product(seen, around.down.astype(jnp.float32)),
                 around.up.astype(jnp.float32), precision='highest')
  return y


CASES = [
    pytest.param(kind, quantizers, around, marks=pytest.mark.slow
                 if kind == 'conv' and (quantizers, around) != (
                     'static', 'nothing') else ())
    for kind in KINDS for quantizers in QUANTIZERS for around in AROUND
    if around == 'nothing' or quantizers == 'static' or (
        quantizers == 'block' and around == 'all')]


@pytest.mark.parametrize('kind, quantizers, around', CASES)
def test_gradients_are_those_of_the_plain_product(kind, quantizers, around):
  """So are values, to rounding: of kernel, ranges, bias, branch and input."""
  layer, x = make(kind, quantizers, around)
  geometry = KINDS[kind][2]
  g = draw(*jax.eval_shape(lambda: plain(layer, x, geometry)).shape)

  @kernel_cases.jit
  def both(layer, x, g):
    def of(function):
      y, pullback = jax.vjp(
          lambda layer, x: function(layer, x, geometry), layer, x)
      return y, pullback(g)

    return of(kernels.run), of(plain)

  (y, found), (wanted, expected) = both(layer, x, g)
  bound = lambda a: {'rtol': 1e-5, 'atol': 2e-6 * np.abs(np.float32(a)).max()}
  np.testing.assert_allclose(y, wanted, **bound(wanted))
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  leaves = jax.tree.leaves(expected)
  assert len(leaves) >= 3 and all(np.any(leaf) for leaf in leaves)
  for one, other in zip(jax.tree.leaves(found), leaves, strict=True):
    np.testing.assert_allclose(
        np.float32(one), np.float32(other), **bound(other))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('quantizers', ['static', 'static INT', 'block',
                                        'static, block'])
def test_training_sees_what_packed_layers_compute(kind, quantizers):
  """Forward it is the packed layer, bit for bit where sums are exact."""
  layer, x = make(kind, quantizers, 'all')
  geometry = KINDS[kind][2]
  weight = layer.weight.quantizer.quantize_banks(
      layer.weight.kernel[None]).bank(0)
  run = kernel_cases.jit(lambda layer, x: kernels.run(
      layer, x, geometry, implementation='reference'))
  packed = run(layer.replace(weight=weight.packed()), x)
  trained = kernel_cases.jit(lambda layer, x: kernels.run(
      layer, x, geometry))(layer, x)
  np.testing.assert_allclose(
      trained, packed, rtol=1e-6, atol=1e-6 * np.abs(packed).max())
  if quantizers != 'block':
    np.testing.assert_array_equal(trained, packed)


def test_values_are_those_of_float64():
  """The value in training is the oracle's, not only the formula's in float32.
  """
  layer, x = make('conv', 'static INT', 'nothing')
  w, act = layer.weight, layer.input
  expected = kernel_oracle.conv(
      kernel_oracle.quantized(x, act, -1),
      kernel_oracle.quantized(w.kernel, w.quantizer, -2), CONV.strides,
      CONV.padding, CONV.dilation) + layer.bias
  np.testing.assert_allclose(
      kernels.run(layer, x, CONV), expected, rtol=1e-6,
      atol=1e-6 * np.abs(expected).max())


def test_low_precision_inputs_get_gradients_of_their_dtype():
  layer, x = make('dense', 'static', 'nothing')
  x = jnp.asarray(x, jnp.bfloat16)
  y, pullback = jax.vjp(lambda x: kernels.run(layer, x), x)
  assert y.dtype == jnp.bfloat16
  assert pullback(y)[0].dtype == jnp.bfloat16
