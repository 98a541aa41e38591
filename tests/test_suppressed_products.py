"""QuaRTZ's product: the paper's, and what runs, packed and simulated."""

import jax
import jax.numpy as jnp
from kernel_cases import jit
from kernel_cases import prepared
import kernel_oracle
import numpy as np
import pytest

from msfp_jax import kernels
from msfp_jax.kernels import carriers
from msfp_jax.kernels import choice
from msfp_jax.kernels import product
from msfp_jax.kernels import shifted
from msfp_jax.quant import geometry as geometry_lib
from msfp_jax.quant import recipes
from msfp_jax.quant.block import Block
from msfp_jax.quant.fit import Seen
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.quantizers import quantize
from msfp_jax.quant.suppress import first_stage
from msfp_jax.quant.suppress import quartz

pytestmark = pytest.mark.optimized

INT8, UINT8 = FPFormat.parse('E1M6'), FPFormat.parse('UE1M7')
INT4 = FPFormat.parse('E1M2')
RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(2, 5, 4, 48)))
W = np.float32(RNG.normal(size=(3, 3, 48, 6)))


def integers_of(tensor):
  """Decompressed integers, int64, from codes by the definition."""
  codes = np.int64(tensor.codes())
  if tensor.fmt.signed:
    codes = np.where(codes & 8, -1, 1) * (codes & 7)
  if tensor.shift is None:
    return codes
  shift = np.int64(tensor.shift).repeat(tensor.shift_group, tensor.axis)
  index = [slice(None)] * codes.ndim
  index[tensor.axis] = slice(codes.shape[tensor.axis])
  return codes << shift[tuple(index)]


def rows(name, length):
  """Inputs `[5, length]`: random, or with the largest magnitudes there are."""
  x = np.float32(RNG.standard_t(2, size=(5, length)))
  return x if name == 'random' else np.where(x < 0, -1, 1).astype(np.float32)


PRODUCTS = {
    'plain weights': (quartz(4), Block(INT4, 'channel')),
    'weights too': (quartz(4), quartz(4, first_stage(shared='channel'))),
    'of other groups': (
        quartz(4, group=32), quartz(4, first_stage(shared='channel'), group=8)),
    'truncated': (quartz(4, rounding='truncate'), Block(INT4, 'channel')),
    'unsigned': (quartz(4, first_stage(signed=False)),
                 quartz(4, first_stage(shared='channel')))}


@pytest.mark.parametrize('case, length', [
    ('random', 100), ('worst', 40_000)])
@pytest.mark.parametrize('name', PRODUCTS)
def test_the_papers_product_is_that_of_decompressed_integers(
    name, case, length):
  """Sums by group, shifted, against one sum of int8; and the whole layer."""
  of_x, of_w = PRODUCTS[name]
  x = rows(case, length)
  if case == 'worst':
    # Equal signs, so that nothing cancels: 112 x 112 x 40,000 is a quarter of
    # what int32 holds.
    w = np.tile(x[:1].T, (1, 6)) * np.float32([1, 1, -1, -1, 1, 1])
  else:
    w = rows(case, length).T.repeat(2, axis=1)[:, :6]
  x, w = quantize(of_x, x, -1), quantize(of_w, w, -2)
  found = jit(shifted.sums)(x, w)
  exact = integers_of(x) @ integers_of(w)
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, exact)
  # What runs: int8 carries all integers, less 128 where they are unsigned.
  a, b = jit(lambda *tensors: [
      carriers.operand(tensor, 'int8').v for tensor in tensors])(x, w)
  sums = jnp.matmul(a, b, preferred_element_type=jnp.int32)
  offset = 0 if x.fmt.signed else 128
  np.testing.assert_array_equal(
      sums + offset * integers_of(w).sum(0), exact)
  assert a.dtype == b.dtype == jnp.int8
  if case == 'worst' and name == 'weights too':
    assert np.abs(exact).max() == 112 * 112 * length


def layer_of(kernel, weights, inputs):
  bias = np.float32(np.arange(kernel.shape[-1]))
  return QLayer(quantize(weights, kernel, -2), inputs, bias)


