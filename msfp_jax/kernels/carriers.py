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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from msfp_jax.quant import functional
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qtensor import QTensor

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
_LARGEST_EXPONENT = 48  # of values in float32: 2^32 products of two stay finite


@dataclasses.dataclass(frozen=True)
class Carried:
  """The way in which a carrier holds a format: level = unit * (v + offset).

  The offset is an integer. It takes the integer part of a zero point into v,
  where it costs no digits: left outside of the sum, a zero point far from 0
  is the small difference of two large terms. It also centres what would not
  fit otherwise.

  Attributes:
    fmt: the format.
    carrier: a key of DTYPES.
    unit: a power of two.
    lowest_offset: of unsigned formats of at most 255 units; else 0.
    highest_offset: likewise.
  """

  fmt: FPFormat
  carrier: str
  unit: float
  lowest_offset: int = 0
  highest_offset: int = 0

  @property
  def dtype(self):
    return DTYPES[self.carrier][0]

  def values(self, offset: float = 0.0) -> np.ndarray:
    """v of every code, float64 `[2^bits]`."""
    return self.fmt.values() / self.unit - offset

  # UE2M2 in int8, unit 1/4, with a zero point of -0.28 at a scale of 0.1:
  #
  #   x = 0.1 level - 0.28 = 0.025 (v' - 11.2),  v' = level / unit = 0 .. 28
  #                        = 0.025 (v - 0.2),    v = v' - 11 = -11 .. 17
  #
  # What stays outside of the sum is below half a unit, and cancels no digits.
  def offset(self, scale: Any, zero_point: Any | None) -> Any:
    """The offset nearest to -zero_point / (scale unit), float32.

    A Python number where there is no zero point, or no choice; else an array
    of the shape of both.
    """
    low, high = self.lowest_offset, self.highest_offset
    if zero_point is None or low == high:
      return float(low)
    scale = scale * np.float32(self.unit)
    # A group of equal values has a scale of 0, and 0 / 0 would be no offset.
    if not isinstance(zero_point, jax.Array):
      places = -zero_point / np.where(scale == 0, np.float32(1), scale)
      return np.clip(np.round(places), low, high)
    return jnp.clip(jnp.round(-functional.divide(
        jnp.asarray(zero_point, jnp.float32),
        jnp.where(scale == 0, 1.0, scale))), low, high)

  def carry(self, levels: jax.Array, offset: Any) -> jax.Array:
    """v of levels in float32, in the carrier; int8 has no NaN."""
    # The unit is a power of two and v has few bits: no rounding here.
    return (levels * (1 / self.unit) - offset).astype(self.dtype)


class Operand(NamedTuple):
  """One side of a product: the tensor is scale * v + zero.

  Attributes:
    v: exact numbers, in the carrier.
    scale: float32, by group as in the tensor.
    zero: float32, or None for 0.
  """

  v: jax.Array
  scale: jax.Array
  zero: jax.Array | None


def operand(tensor: QTensor, carrier: str) -> Operand:
  """A quantized tensor in a carrier that holds it."""
  carried = carry(tensor.numbers, carrier)
  offset = carried.offset(tensor.scales(), tensor.zero_point)
  whole = offset if isinstance(offset, float) else tensor.spread(offset)
  v = carried.carry(tensor.levels(), whole)
  scale = tensor.scales() * np.float32(carried.unit)
  return Operand(v, scale, zero_of(carried, scale, tensor.zero_point, offset))


def has_groups(tensor: QTensor) -> bool:
  """Whether an input's scales change along the contraction."""
  return jnp.shape(tensor.scale)[-1:] not in ((), (1,))


def scaled_operand(tensor: QTensor, carrier: str) -> Operand:
  """An input with scales of groups, times these: v need not be integers.

  Args:
    tensor: without zero point, and such that the carrier holds level x scale.
    carrier: of them.
  """
  scales = tensor.spread(jnp.asarray(tensor.scale, jnp.float32))
  return Operand((tensor.levels() * scales).astype(DTYPES[carrier][0]),
                 jnp.float32(1) if tensor.outer is None else tensor.outer, None)


def zero_of(carried: Carried, scale: jax.Array, zero_point: Any | None,
            offset: Any) -> jax.Array | None:
  """The part of a zero point that no offset took: zero_point + scale * offset.
  """
  if isinstance(offset, float) and not offset:
    return zero_point
  moved = scale * offset
  return moved if zero_point is None else add(moved, zero_point)


def add(product: jax.Array, term: jax.Array) -> jax.Array:
  """product + term, where the product has been rounded.

  On CPUs a product that is only added becomes a fused multiply-add in some of
  XLA's fusions and not in others. The last bit would depend on what surrounds a
  layer, and where it moves an input of the next one across the border of two
  levels, a deep network amplifies it.
  """
  return product + jnp.where(jnp.isnan(product), product, term)


def step(fmt: FPFormat) -> float:
  """The smallest level above 0; all levels are multiples of it."""
  return fmt.step


@functools.cache
def carry(fmt: FPFormat, carrier: str) -> Carried | None:
  """The way in which `carrier` holds `fmt`; None if it cannot."""
  if carrier not in DTYPES:
    raise ValueError(f'carrier {carrier!r}: must be one of {sorted(DTYPES)}')
  if carrier == 'fp8':
    return _carry_fp8(fmt)
  largest = fmt.max / fmt.step
  # UE3M1 has 0 .. 192 steps, beyond int8; less 65 to 128 it fits. Ranges are
  # not of the carrier but of the format, so that exact carriers agree: what
  # int8 holds, and bfloat16 as well (it has 8 significant bits).
  low = high = 0
  if not fmt.signed and largest <= 255:
    low, high = max(0, int(largest) - 127), min(int(largest), 128)
  if carrier == 'int8' and largest - low > 127:
    return None
  # Integers, unless the range is such that their sums leave float32's: products
  # of two formats with 7 exponent bits reach 2^128.
  unit = fmt.step
  if largest >= EXACT_FLOAT32:
    unit = max(1.0, 2.0**(np.floor(np.log2(fmt.max)) - _LARGEST_EXPONENT))
  return Carried(fmt, carrier, unit, low, high)


def _carry_fp8(fmt: FPFormat) -> Carried | None:
  """Finds the way for fp8: the smallest unit that keeps all levels in range."""
  largest = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
  unit = max(2.0**np.ceil(np.log2(fmt.max / largest)), step(fmt))
  carried = Carried(fmt, 'fp8', unit)
  # The unit may be larger than a step, so small levels may need subnormals, or
  # not be there.
  exact = carried.values().astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
  return carried if (exact == carried.values()).all() else None


def cancels(weight: QTensor) -> bool:
  """Whether zero points of weights stay outside of the sum, and cost digits.

  Those of formats beyond 255 steps, which have no offset. In float32 such
  weights are multiplied as they are; a carrier of fewer bits cannot.
  """
  return (weight.zero_point is not None
          and carry(weight.numbers, 'f32').highest_offset == 0)


def magnitude(fmt: FPFormat) -> int:
  """The largest |v| in steps, with the offset of integer carriers taken off."""
  carried = carry(fmt, 'f32')
  ends = [np.abs(carried.values(offset)).max() for offset in (
      carried.lowest_offset, carried.highest_offset)]
  return int(max(ends) * (carried.unit / fmt.step))
