"""Decoding of packed 4-bit weights inside TPU kernels.

A vector register of uint8 holds four consecutive rows in each 32-bit lane. The
codes are decoded four at a time in such a lane, with plain 32-bit integer
instructions whose bytes never disturb each other, and the register is then
read as four rows of the carrier: no byte is widened. 8-bit shifts would not do:
v6e and 7x have none.
"""

import math

import jax
from jax import lax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from msfp_jax.quant.numbers import FPFormat

# A code is sign|magnitude: s a b c, or of an unsigned format a b c d. A packed
# byte is one code in each nibble, `layout.pack_halves` having put rows of the
# first half of the contraction in the low ones. Reading four rows of bytes as
# one row of words moves nothing:
#
#   packed, uint8 [4 r, n]    words, int32 [r, n]
#     row 0   sabc sabc         bits  7..0
#     row 1   sabc sabc         bits 15..8
#     row 2   sabc sabc         bits 23..16
#     row 3   sabc sabc         bits 31..24
#             high low
#
# `word >> 4` brings the high nibbles to where the low ones were. Above each is
# then a nibble of its neighbour, so that all below begins by masking it away.
# Decoded words become four rows of int8 or fp8 in the same way.
CARRIERS = {np.dtype(jnp.int8): 'int8', np.dtype(jnp.float8_e4m3fn): 'fp8',
            np.dtype(jnp.bfloat16): 'bf16'}
# Rows of a register of bytes: halves of this many rows are joined for free.
ROWS = 32
# Halves of a register of bfloat16, which is [16, 128].
LEAST_GROUP = 16
# Rows that a 32-bit lane holds: they are shifted together.
LEAST_SHIFTED = 4


def weight_unit(fmt: FPFormat, carrier: str) -> float:
  """The unit of the kernels' weights: what they have for level step(fmt).

  1 in the carriers of integers. In fp8 the fields of a code are shifted into
  those of float8_e4m3fn, whose bias is another, so that the weights and with
  them the sums come out smaller: the caller divides scale by the unit.

  Args:
    fmt: a format of 4 bits.
    carrier: 'int8', 'bf16' or 'fp8'.
  """
  return 2.0**-(6 + fmt.mantissa_bits) if carrier == 'fp8' else 1.0


def weight_base(fmt: FPFormat, carrier: str) -> int:
  """Steps that the kernels take off every level: 0, or what int8 asks for.

  UE3M1's levels, 0 to 192 steps, are int8 less 128, which is one bit flipped.
  """
  return 128 if carrier != 'fp8' and fmt.max / fmt.step > 127 else 0


def decode(packed, fmt: FPFormat, carrier: str, flags=None,
           wide: FPFormat | None = None) -> tuple[jax.Array, jax.Array]:
  """Decodes the low and the high nibbles, inside a kernel.

  Args:
    packed: uint8 `[rows, n]`, rows a multiple of 4.
    fmt: a format of 4 bits.
    carrier: 'int8', 'bf16' or 'fp8'.
    flags: uint8 `[2, rows / group, n]` of both halves, by which levels are
      shifted, for a group of 4 rows or a multiple; 0 to 4. Or None.
    wide: what shifted levels are. Then `fmt` is of integers, and the carrier
      not fp8.

  Returns:
    Two arrays of the carrier's dtype, each of the shape of `packed`: the
    levels divided by step(wide or fmt), less `weight_base`, times
    `weight_unit`.
  """
  words = pltpu.bitcast(packed, jnp.int32)
  if carrier == 'fp8':
    return tuple(pltpu.bitcast(word, jnp.float8_e4m3fn)
                 for word in _fp8(words, fmt))
  # Integers first, also for bf16, which holds them: shifted into its fields, as
  # for fp8, codes would be near 2^-126, and some would be its subnormals.
  codes = words, _right(words, 4)
  if flags is None:
    levels = [_int8(word, fmt) for word in codes]
  else:
    levels = [shifted(word, _by_word(flags[i], word.shape[0]), fmt, wide)
              for i, word in enumerate(codes)]
  integers = tuple(pltpu.bitcast(word, jnp.int8) for word in levels)
  if carrier == 'int8':
    return integers
  return tuple(integer.astype(jnp.bfloat16) for integer in integers)


