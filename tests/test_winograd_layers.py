"""Which layers `winograd` computes, and that they stay as they are."""

import functools

import jax
import jax.numpy as jnp
import kernel_cases
import marks
import numpy as np
import pytest

from msfp_jax import kernels
from msfp_jax.kernels import cpu
from msfp_jax.kernels import winograd
from msfp_jax.quant import geometry as geometry_lib
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.quantizers import Static


def wide_layer(weight, act, zero_point=None):
  """Makes a layer of 64 to 64 channels, not packed and prepared."""
  rng = np.random.default_rng(3)
  weights = Static(FPFormat.parse(weight), jnp.linspace(0.1, 0.3, 64).reshape(
      1, 1, 1, -1))
  layer = QLayer(
      weights.quantize(np.float32(rng.normal(size=(3, 3, 64, 64))), axis=-2),
      Static(FPFormat.parse(act), np.float32(0.3), zero_point),
      np.float32(rng.normal(size=64)))
  return layer, kernel_cases.prepared(kernel_cases.packed(layer))


def convolve(x, layer, implementation=None, carrier=None, strides=1,
             padding='SAME', dilation=1):
  geometry = geometry_lib.resolve(x.shape, (3, 3), strides, padding, dilation)
  return kernels.run(layer, x, geometry, implementation=implementation,
                     carrier=carrier)


@pytest.fixture
def calls(monkeypatch):
  """Records carrier and parts at every call of `winograd.conv`."""
  found, conv = [], winograd.conv

  def record(algorithm, x, weights, parts, *functions):
    found.append((algorithm.carrier, parts))
    return conv(algorithm, x, weights, parts, *functions)

  monkeypatch.setattr(winograd, 'conv', record)
  return found


@pytest.mark.optimized
@pytest.mark.usefixtures('on_cpu')
@pytest.mark.parametrize('fastest', marks.quick(['int8'], ['f32', 'int8']))
@pytest.mark.parametrize('weight, act, zero_point, expected', [
    ('E2M1', 'E2M1', None, {'f32': ('f32', 1), 'int8': ('int8', 1)}),
    # Beyond int8 when transformed: the larger tiles of float32 in its place.
    ('E2M1', 'UE3M1', np.float32(-0.5), {
        'f32': ('f32', 4), 'int8': ('f32', 4)}),
    # Its offset is a zero of the weights, for which there is no room.
    ('UE3M1', 'E2M1', None, {}),
    # Levels that are no integers in float32, or too large.
    ('E5M2', 'E2M1', None, {}), ('E3M0', 'UE4M0', None, {})])
def test_prepared_layers_equal_the_reference(
    monkeypatch, calls, fastest, weight, act, zero_point, expected):
  """Prepared layers equal the reference bit for bit."""
  monkeypatch.setattr(cpu, 'carrier', lambda products: fastest)
  layer, prepared = wide_layer(weight, act, zero_point)
  x = jnp.asarray(
      np.random.default_rng(4).normal(size=(16, 16, 16, 64)), jnp.float32)
  reference = jax.jit(functools.partial(
      convolve, implementation='reference'))(x, layer)
  assert not calls
  actual = jax.jit(lambda x, layer: convolve(x, layer))(x, prepared)
  assert calls == [expected[fastest]] if expected else not calls
  np.testing.assert_array_equal(actual, reference)


@pytest.mark.usefixtures('on_cpu')
@pytest.mark.parametrize('options', [
    {'strides': 2}, {'padding': 'VALID'}, {'padding': ((0, 2), (1, 1))},
    {'dilation': 2, 'padding': ((1, 1), (1, 1))}, {'carrier': 'bf16'},
    {'implementation': 'reference'}], ids=str)
@pytest.mark.parametrize('fastest', ['f32', 'int8'])
def test_other_convolutions_are_plain(monkeypatch, calls, fastest, options):
  monkeypatch.setattr(cpu, 'carrier', lambda products: fastest)
  _, prepared = wide_layer('E2M1', 'E2M1')
  jax.eval_shape(lambda x: convolve(x, prepared, **options),
                 jax.ShapeDtypeStruct((64, 8, 8, 64), jnp.float32))
  assert not calls


@pytest.mark.usefixtures('on_cpu')
@pytest.mark.parametrize('fastest, images, is_taken', [
    ('f32', 16, True), ('f32', 15, False), ('int8', 4, True),
    ('int8', 3, False)])
def test_few_pixels_do_not_pay_for_the_weights(
    monkeypatch, calls, fastest, images, is_taken):
  monkeypatch.setattr(cpu, 'carrier', lambda products: fastest)
  _, prepared = wide_layer('E2M1', 'E2M1')
  jax.eval_shape(lambda x: convolve(x, prepared),
                 jax.ShapeDtypeStruct((images, 8, 8, 64), jnp.float32))
  assert bool(calls) == is_taken
