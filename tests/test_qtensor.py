"""QTensors: what their elements are, and how many bits they take."""

import jax
import jax.numpy as jnp
from kernel_cases import SOME
import ml_dtypes
import numpy as np
import pytest

from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qtensor import QTensor
from msfp_jax.quant.quantizers import Static

E2M1, UE2M2 = FPFormat.parse('E2M1'), FPFormat.parse('UE2M2')


def full_of_everything():
  """Makes weights `[3, 5, 2]` in groups of 2, shifted in groups of 3."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: np.float32(rng.normal(size=shape))
  levels = np.float32(rng.choice(UE2M2.values(), (3, 5, 2)))
  return QTensor(
      levels, np.abs(draw(3, 3, 2)), draw(3, 3, 2),
      np.uint8(rng.integers(0, 5, (3, 2, 2))), np.float32([[[0.3]]]),
      fmt=UE2M2, length=5, axis=-2, group=2, shift_group=3)


def test_an_element_is_its_formula():
  tensor = full_of_everything()
  expected = np.empty((3, 5, 2))
  for i, k, o in np.ndindex(expected.shape):
    expected[i, k, o] = (
        0.3 * tensor.scale[i, k // 2, o] * tensor.data[i, k, o]
        * 2.0**tensor.shift[i, k // 3, o] + tensor.zero_point[i, k // 2, o])
  np.testing.assert_allclose(tensor.dequantize(), expected, rtol=1e-5,
                             atol=1e-6)
  assert tensor.size == 30


def test_groups_of_inputs_are_along_the_last_axis():
  levels = np.ones((2, 5), np.float32)
  scale = np.float32([[1, 2, 3], [4, 5, 6]])
  tensor = QTensor(levels, scale, fmt=E2M1, length=5, group=2)
  np.testing.assert_array_equal(
      tensor.dequantize(), [[1, 1, 2, 2, 3], [4, 4, 5, 5, 6]])


def test_packed_is_the_same_tensor():
  """Codes for levels change no element; all else stays as it is."""
  for tensor in (full_of_everything(),
                 SOME['conv']('E4M3', 'E2M1').layer.weight,
                 SOME['dense']('E1M1', 'E2M1').layer.weight):
    packed = tensor.packed()
    assert packed.is_packed and not tensor.is_packed
    assert packed.data.dtype == np.uint8
    np.testing.assert_array_equal(
        np.asarray(packed.dequantize()).view(np.uint32),
        np.asarray(tensor.dequantize()).view(np.uint32))
    np.testing.assert_array_equal(packed.codes(), tensor.codes())
    assert (packed.size, packed.nbits) == (tensor.size, tensor.nbits)
    assert packed.packed() is packed


@pytest.mark.parametrize('fmt, layout, rows', [
    ('E2M1', 'nibbles', 2), ('E1M1', 'nibbles', 2), ('UE2M2', 'nibbles', 2),
    ('E3M1', 'bytes', 3), ('E4M3', 'bytes', 3)])
def test_packed_weights(fmt, layout, rows):
  """Packed weights have the right size, codes and values."""
  case = SOME['conv'](fmt, 'E2M1')
  weight = case.packed.weight
  assert (weight.layout.name, weight.length) == (layout, 3)
  assert weight.data.shape == (3, 3, rows, 4)
  levels = FPFormat.parse(fmt).values()[np.asarray(weight.codes())]
  np.testing.assert_array_equal(levels, case.layer.weight.data)


def test_nan_has_no_code():
  weight = Static(E2M1, jnp.float32(1)).quantize(
      jnp.full((2, 4), jnp.nan), axis=-2)
  with pytest.raises(ValueError, match='8 of 8 weights are NaN'):
    weight.packed()


def stored(tensor):
  """Bits of the arrays of a packed tensor, as a file has them."""
  bits = tensor.fmt.bits * np.asarray(tensor.codes()).size
  if tensor.fmt.bits in (4, 8) and tensor.length % 2 == 0:
    assert bits == 8 * tensor.data.nbytes  # in memory too
  return bits + sum(8 * part.nbytes for part in (
      tensor.scale, tensor.zero_point, tensor.outer) if part is not None)


W = np.random.default_rng(1).normal(size=(3, 3, 32, 6)).astype(np.float32)
TAPS = 3 * 3 * 32 * 6
NBITS = {  # by hand: codes, scales, zero points, the tensor's own scale
    'per tensor': (Static(E2M1, np.float32(1)), TAPS * 4 + 32),
    'per channel': (Static(E2M1, np.ones((1, 1, 1, 6), 'f4')),
                    TAPS * 4 + 6 * 32),
    '8 bits, zero points': (
        Static(FPFormat.parse('UE1M7'), np.ones((1, 1, 1, 6), 'f4'),
               np.ones((1, 1, 1, 6), 'f4')), TAPS * 8 + 2 * 6 * 32),
    '3 bits': (Static(FPFormat.parse('E1M1'), np.float32(1)), TAPS * 3 + 32),
    '6 bits': (Static(FPFormat.parse('E3M2'), np.float32(1)), TAPS * 6 + 32),
    'groups': (Block(E2M1, group=16), TAPS * 4 + 9 * 2 * 6 * 32),
    'groups, the last shorter': (
        Block(E2M1, group=12), TAPS * 4 + 9 * 3 * 6 * 32),
    'groups with zero points': (
        Block(UE2M2, group=8), TAPS * 4 + 2 * 9 * 4 * 6 * 32),
    'MXFP4': (Block(E2M1, group=32, scale_type='e8m0'), TAPS * 4 + 9 * 6 * 8),
    'NVFP4': (Block(E2M1, group=16, scale_type='e4m3', two_level=True),
              TAPS * 4 + 9 * 2 * 6 * 8 + 32),
    'channels from the data': (Block(E2M1, 'channel'), TAPS * 4 + 6 * 32),
    'the tensor from the data': (Block(E2M1, 'tensor'), TAPS * 4 + 32),
}


@pytest.mark.parametrize('name', NBITS)
def test_bits_are_counted_as_by_hand_and_as_stored(name):
  quantizer, expected = NBITS[name]
  tensor = quantizer.quantize(W, axis=-2)
  assert tensor.nbits == expected
  assert stored(tensor.packed()) == expected
  banks = quantizer.quantize_banks(np.stack([W, -W, W]))
  shares_scales = isinstance(quantizer, Static)
  assert banks.nbits == (3 * expected - shares_scales * 2 * (
      expected - TAPS * quantizer.bits))


def test_bits_of_shifts():
  tensor = full_of_everything()
  assert tensor.nbits == 30 * 4 + (18 + 18 + 1) * 32 + 12 * 3


@pytest.mark.parametrize('quantizer', [
    # Scales that `functional.snap_scale` leaves: beside a zero point others are
    # rounded as the program around them has it.
    Static(UE2M2, np.float32([[[[0.5, 0.25, 0.1875, 0.375, 0.625, 0.75]]]]),
           np.float32(-1.5)),
    Block(E2M1, group=12), Block(UE2M2, 'channel'),
    Block(E2M1, group=16, scale_type='e4m3', two_level=True),
    Block(FPFormat.parse('E4M3'), 'tensor', scale_type='e8m0')], ids=str)
def test_banks_are_quantized_each_by_itself(quantizer):
  """Banks are quantized as each alone is, and `bank` takes one, traced too."""
  sets = np.stack([W, -2 * W, W[..., ::-1]])
  banks = quantizer.quantize_banks(sets)
  assert banks.data.shape == sets.shape
  take = jax.jit(lambda banks, i: banks.bank(i))
  for i, kernel in enumerate(sets):
    alone = quantizer.quantize(kernel, axis=-2)
    for one in (banks.bank(i), take(banks, i), banks.packed().bank(i)):
      assert (one.fmt, one.length, one.group) == (
          alone.fmt, alone.length, alone.group)
      np.testing.assert_array_equal(one.dequantize(), alone.dequantize())


def test_scales_in_float8_are_kept_as_such():
  """A scale stays in the type of its format, and counts with its value."""
  scale = np.float32([[0.125, 448]]).astype(ml_dtypes.float8_e4m3fn)
  tensor = QTensor(np.float32([[1, 6]]), scale, fmt=E2M1, length=1, axis=-2)
  assert tensor.packed().scale.dtype == ml_dtypes.float8_e4m3fn
  np.testing.assert_array_equal(tensor.dequantize(), [[0.125, 2688]])
  assert tensor.packed().layout == layout_lib.NIBBLES