def scaled(halves, groups, group: int):
  """Weights in bfloat16 times their scales, inside a kernel.

  Args:
    halves: the two of `decode`, `[rows, n]`.
    groups: float32 `[2, rows / group, n]`.
    group: rows that share a scale.
  """
  # In float32, since not all chips multiply bfloat16 outside the matrix unit.
  return tuple((
      part.astype(jnp.float32) * jnp.broadcast_to(
          groups[i][:, None], (groups.shape[1], group, groups.shape[2])
      ).reshape(part.shape)).astype(part.dtype)
               for i, part in enumerate(halves))


def halves(groups, count: int):
  """Scales `[..., n, N]` by half as `pad_halves` cuts, `[..., 2, count, N]`."""
  groups = groups.reshape(*groups.shape[:-2], 2, -1, groups.shape[-1])
  return jnp.pad(groups, [*[(0, 0)] * (groups.ndim - 2),
                          (0, count - groups.shape[-2]), (0, 0)])


def shared_by(group: int, half: int) -> int:
  """How many rows of a block share a FLAG: their group, or less.

  What divides `half` as well, so that no group lies in both halves of the
  contraction, and what divides any block.
  """
  return math.gcd(group, half, ROWS)


def halves_of_flags(flags, group: int, half: int, padded: int):
  """FLAGs `[..., ceil(K / group), N]` by half, for the kernels.

  Args:
    flags: uint8.
    group: along K, that share one.
    half: ceil(K / 2).
    padded: to which a half is lengthened.

  Returns:
    uint8 `[..., 2, padded / shared, N]`, of groups of `shared_by` rows.
  """
  shared = shared_by(group, half)
  flags = jnp.repeat(flags, group // shared, axis=-2)
  return halves(flags[..., :2 * half // shared, :], padded // shared)


def _fp8(words, fmt: FPFormat):
  """Shifts sign, exponent and mantissa to their places in e4m3."""
  mantissa_bits = fmt.mantissa_bits
  if not fmt.signed:
    return tuple((word & _each(15)) << (3 - mantissa_bits)
                 for word in (words, _right(words, 4)))
  # e4m3 is s eeee mmm. Exponent and mantissa of a code are neighbours, as they
  # are there, so that one shift places both; subnormals stay subnormals.
  low = ((words & _each(8)) << 4) | (
      (words & _each(7)) << (3 - mantissa_bits))
  high = (words & _each(0x80)) | _right(
      words & _each(0x70), 1 + mantissa_bits)
  return low, high


def _int8(words, fmt: FPFormat):
  """Decodes each byte's low nibble to its level in steps, two's complement."""
  if not fmt.signed:
    return {1: _ue1m3, 2: _ue2m2, 3: _ue3m1}[fmt.exponent_bits](words)
  # Magnitudes take 7 bits (E3M0's reach 64), so that no step carries into the
  # next byte.
  magnitude = {1: _e1m2, 2: _e2m1, 3: _e3m0}[fmt.exponent_bits](words)
  return _signed(magnitude, words)


# A group's FLAG is that of all four bytes of a word, so that one shift of the
# word does for all of them. What it moves, at most 15 << 4, stays in its byte:
#
#   word, signed         s111 s010 s111 s001     one nibble a byte
#   magnitudes           .111 .010 .111 .001
#   << FLAG, here 4      7 << 4 = 112 at most, of 7 bits, then the sign
def shifted(words, flags, fmt: FPFormat, wide: FPFormat):
  """Decompresses QuaRTZ's codes: each byte's low nibble, times 2^FLAG.

  Args:
    words: int32, a code in the low nibble of each of its four bytes, whatever
      is above.
    flags: int32 of the same shape, 0 to wide.bits - 4.
    fmt: integers of 4 bits, E1M2 or UE1M3.
    wide: integers of at most 8 bits and the same sign, which the result is.

  Returns:
    int32, four levels of int8: less 128 where `weight_base` of `wide` is.
  """
  magnitude = (words & _each(7 if fmt.signed else 15)) << flags
  if fmt.signed:
    return _signed(magnitude, words)
  return magnitude ^ _each(0x80) if weight_base(wide, 'int8') else magnitude


def _by_word(flags, rows: int):
  """FLAGs of groups, uint8 `[groups, n]` -> int32 `[rows, n]`."""
  groups, n = flags.shape
  return jnp.broadcast_to(
      flags.astype(jnp.int32)[:, None], (groups, rows // groups, n)
  ).reshape(rows, n)


def _signed(magnitude, words):
  """Magnitudes of 7 bits with the signs of codes, two's complement."""
  sign = words & _each(8)
  # Complement of 7 bits and plus one stay in their byte, even for -0, where
  # the eighth bit is set and taken back.
  one, top = _right(sign, 3), sign << 4
  return ((magnitude ^ (top - one)) + one) ^ top


def _e1m2(words):
  return words & _each(7)


def _e2m1(words):
  """Magnitudes 0 1 2 3 4 6 8 12: the code, plus 0 1 2 5 from code 4 on."""
  above = _right(words, 2) & _each(1)  # 1 from code 4 on
  beyond = words & (above + (above << 1))  # there, the lowest two bits
  three = beyond & _right(beyond, 1)  # 1 for code 7, to which 5 are added
  return (words & _each(7)) + beyond + (three << 1)


def _e3m0(words):
  """Magnitudes 0 1 2 4 .. 64: 1 shifted by each bit of the code, and halved."""
  # `moving` is the power where the bit is set, else 0; adding 3 or 15 times as
  # much multiplies it by 4 or 16. 128, the most, still fits its byte.
  one = _each(1)
  power = one + (words & one)
  second = _right(words, 1) & one
  moving = power & (second + (second << 1))
  power += (moving << 2) - moving
  third = _right(words, 2) & one
  moving = power & ((third << 4) - third)
  power += (moving << 4) - moving
  return _right(power, 1) & _each(0x7F)


def _ue1m3(words):
  return words & _each(15)


def _ue2m2(words):
  """Levels 0 .. 7, 8 10 12 14, 16 20 24 28: the code, plus what it lacks."""
  eight = _right(words, 3) & _each(1)  # 1 from code 8 on
  twelve = _right(words, 2) & eight
  # With m the lowest two bits, m more from code 8 on, and 4 + 2 m from 12 on.
  more, most = (words & (one + (one << 1)) for one in (eight, twelve))
  return (words & _each(15)) + more + (twelve << 2) + (most << 1)


def _ue3m1(words):
  """Levels 0 1, 2 3, 4 6, 8 12 .. 128 192, less 128."""
  # The exponent is a code of E3M0: its power p is 0 1 2 4 .. 64. A level is
  # 2 p, and with the mantissa bit p more, which is 1 where p is 0.
  power, odd = _e3m0(_right(words, 1)), words & _each(1)
  higher = _right(words, 1) | _right(words, 2) | _right(words, 3)
  # 255 in a byte for every 1: the borrow of each is paid by its neighbour.
  mask = (odd << 8) - odd
  levels = (power << 1) + (power & mask) + (odd & ~higher)
  return levels ^ _each(0x80)


def _each(byte: int) -> np.int32:
  """A word that is four times the same byte."""
  return np.array([byte] * 4, np.uint8).view(np.int32)[0]


def _right(words, count: int):
  return lax.shift_right_logical(words, jnp.int32(count))


def pad_halves(x, codes, multiple: int):
  """Lengthens both halves of a contraction by zeros.

  Args:
    x: `[..., K]`, the activations.
    codes: uint8 `[..., ceil(K / 2), N]`, as from `layout.pack_halves`.
    multiple: what the length of a half becomes a multiple of.

  Returns:
    x `[..., 2 * half]` and codes `[..., half, N]`.
  """
  length, half = x.shape[-1], codes.shape[-2]
  padded = -(-half // multiple) * multiple
  if 2 * padded == length:
    return x, codes
  # Zeros go behind each half, not behind both: row k of the codes belongs to
  # channels k and k + half of x. Code 0 is level 0.
  extend = lambda a, axis: jnp.pad(a, [
      (0, padded - a.shape[axis] if i == axis % a.ndim else 0)
      for i in range(a.ndim)])
  x = jnp.concatenate(
      [extend(x[..., :half], -1), extend(x[..., half:], -1)], axis=-1)
  return x, extend(codes, -2)
