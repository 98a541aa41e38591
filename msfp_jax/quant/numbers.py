"""The number formats of 3 to 8 bits: their grids, their codes, nibbles.

The family is that of Kuzmin et al., "FP8 Quantization: The Power of the
Exponent" (NeurIPS 2022), eq. 3, with the bias fixed: the real bias of the paper
is the scale of quantizers.py. All codes are finite, there is no inf or NaN.
"""

import dataclasses
import re

import numpy as np

MIN_BITS = 3
MAX_BITS = 8


@dataclasses.dataclass(frozen=True)
class FPFormat:
  """A floating-point number format, printed as `E2M1` or `UE2M2` (unsigned).

  A code is the bit pattern sign|exponent|mantissa (no sign bit if unsigned).
  Exponent field p and mantissa field m stand for

      2^(max(p, 1) - bias) * (m / 2^M + [p > 0]),   bias = 2^(E-1) - 1,

  so that E2M1 is 0, .5, 1, 1.5, 2, 3, 4, 6 and E1My is a uniform grid.

  Attributes:
    exponent_bits: E, at least 1.
    mantissa_bits: M, at least 0; 3 to 8 bits in total, the sign included.
    signed: whether the format has a sign bit.

  Raises:
    ValueError: if the format is outside of these ranges.
  """

  # E2M1, whose bias is 1: three binades of two levels, and below them the
  # subnormals, which go on with the lowest binade's step down to 0.
  #
  #   code (without sign)   000  001  010  011  100  101  110  111
  #   p, m                  0,0  0,1  1,0  1,1  2,0  2,1  3,0  3,1
  #   level                 0    .5   1    1.5  2    3    4    6
  #
  # IEEE 754 would take the last p for inf and NaN; here it is a binade more.
  exponent_bits: int
  mantissa_bits: int
  signed: bool = True

  def __post_init__(self):
    if self.exponent_bits < 0 or self.mantissa_bits < 0:
      raise ValueError(
          f'a format has at least 1 exponent bit and 0 mantissa bits, got '
          f'{self.exponent_bits} and {self.mantissa_bits}')
    if not MIN_BITS <= self.bits <= MAX_BITS:
      raise ValueError(
          f'{self} has {self.bits} bits (sign included); formats of {MIN_BITS} '
          f'to {MAX_BITS} bits are supported')
    if self.exponent_bits == 0:
      same = f'{"" if self.signed else "U"}E1M{self.mantissa_bits - 1}'
      raise ValueError(
          f'{self} is left out: formats of one exponent bit are already the '
          f'uniform grids; use {same}, which has the same levels up to scale')

  def __str__(self) -> str:
    sign = '' if self.signed else 'U'
    return f'{sign}E{self.exponent_bits}M{self.mantissa_bits}'

  @classmethod
  def parse(cls, text: 'str | FPFormat') -> 'FPFormat':
    """The format that prints as `text`; a format is returned as it is.

    Raises:
      ValueError: if `text` names no format.
    """
    if isinstance(text, cls):
      return text
    match = re.fullmatch(r'(U?)E(\d+)M(\d+)', str(text))
    if not match:
      raise ValueError(
          f'{text!r} is no number format; write E2M1 for a sign, 2 exponent '
          f'bits and 1 mantissa bit, UE2M2 for an unsigned format')
    sign, exponent_bits, mantissa_bits = match.groups()
    return cls(int(exponent_bits), int(mantissa_bits), signed=not sign)

  @property
  def bits(self) -> int:
    """The bits of a code, the sign included."""
    return self.exponent_bits + self.mantissa_bits + int(self.signed)

  @property
  def bias(self) -> int:
    return 2**(self.exponent_bits - 1) - 1

  @property
  def min_exponent(self) -> int:
    """The exponent of the lowest binade, which the subnormals share."""
    return 1 - self.bias

  @property
  def max(self) -> float:
    """The largest level; 2^128, beyond float32, for UE8M0 alone."""
    top = 2**self.exponent_bits - 1
    return 2.0**(top - self.bias) * (2 - 2.0**-self.mantissa_bits)

  @property
  def step(self) -> float:
    """The smallest level above 0; all levels are multiples of it."""
    return 2.0**(self.min_exponent - self.mantissa_bits)

  @property
  def fits_float32(self) -> bool:
    """Whether quantizers, which compute in float32, can use the format."""
    return self.max <= float(np.finfo(np.float32).max)

  @property
  def lowest(self) -> float:
    """The lowest level: -max, or 0 if unsigned."""
    return -self.max if self.signed else 0.0

  def values(self) -> np.ndarray:
    """The value of each code, float64 `[2^bits]`; half of them are negative."""
    magnitude = np.arange(2**(self.exponent_bits + self.mantissa_bits))
    # Codes are in the order of levels, all that are not negative first.
    p, m = np.divmod(magnitude, 2**self.mantissa_bits)
    significand = m / 2**self.mantissa_bits + (p > 0)
    values = np.ldexp(significand, np.maximum(p, 1) - self.bias)
    return np.concatenate([values, -values]) if self.signed else values

  def levels(self) -> np.ndarray:
    """The distinct values, float64, ascending; +0 stands for -0 too."""
    return np.unique(self.values()) + 0.0


def formats_of_width(bits: int, signed: bool) -> tuple[FPFormat, ...]:
  """Every format of `bits` bits whose maximum is a finite float32.

  Args:
    bits: 3 to 8, the sign included.
    signed: whether the formats have a sign bit.

  Returns:
    The formats, the fewest exponent bits (the uniform grid) first.

  Raises:
    ValueError: if `bits` is out of range.
  """
  if not MIN_BITS <= bits <= MAX_BITS:
    raise ValueError(
        f'no formats of {bits} bits; choose {MIN_BITS} to {MAX_BITS}')
  unsigned_bits = bits - int(signed)
  formats = (FPFormat(e, unsigned_bits - e, signed)
             for e in range(1, unsigned_bits + 1))
  return tuple(f for f in formats if f.fits_float32)


def int_format(bits: int) -> FPFormat:
  """The INT baseline: the unsigned uniform grid of `bits` bits, UE1M(bits-1).

  With a scale and a real zero point it is asymmetric INT quantization, of
  levels zero_point + k * step, step = scale * 2^(2 - bits), k < 2^bits.
  Raises ValueError if `bits` is not 3 to 8.
  """
  return FPFormat(1, bits - 1, signed=False)
