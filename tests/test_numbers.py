"""Number formats: grids, names, widths."""

import ml_dtypes
import numpy as np
import pytest

from msfp_jax.quant import numbers as formats
from msfp_jax.quant.numbers import FPFormat

ALL = [
    FPFormat(e, bits - signed - e, bool(signed))
    for bits in range(3, 9) for signed in (0, 1)
    for e in range(1, bits - signed + 1)
]


def value_of_bits(pattern: str, exponent_bits: int, signed: bool) -> float:
  """Reads the value of a string of bits, one binary digit after the other."""
  sign = -1.0 if signed and pattern[0] == '1' else 1.0
  field = pattern[signed:][:exponent_bits]
  fraction = pattern[signed:][exponent_bits:]
  significand = sum(int(d) / 2**(i + 1) for i, d in enumerate(fraction))
  bias = 2**exponent_bits // 2 - 1
  if '1' not in field:
    return sign * significand * 2.0**(1 - bias)
  return sign * (1 + significand) * 2.0**(int(field, 2) - bias)


@pytest.mark.parametrize('fmt', ALL, ids=str)
def test_every_code_has_the_value_of_its_bits(fmt):
  expected = np.array([
      value_of_bits(f'{code:0{fmt.bits}b}', fmt.exponent_bits, fmt.signed)
      for code in range(2**fmt.bits)])
  values = fmt.values()
  assert values.dtype == np.float64
  np.testing.assert_array_equal(values, expected)
  np.testing.assert_array_equal(np.signbit(values), np.signbit(expected))


@pytest.mark.parametrize('fmt', ALL, ids=str)
def test_levels_are_the_distinct_values_ascending(fmt):
  levels = fmt.levels()
  assert levels.dtype == np.float64
  assert (np.diff(levels) > 0).all()
  assert set(levels.tolist()) == set(fmt.values().tolist())
  assert len(levels) == 2**fmt.bits - fmt.signed
  assert not np.signbit(levels[levels == 0]).any()
  assert (fmt.lowest, fmt.max) == (levels[0], levels[-1])


@pytest.mark.parametrize('name, dtype', [
    ('E2M1', ml_dtypes.float4_e2m1fn), ('E2M3', ml_dtypes.float6_e2m3fn),
    ('E3M2', ml_dtypes.float6_e3m2fn)])
def test_codes_are_those_of_ml_dtypes(name, dtype):
  fmt = FPFormat.parse(name)
  theirs = np.arange(2**fmt.bits, dtype=np.uint8).view(dtype)
  np.testing.assert_array_equal(fmt.values(), theirs.astype(np.float64))


def test_grids_of_the_paper():
  e2m1 = [0, .5, 1, 1.5, 2, 3, 4, 6]
  np.testing.assert_array_equal(FPFormat(2, 1).values()[:8], e2m1)
  ue2m2 = [k / 4 for k in range(8)] + [2, 2.5, 3, 3.5, 4, 5, 6, 7]
  np.testing.assert_array_equal(FPFormat(2, 2, False).levels(), ue2m2)
  e3m0 = [0] + [2.0**k for k in range(-2, 5)]
  np.testing.assert_array_equal(FPFormat(3, 0).values()[:8], e3m0)


@pytest.mark.parametrize('fmt', [f for f in ALL if f.exponent_bits == 1],
                         ids=str)
def test_one_exponent_bit_is_a_uniform_grid(fmt):
  assert len(set(np.diff(fmt.levels()))) == 1


@pytest.mark.parametrize('fmt', ALL, ids=str)
def test_lowest_binade_starts_at_min_exponent(fmt):
  first_normal = fmt.values()[2**fmt.mantissa_bits]
  assert first_normal == 2.0**fmt.min_exponent


@pytest.mark.parametrize('fmt', ALL, ids=str)
def test_parse_is_the_inverse_of_str(fmt):
  assert FPFormat.parse(str(fmt)) == fmt
  assert FPFormat.parse(fmt) is fmt
  assert {fmt: 1}[FPFormat.parse(str(fmt))] == 1


def test_names():
  assert str(FPFormat(2, 1)) == 'E2M1'
  assert str(FPFormat(2, 2, signed=False)) == 'UE2M2'


@pytest.mark.parametrize('text, message', [
    ('int4', "'int4' is no number format; write E2M1"),
    ('e2m1', "'e2m1' is no number format; write E2M1"),
    ('E2M1 ', 'is no number format'),
    (None, 'None is no number format'),
    ('E0M3', 'E0M3 is left out.*use E1M2'),
    ('UE0M4', 'UE0M4 is left out.*use UE1M3'),
    ('E1M0', 'E1M0 has 2 bits.*3 to 8'),
    ('E4M4', 'E4M4 has 9 bits.*3 to 8'),
])
def test_parse_refuses_and_says_the_way_out(text, message):
  with pytest.raises(ValueError, match=message):
    FPFormat.parse(text)


def test_negative_fields_are_refused():
  with pytest.raises(ValueError, match='0 mantissa bits, got 5 and -1'):
    FPFormat(5, -1)


def test_formats_of_width():
  def names(bits, signed):
    return ' '.join(map(str, formats.formats_of_width(bits, signed)))

  assert names(3, True) == 'E1M1 E2M0'
  assert names(4, True) == 'E1M2 E2M1 E3M0'
  assert names(4, False) == 'UE1M3 UE2M2 UE3M1 UE4M0'
  assert names(8, True) == 'E1M6 E2M5 E3M4 E4M3 E5M2 E6M1 E7M0'
  # UE8M0 reaches 2^128.
  assert names(8, False) == 'UE1M7 UE2M6 UE3M5 UE4M4 UE5M3 UE6M2 UE7M1'


@pytest.mark.parametrize('bits', [2, 9])
def test_formats_of_width_refuses_other_widths(bits):
  with pytest.raises(ValueError, match=f'no formats of {bits} bits.*3 to 8'):
    formats.formats_of_width(bits, True)
