"""Carriers: the dtypes in which levels go through a product.

A level of a format is unit * (v + offset) with a value v that the carrier
holds exactly, so that quantized layers are products of exact numbers. Which
formats fit which carrier is a matter of their levels:

- int8, summed in int32: every signed 4-bit format, and the unsigned ones but
  UE4M0. The sum is exact whatever its order.
- fp8 (float8_e4m3fn), summed in float32: every 4-bit format.
- bf16 and f32, summed in float32: every format, as a level has at most 8
  significant bits. Exact where the sum of magnitudes stays below 2^24 steps.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from msfp_jax.quant import numbers as formats_lib
from msfp_jax.quant import quantizers
from msfp_jax.quant.numbers import FPFormat

# Carrier -> (its dtype, that of the sums).
DTYPES = {
    'int8': (jnp.int8, jnp.int32),
    'fp8': (jnp.float8_e4m3fn, jnp.float32),
    'bf16': (jnp.bfloat16, jnp.float32),
    'f32': (jnp.float32, jnp.float32),
}
# Integers up to here are exact, whatever the order of a sum: if the magnitudes
# of all terms add up to no more, so does every partial sum, however they are
# grouped; float32 has 24 bits for it and rounds nothing.
EXACT_FLOAT32, EXACT_INT32 = 2**24, 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Carried:
  """The way in which a carrier holds a format: level = unit * (v + offset).

  Attributes:
    fmt: the format.
    carrier: a key of DTYPES.
    unit: a power of two.
    offset: subtracted so that an unsigned format fits; else 0.
  """

  fmt: FPFormat
  carrier: str
  unit: float
  offset: float = 0.0

  @property
  def dtype(self):
    return DTYPES[self.carrier][0]

  def values(self) -> np.ndarray:
    """The v of every code, float64 `[2^bits]`."""
    return self.fmt.values() / self.unit - self.offset

  def quantize(self, x, scale, zero_point=None) -> jax.Array:
    """The v of the level nearest to (x - zero_point) / scale, in the carrier.

    The levels are those of `quantizers.fake_quant`. NaN becomes NaN in the
    floating-point carriers; int8 has none.
    """
    level = quantizers.nearest_level(x, self.fmt, scale, zero_point)
    # The unit is a power of two and v has few bits: no rounding here.
    return (level * (1 / self.unit) - self.offset).astype(self.dtype)

  def decode(self, codes) -> jax.Array:
    """The v of uint8 codes, in the carrier."""
    level = quantizers.decode(codes, self.fmt, np.float32(1 / self.unit))
    return (level - self.offset).astype(self.dtype)


def step(fmt: FPFormat) -> float:
  """The smallest level above 0; all levels are multiples of it."""
  return 2.0**(fmt.min_exponent - fmt.mantissa_bits)


@functools.cache
def carry(fmt: FPFormat, carrier: str) -> Carried | None:
  """The way in which `carrier` holds `fmt`; None if it cannot."""
  if carrier not in DTYPES:
    raise ValueError(f'carrier {carrier!r}: must be one of {sorted(DTYPES)}')
  if carrier == 'fp8':
    return _carry_fp8(fmt)
  largest = fmt.max / step(fmt)
  # UE3M1 has 0 .. 192 steps, beyond int8; less 96 they are -96 .. 96. What was
  # subtracted comes back as part of the zero point (see `reference`). Not of
  # the carrier but of the format, so that exact carriers agree.
  offset = 0.0
  if not fmt.signed and 127 < largest <= 255:
    offset = float(np.ceil(largest / 2))
  if carrier == 'int8' and largest - offset > 127:
    return None
  # Integers, unless the range is such that their sums leave float32's.
  unit = step(fmt) if largest < EXACT_FLOAT32 else 1.0
  return Carried(fmt, carrier, unit, offset)


def _carry_fp8(fmt: FPFormat) -> Carried | None:
  """Finds the way for fp8: the smallest unit that keeps all levels in range."""
  largest = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
  unit = max(2.0**np.ceil(np.log2(fmt.max / largest)), step(fmt))
  carried = Carried(fmt, 'fp8', unit)
  # The unit may be larger than a step, so small levels may need subnormals, or
  # not be there.
  exact = carried.values().astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
  return carried if (exact == carried.values()).all() else None


def magnitude(fmt: FPFormat) -> int:
  """The largest |v| in steps, with the offset of integer carriers taken off."""
  carried = carry(fmt, 'f32')
  return int(np.abs(carried.values()).max() * (carried.unit / step(fmt)))


def is_exact(weight: FPFormat, act: FPFormat, length: int,
             carrier: str) -> bool:
  """Whether sums of `length` products are exact in any order.

  Args:
    weight: format of the weights.
    act: of the inputs.
    length: of the contraction.
    carrier: a key of DTYPES; fp8 is summed with fewer bits by Hopper's tensor
      cores and never counts as exact.
  """
  if carrier == 'fp8':
    return False
  bound = EXACT_INT32 if carrier == 'int8' else EXACT_FLOAT32
  return length * magnitude(weight) * magnitude(act) <= bound


def pack_halves(codes: np.ndarray) -> np.ndarray:
  """Packs 4-bit codes `[..., K, N]` into bytes `[..., ceil(K / 2), N]`.

  Byte k holds code k in its low nibble and code k + ceil(K / 2) in its high
  one (a code of 0 beyond an odd K), so that a kernel multiplies the two halves
  of x by the two nibbles and never interleaves.
  """
  # K = 5: byte    0    1    2
  #   low nibble   0    1    2
  #   high nibble  3    4    -
  half = -(-codes.shape[-2] // 2)
  low, high = codes[..., :half, :], codes[..., half:, :]
  padding = [(0, 0)] * (codes.ndim - 2) + [(0, 2 * half - codes.shape[-2])]
  high = np.pad(high, [*padding, (0, 0)])
  return formats_lib.pack_nibbles(np.stack([low, high], axis=-1))[..., 0]


def unpack_halves(packed, length: int):
  """The inverse of `pack_halves`; NumPy or JAX, `length` is K."""
  xp = jnp if isinstance(packed, jax.Array) else np
  both = xp.concatenate([packed & 15, packed >> 4], axis=-2)
  return both[..., :length, :]