@pytest.mark.parametrize('weights', ['plain weights', 'weights too'])
@pytest.mark.parametrize('pointwise', [False, True])
def test_a_dense_layer_is_one_product_of_int8(weights, pointwise):
  """The whole layer by the paper's product, and by what runs: the same bits."""
  inputs, of_w = PRODUCTS[weights]
  kernel, x = W[0, 0], X
  geometry = None
  if pointwise:
    kernel = W[:1, :1]
    geometry = geometry_lib.resolve(X.shape, (1, 1))
  layer = layer_of(kernel, of_w, inputs)
  run = jit(lambda x, layer: kernels.run(
      layer, x, geometry, implementation='xla', carrier='int8'))
  text = run.lower(x, layer).as_text()
  # On CPUs as a convolution of one place (see `compiler.product_of_bytes`).
  products = [line for line in text.splitlines()
              if 'dot_general' in line or 'stablehlo.convolution' in line]
  assert len(products) == 1
  types = products[0].rpartition(' : ')[2]
  assert types.count('xi8>') == 2 and types.rstrip().endswith('xi32>')

  def papers(x, layer):
    tensor = layer.input.quantize(x)
    weight = layer.weight if geometry is None else layer.weight.bank((0, 0))
    weight = weight.replace(
        data=layer.weight.data.reshape(layer.weight.data.shape[-2:]),
        shift=None if layer.weight.shift is None
        else layer.weight.shift.reshape(layer.weight.shift.shape[-2:]))
    return product.separable(
        *product.operands(tensor, layer.weight, geometry, 'int8'), layer.bias,
        geometry, lambda v, w: shifted.sums(tensor, weight))

  np.testing.assert_array_equal(run(x, layer), jit(papers)(x, layer))


@pytest.mark.slow
@pytest.mark.parametrize('recipe, part', [
    ('quartz', 'aal'), ('quartz_weights', 'nal'), ('quartz', 'nal'),
    ('quartz_weights', 'aal')])
def test_recipes_run_packed_as_simulated(recipe, part):
  """3x3 and dense, by the door's own choice and in int8, against float64."""
  of = recipes.get(recipe)
  quantizer = lambda fit, axis: fit(Seen(), 4, axis).quantizer
  inputs = quantizer(getattr(of, part), -1)
  for kernel, x, geometry in (
      (W, X, geometry_lib.resolve(X.shape, (3, 3), padding='SAME')),
      (W[0, 0], X[0, 0], None)):
    layer = layer_of(kernel, quantizer(of.weight, -2), inputs)
    packed = layer.replace(weight=layer.weight.packed())
    # As packed models have them: prepared, with an axis of banks before.
    ready = kernels.prepare(packed.replace(weight=jax.tree.map(
        lambda part: np.asarray(part)[None], packed.weight))).at(0)
    run = jit(lambda x, layer, g=geometry: kernels.run(layer, x, g))
    expected = run(x, layer)
    np.testing.assert_array_equal(run(x, packed), expected)
    np.testing.assert_array_equal(run(x, ready), expected)
    tensors = quantize(inputs, x, -1), layer.weight
    a, b = (np.float64(tensor.dequantize()) for tensor in tensors)
    exact = layer.bias + (a @ b if geometry is None else kernel_oracle.conv(
        a, b, padding=geometry.padding, strides=(1, 1), dilation=(1, 1)))
    np.testing.assert_allclose(expected, exact, rtol=1e-5, atol=1e-4)
    found = jit(lambda x, layer, g=geometry: kernels.run(
        layer, x, g, implementation='xla', carrier='int8'))(x, ready)
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('implementation, weights', [
    ('mosaic_tpu', 'plain weights'), ('mosaic_gpu', 'plain weights'),
    ('mosaic_tpu', 'weights too'), ('mosaic_gpu', 'weights too')])
def test_kernels_take_its_inputs_and_weights(implementation, weights):
  inputs, of_w = PRODUCTS[weights]
  layer = layer_of(W[0, 0], of_w, inputs)
  packed = layer.replace(weight=layer.weight.packed())
  for ready in (packed, prepared(packed, implementation)):
    assert choice.why_not(implementation, ready, X.shape) is None
    assert choice.pick_carrier(packed, X.shape, implementation) == 'int8'
