"""Carriers hold levels exactly, zero points taken in; where sums are exact."""

import itertools
import math

import jax.numpy as jnp
import kernel_oracle
import ml_dtypes
import numpy as np
import pytest

from msfp_jax.kernels import carriers
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant import numbers as numbers_lib
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qtensor import QTensor

pytestmark = pytest.mark.optimized

FORMATS = [fmt for bits in range(3, 9) for signed in (False, True)
           for fmt in numbers_lib.formats_of_width(bits, signed)]
FOUR_BITS = (*numbers_lib.formats_of_width(4, True),
             *numbers_lib.formats_of_width(4, False))
NUMPY = {'int8': np.int8, 'fp8': ml_dtypes.float8_e4m3fn,
         'bf16': ml_dtypes.bfloat16, 'f32': np.float32}
each_carrier = pytest.mark.parametrize('carrier', NUMPY)


def carried_formats(carrier):
  return [(fmt, found) for fmt in FORMATS
          if (found := carriers.carry(fmt, carrier)) is not None]


def hold(values, dtype):
  """Whether a dtype holds float64 values exactly."""
  if dtype == np.int8:
    return (np.rint(values) == values).all() and np.abs(
        values + 0.5).max() <= 127.5
  with np.errstate(over='ignore'):
    return (values.astype(dtype).astype(np.float64) == values).all()


@each_carrier
def test_every_level_is_exact(carrier):
  """A carrier holds every level, with either end of its offsets taken off."""
  for fmt, carried in carried_formats(carrier):
    assert math.frexp(carried.unit)[0] == 0.5, fmt
    for offset in (carried.lowest_offset, carried.highest_offset):
      assert offset == int(offset)
      v = carried.values(offset)
      np.testing.assert_array_equal(
          carried.unit * (v + offset), fmt.values(), str(fmt))
      assert hold(v, NUMPY[carrier]), (fmt, offset)


def test_formats_are_left_out_only_where_no_unit_fits():
  """A format is left out only where no unit would do, nor an offset in int8."""
  for fmt in FORMATS:
    assert carriers.carry(fmt, 'bf16') and carriers.carry(fmt, 'f32')
    steps = fmt.values() / carriers.step(fmt)
    assert (np.rint(steps) == steps).all() and 1 in np.abs(steps)
    assert bool(carriers.carry(fmt, 'int8')) == (np.ptp(steps) <= 255), fmt
    fits = any(hold(fmt.values() * 2.0**n, NUMPY['fp8'])
               for n in range(-80, 80))
    assert bool(carriers.carry(fmt, 'fp8')) == fits, fmt


@pytest.mark.parametrize('name, magnitudes, offsets', [
    ('E3M0', [0, 1, 2, 4, 8, 16, 32, 64], (0, 0)),
    ('E2M1', [0, 1, 2, 3, 4, 6, 8, 12], (0, 0)),
    ('E1M2', [0, 1, 2, 3, 4, 5, 6, 7], (0, 0)),
    ('UE4M0', None, None),
    # 192 steps: of int8's 256 integers, 65 may lie on either side.
    ('UE3M1', [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192],
     (65, 128)),
    ('UE2M2', [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28], (0, 28)),
    ('UE1M3', list(range(16)), (0, 15))])
def test_integers_of_4_bits(name, magnitudes, offsets):
  fmt = FPFormat.parse(name)
  carried = carriers.carry(fmt, 'int8')
  assert carriers.carry(fmt, 'fp8') is not None
  if magnitudes is None:
    assert carried is None
    return
  signs = [1, -1] if fmt.signed else [1]
  assert (carried.lowest_offset, carried.highest_offset) == offsets
  for offset in offsets:
    np.testing.assert_array_equal(
        carried.values(offset),
        [sign * n - offset for sign in signs for n in magnitudes])
  assert carriers.magnitude(fmt) == max(
      max(magnitudes) - offsets[0], offsets[1])


@pytest.mark.parametrize('name', ['UE1M3', 'UE2M2', 'UE3M1', 'UE1M5'])
def test_offsets_leave_the_least_of_a_zero_point(name):
  """The offset leaves at most half a unit, unless it is at its ends."""
  fmt = FPFormat.parse(name)
  carried = carriers.carry(fmt, 'f32')
  scale = np.float32(0.3)
  low, high = carried.lowest_offset, carried.highest_offset
  zero_points = np.linspace(-300, 20, 97, dtype=np.float32)
  offset = carried.offset(scale, zero_points)
  left = zero_points / (scale * carried.unit) + offset
  assert (offset == np.rint(offset)).all()
  inside = (offset > low) & (offset < high)
  assert (np.abs(left[inside]) <= 0.5 + 1e-4).all()
  assert (left[offset == low] >= -0.5 - 1e-4).all()
  assert (left[offset == high] <= 0.5 + 1e-4).all()
  assert carried.offset(scale, None) == low
  in_jax = carried.offset(jnp.asarray(scale), jnp.asarray(zero_points))
  np.testing.assert_array_equal(in_jax, offset)


def test_unknown_carriers_are_refused():
  with pytest.raises(ValueError, match="carrier 'fp16': must be one of"):
    carriers.carry(FPFormat.parse('E2M1'), 'fp16')


SPREADS = {
    'none': (np.float32(0.25), None),
    'one': (np.float32(0.25), np.float32(-1.3)),
    'channels': (np.float32([[0.25, 0.5, 0.75]]),
                 np.float32([[-1.3, 0.1, -200]])),
}


