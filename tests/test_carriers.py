"""Carriers hold levels exactly; packing by halves; where sums are exact."""

import itertools
import math

import jax
import jax.numpy as jnp
import kernel_oracle
import ml_dtypes
import numpy as np
import pytest

from msfp_jax.kernels import carriers
from msfp_jax.quant import numbers as formats_lib
from msfp_jax.quant.numbers import FPFormat

FORMATS = [fmt for bits in range(3, 9) for signed in (False, True)
           for fmt in formats_lib.formats_of_width(bits, signed)]
FOUR_BITS = (*formats_lib.formats_of_width(4, True),
             *formats_lib.formats_of_width(4, False))
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
  for fmt, carried in carried_formats(carrier):
    v = carried.values()
    assert math.frexp(carried.unit)[0] == 0.5, fmt
    np.testing.assert_array_equal(
        carried.unit * (v + carried.offset), fmt.values(), str(fmt))
    assert hold(v, NUMPY[carrier]), fmt


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


@pytest.mark.parametrize('name, magnitudes, offset', [
    ('E3M0', [0, 1, 2, 4, 8, 16, 32, 64], 0),
    ('E2M1', [0, 1, 2, 3, 4, 6, 8, 12], 0),
    ('E1M2', [0, 1, 2, 3, 4, 5, 6, 7], 0),
    ('UE4M0', None, 0),
    ('UE3M1', [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192], 96),
    ('UE2M2', [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28], 0),
    ('UE1M3', list(range(16)), 0)])
def test_integers_of_4_bits(name, magnitudes, offset):
  fmt = FPFormat.parse(name)
  carried = carriers.carry(fmt, 'int8')
  assert carriers.carry(fmt, 'fp8') is not None
  if magnitudes is None:
    assert carried is None
    return
  signs = [1, -1] if fmt.signed else [1]
  expected = [sign * n - offset for sign in signs for n in magnitudes]
  np.testing.assert_array_equal(carried.values(), expected)
  assert carriers.magnitude(fmt) == np.abs(expected).max()


def test_unknown_carriers_are_refused():
  with pytest.raises(ValueError, match="carrier 'fp16': must be one of"):
    carriers.carry(FPFormat.parse('E2M1'), 'fp16')


def grid_of(fmt, length=1600):
  """The values to try: levels, ties, their neighbours, and values beyond."""
  levels = fmt.levels()
  ties = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
  around = [np.nextafter(ties, np.float32(s * np.inf)) for s in (-1, 1)]
  points = np.concatenate([
      levels, ties, *around, [1.5 * fmt.max, -1.5 * fmt.max, np.inf, -np.inf]])
  return np.resize(points.astype(np.float32), length)


@each_carrier
def test_quantize_finds_the_nearest_level(carrier):
  """Levels, all ties and values next to them are rounded as by brute force."""
  scale = np.float32(0.125)
  for fmt, carried in carried_formats(carrier):
    u = grid_of(fmt)
    v = carried.quantize(u * scale, scale)
    assert v.dtype == NUMPY[carrier]
    level = kernel_oracle.fake_quant(u, fmt, 1.0)
    np.testing.assert_array_equal(
        np.asarray(v, np.float64), level / carried.unit - carried.offset,
        str(fmt))


@each_carrier
def test_quantize_takes_zero_points(carrier):
  for fmt in FOUR_BITS:
    if carried := carriers.carry(fmt, carrier):
      u = grid_of(fmt)
      v = carried.quantize(u * 0.25 - 1.5, jnp.float32(0.25), jnp.float32(-1.5))
      level = kernel_oracle.fake_quant(
          (u * np.float32(0.25) - np.float32(1.5) + 1.5) / 0.25, fmt, 1.0)
      np.testing.assert_array_equal(
          np.asarray(v, np.float64), level / carried.unit - carried.offset)


@pytest.mark.parametrize('carrier', ['fp8', 'bf16', 'f32'])
def test_quantize_keeps_nan(carrier):
  for fmt, carried in carried_formats(carrier):
    v = np.asarray(carried.quantize(np.float32([np.nan, 0, np.nan]), 2.0),
                   np.float32)
    np.testing.assert_array_equal(np.isnan(v), [True, False, True], str(fmt))


@each_carrier
def test_decode_is_the_table_of_values(carrier):
  codes = np.arange(256, dtype=np.uint8)
  for fmt, carried in carried_formats(carrier):
    v = carried.decode(codes)
    assert v.dtype == NUMPY[carrier]
    np.testing.assert_array_equal(
        np.asarray(v, np.float64),
        np.resize(fmt.values(), 256) / carried.unit - carried.offset)


@pytest.mark.parametrize('length', [1, 2, 7, 8])
def test_halves_are_unpacked_to_what_was_packed(length):
  rng = np.random.default_rng(length)
  codes = rng.integers(0, 16, (2, 3, length, 5), dtype=np.uint8)
  packed = carriers.pack_halves(codes)
  half = (length + 1) // 2
  assert packed.shape == (2, 3, half, 5) and packed.dtype == np.uint8
  np.testing.assert_array_equal(packed & 15, codes[..., :half, :])
  np.testing.assert_array_equal(
      (packed >> 4)[..., :length - half, :], codes[..., half:, :])
  assert not (packed >> 4)[..., length - half:, :].any()
  unpacked = carriers.unpack_halves(packed, length)
  assert isinstance(unpacked, np.ndarray)
  np.testing.assert_array_equal(unpacked, codes)
  by_jax = jax.jit(carriers.unpack_halves, static_argnums=1)(packed, length)
  np.testing.assert_array_equal(by_jax, codes)


@pytest.mark.parametrize('carrier, bound', [
    ('f32', 2**24), ('bf16', 2**24), ('int8', 2**31 - 1)])
def test_sums_are_exact_up_to_the_largest_integer(carrier, bound):
  wide = map(FPFormat.parse, ['E1M6', 'UE1M7', 'E3M2', 'UE4M2'])
  for weight, act in itertools.product((*FOUR_BITS, *wide), repeat=2):
    formats = [carriers.carry(fmt, carrier) for fmt in (weight, act)]
    if None in formats:
      continue
    product = math.prod(int(np.abs(c.values()).max()) for c in formats)
    length = bound // product
    assert carriers.is_exact(weight, act, length, carrier)
    assert not carriers.is_exact(weight, act, length + 1, carrier)


def test_sums_of_wide_formats_are_not_exact():
  """Sums never count as exact where levels are no integers in float32."""
  wide, narrow = FPFormat.parse('E5M2'), FPFormat.parse('E2M1')
  assert not carriers.is_exact(wide, narrow, 1, 'f32')
  assert not carriers.is_exact(narrow, wide, 1, 'bf16')


@pytest.mark.parametrize('weight, act, length', [
    ('E2M1', 'E2M1', 116508), ('E2M1', 'UE2M2', 49932),
    ('E2M1', 'UE4M0', 85), ('E3M0', 'UE4M0', 16)])
def test_longer_sums_round_in_float32(weight, act, length):
  """Beyond the bound a smallest product among the largest ones is lost."""
  weight, act = FPFormat.parse(weight), FPFormat.parse(act)
  assert carriers.is_exact(weight, act, length, 'f32')
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
  assert not carriers.is_exact(weight, act, 2**18, 'int8')
  assert carriers.is_exact(weight, act, 2**18 - 1, 'int8')


def test_fp8_never_counts_as_exact():
  fmt = FPFormat.parse('E1M2')
  assert not carriers.is_exact(fmt, fmt, 1, 'fp8')
