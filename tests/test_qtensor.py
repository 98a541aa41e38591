"""Layers as kernels take them: codes, scales and what they may be."""

import jax.numpy as jnp
from kernel_cases import SOME
import numpy as np
import pytest

from msfp_jax import kernels
from msfp_jax.kernels import carriers
from msfp_jax.quant import quantizers
from msfp_jax.quant.numbers import FPFormat

E2M1 = FPFormat.parse('E2M1')


@pytest.mark.parametrize('fmt, packing', [
    ('E2M1', 'nibbles'), ('E1M1', 'nibbles'), ('UE2M2', 'nibbles'),
    ('E3M1', 'bytes'), ('E4M3', 'bytes')])
def test_packed_weights(fmt, packing):
  """Packed weights have the right size, codes and values."""
  case = SOME['conv'](fmt, 'E2M1')
  packed = case.packed
  assert (packed.packing, packed.in_features) == (packing, 3)
  assert packed.weights.dtype == np.uint8
  assert packed.weights.shape == (3, 3, 2 if packing == 'nibbles' else 3, 4)
  values = FPFormat.parse(fmt).values()
  levels = values[np.asarray(packed.codes())]
  np.testing.assert_allclose(levels * packed.scale, case.weights, rtol=1e-6)
  for layer in (packed, case.layer):
    np.testing.assert_allclose(layer.dequantized(), case.weights, rtol=1e-6)
    for carrier in ('f32', 'bf16'):
      carried = carriers.carry(FPFormat.parse(fmt), carrier)
      np.testing.assert_array_equal(
          np.asarray(layer.values(carrier), np.float64),
          levels / carried.unit - carried.offset)
  assert kernels.pack(packed) is packed


@pytest.mark.parametrize('shape, channels', [
    ((), 1), ((1,), 1), ((1, 1, 1, 1), 1), ((4,), 4), ((1, 1, 1, 4), 4)])
def test_scales_of_a_channel_or_of_all(shape, channels):
  scale = jnp.arange(1.0, 1 + channels).reshape(shape)
  layer = kernels.make_layer(
      jnp.ones((3, 3, 2, 4)), quantizers.Quantizer(E2M1, scale), None)
  np.testing.assert_array_equal(
      layer.scale, np.broadcast_to(np.arange(1.0, 1 + channels), 4))


@pytest.mark.parametrize('shape', [(1, 1, 2, 1), (2,), (2, 1, 1, 4)])
def test_other_scales_of_weights_are_refused(shape):
  quantizer = quantizers.Quantizer(E2M1, jnp.ones(shape))
  with pytest.raises(ValueError, match=r'weights of 4 output channels'):
    kernels.make_layer(jnp.ones((3, 3, 2, 4)), quantizer, None)


@pytest.mark.parametrize('scale, zero_point, message', [
    (jnp.ones(2), None, r'a scale of shape \(2,\) for the input'),
    (jnp.float32(1), jnp.ones((2, 1)), r'a zero point of shape \(2, 1\)')])
def test_inputs_have_one_scale_and_one_zero_point(scale, zero_point, message):
  act = quantizers.Quantizer(E2M1, scale, zero_point)
  with pytest.raises(ValueError, match=message):
    kernels.make_layer(
        jnp.ones((2, 4)), quantizers.Quantizer(E2M1, jnp.float32(1)), act)


def test_nan_has_no_code():
  layer = kernels.make_layer(
      jnp.full((2, 4), jnp.nan), quantizers.Quantizer(E2M1, jnp.float32(1)),
      None)
  with pytest.raises(ValueError, match='8 of 8 weights are NaN'):
    kernels.pack(layer)