@each_carrier
@pytest.mark.parametrize('name', SPREADS)
def test_operands_are_the_tensor(carrier, name):
  """scale * v + zero is the tensor, by float64; v is what the carrier holds."""
  scale, zero_point = SPREADS[name]
  for fmt in (*FOUR_BITS, FPFormat.parse('UE1M7'), FPFormat.parse('UE3M3')):
    if not carriers.carry(fmt, carrier):
      continue
    levels = np.resize(fmt.values(), (2**fmt.bits, 3))
    found = carriers.operand(QTensor(
        jnp.asarray(levels, jnp.float32), scale, zero_point, fmt=fmt,
        length=len(levels), axis=-2), carrier)
    assert found.v.dtype == NUMPY[carrier]
    assert hold(np.asarray(found.v, np.float64), NUMPY[carrier])
    zero = 0 if found.zero is None else np.float64(found.zero)
    value = np.float64(found.scale) * np.asarray(found.v, np.float64) + zero
    exact = levels * np.float64(scale) + (
        0 if zero_point is None else np.float64(zero_point))
    # What is left of the zero point is rounded once or twice.
    reach = np.abs(levels).max() * np.float64(scale) + np.abs(
        0 if zero_point is None else zero_point)
    assert (np.abs(value - exact) <= 2.0**-22 * reach).all(), fmt


@each_carrier
def test_offsets_follow_groups(carrier):
  """A zero point of a group moves the codes of that group alone."""
  fmt = FPFormat.parse('UE2M2')
  zero_point = np.float32([[0.0], [-1.5], [-4.0]])
  tensor = QTensor(
      jnp.zeros((5, 1)), np.ones((3, 1), np.float32), zero_point, fmt=fmt,
      length=5, axis=-2, group=2)
  found = carriers.operand(tensor, carrier)
  carried = carriers.carry(fmt, carrier)
  offset = 0 if carrier == 'fp8' else zero_point / carried.unit
  expected = np.broadcast_to(offset, (3, 1)).repeat(2, axis=0)[:5]
  np.testing.assert_array_equal(np.float64(found.v), expected)


@pytest.mark.parametrize('carrier', ['fp8', 'bf16', 'f32'])
def test_operands_keep_nan(carrier):
  for fmt, _ in carried_formats(carrier):
    tensor = QTensor(np.float32([np.nan, 0, np.nan]), np.float32(1), fmt=fmt,
                     length=3)
    v = np.asarray(carriers.operand(tensor, carrier).v, np.float32)
    np.testing.assert_array_equal(np.isnan(v), [True, False, True], str(fmt))


@each_carrier
def test_codes_are_carried_as_levels_are(carrier):
  for fmt, carried in carried_formats(carrier):
    codes = np.arange(2**fmt.bits, dtype=np.uint8)[:, None]
    tensor = QTensor(codes, np.float32(1), fmt=fmt, length=len(codes), axis=-2,
                     layout=layout_lib.BYTES)
    v = carriers.operand(tensor, carrier).v
    np.testing.assert_array_equal(
        np.asarray(v, np.float64)[:, 0], carried.values(carried.lowest_offset))


@pytest.mark.parametrize('carrier, bound', [
    ('f32', 2**24), ('bf16', 2**24), ('int8', 2**31 - 1)])
def test_sums_are_exact_up_to_the_largest_integer(carrier, bound):
  wide = map(FPFormat.parse, ['E1M6', 'UE1M7', 'E3M2', 'UE4M2'])
  for weight, act in itertools.product((*FOUR_BITS, *wide), repeat=2):
    formats = [carriers.carry(fmt, carrier) for fmt in (weight, act)]
    if None in formats:
      continue
    product = math.prod(int(max(
        np.abs(c.values(offset)).max()
        for offset in (c.lowest_offset, c.highest_offset))) for c in formats)
    length = bound // product
    assert kernel_oracle.is_exact(weight, act, length, carrier)
    assert not kernel_oracle.is_exact(weight, act, length + 1, carrier)


def test_sums_of_wide_formats_are_not_exact():
  """Sums never count as exact where levels are no integers in float32."""
  wide, narrow = FPFormat.parse('E5M2'), FPFormat.parse('E2M1')
  assert not kernel_oracle.is_exact(wide, narrow, 1, 'f32')
  assert not kernel_oracle.is_exact(narrow, wide, 1, 'bf16')


@pytest.mark.parametrize('weight, act, length', [
    ('E2M1', 'E2M1', 116508), ('E2M1', 'UE2M2', 49932),
    ('E2M1', 'UE4M0', 85), ('E3M0', 'UE4M0', 16)])
def test_longer_sums_round_in_float32(weight, act, length):
  """Beyond the bound a smallest product among the largest ones is lost."""
  weight, act = FPFormat.parse(weight), FPFormat.parse(act)
  assert kernel_oracle.is_exact(weight, act, length, 'f32')
  largest = np.float32(math.prod(
      fmt.max / carriers.step(fmt) for fmt in (weight, act)))
  sums = np.cumsum(np.full(length, largest), dtype=np.float32)
  np.testing.assert_array_equal(
      sums.astype(np.int64), np.arange(1, length + 1) * int(largest))
  while sums[-1] < 2**24:
    sums = np.append(sums, sums[-1] + largest)
  assert sums[-1] + np.float32(1) - sums[-1] != 1


def test_int32_overflows_at_2_to_the_31():
  weight, act = FPFormat.parse('E3M0'), FPFormat.parse('UE1M7')
  products = np.full(2**18, -64 * -128, np.int32)
  assert products.sum(dtype=np.int32) < 0
  assert not kernel_oracle.is_exact(weight, act, 2**18, 'int8')
  assert kernel_oracle.is_exact(weight, act, 2**18 - 1, 'int8')


def test_fp8_never_counts_as_exact():
  fmt = FPFormat.parse('E1M2')
  assert not kernel_oracle.is_exact(fmt, fmt, 1, 'fp8')
