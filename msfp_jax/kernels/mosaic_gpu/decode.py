"""4-bit codes to 8-bit levels in registers: layout, tables, bit expressions.

Eight codes stand in a 32-bit word, one a nibble. PTX's `prmt` reads a 32-bit
selector's four lower nibbles: bits 0-2 name one of 8 table bytes, bit 3 asks
for that byte's sign bit eight times over in its place. `prepare` therefore
stores code s|abc (s the sign) as nibble a|sbc, so that two tables of 8 bytes,
one for each a, hold all 16 levels. Where a nibble is not a table's, the table
gives 0x00 or 0xff by the sign, and the exclusive or of the two lookups is the
level, provided that the first table holds negative levels complemented: 9
operations for 8 codes, whatever the format and the 8-bit carrier.

That needs negative levels below 0 and the others not, as bytes: -0, whose int8
is 0, is stored as +0.

Codes abcd of unsigned formats are stored as d|abc: two that differ in d alone
need bytes of the same sign. Most have none. UE3M1 in int8 is stored less 128,
and of its 16 levels 0 to 192 the last two, 128 and 192, are then not negative.

A register that comes out of it has 4 neighbours of one channel, which lie in
one group of 16, so that QuaRTZ's FLAG is one number for all of it (`shifted`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.kernels import carriers
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant.numbers import FPFormat

# K is padded to a multiple of this, the least that wgmma takes of int8 levels
# in registers, and N to one of the tiles in which TMA stores y.
DEPTH = 64
CHANNELS = 64
# Neighbours along K of which a register holds a part: no scale and no FLAG may
# change within.
LEAST_GROUP = 16


class Ops(NamedTuple):
  """The 32-bit operations of `decode`, which NumPy, JAX and MLIR each bring."""

  xor: Callable[[Any, Any], Any]
  both: Callable[[Any, Any], Any]  # bitwise and
  less: Callable[[Any, Any], Any]
  shift_right: Callable[[Any, int], Any]
  shift_left: Callable[[Any, Any], Any]
  permute: Callable[[Any, Any, Any], Any]  # prmt(bytes 0-3, 4-7, selector)
  constant: Callable[[int], Any]


def weight_base(fmt: FPFormat, carrier: str) -> int:
  """Steps that the kernels take off every level: 0, or what int8 asks for."""
  return 128 if carrier == 'int8' and fmt.max / fmt.step > 127 else 0


def tables(fmt: FPFormat, carrier: str) -> tuple[int, int, int, int]:
  """The two tables of 8 bytes as words: first 0-3, 4-7, second 0-3, 4-7.

  Args:
    fmt: a format of 4 bits.
    carrier: 'int8' or 'fp8'.
  """
  carried = carriers.carry(fmt, carrier)
  levels = carried.values(weight_base(fmt, carrier)).astype(
      carried.dtype).view(np.uint8)  # of each code
  # Of table byte sbc code s0bc, and s1bc in the other table; of abc abc0, abc1.
  code, other = (np.arange(8) << 1 & 8 | np.arange(8) & 3, 4) if (
      fmt.signed) else (np.arange(8) << 1, 1)
  first, second = levels[code], levels[code | other]
  # No byte of the first table has its sign bit set, so that looking up a nibble
  # of the second one there gives 0x00. The converse gives 0xff for negative
  # levels, which completes the complement taken here.
  first = np.where(second & 0x80, ~first & 0x7f, first)
  return tuple(map(int, np.concatenate([first, second]).view('<u4')))


def decode(word, words: tuple[int, int, int, int], ops: Ops) -> tuple[Any, Any]:
  """Decodes the 8 nibbles of a word: the lower 4, then the upper 4."""
  first_low, first_high, second_low, second_high = map(ops.constant, words)
  # With bit 3 of every nibble flipped, the tables change their parts:
  #
  #   nibble    prmt(first, word)    prmt(second, other)    exclusive or
  #   0 0 b c   level                0x00                   level
  #   0 1 b c   ~level & 0x7f        0xff                   level
  #   1 s b c   0x00                 level                  level
  other = ops.xor(word, ops.constant(0x88888888))
  halves = []
  for shift in (0, 16):  # prmt looks at the lower four nibbles only
    in_first = ops.shift_right(word, shift) if shift else word
    in_second = ops.shift_right(other, shift) if shift else other
    halves.append(ops.xor(
        ops.permute(first_low, first_high, in_first),
        ops.permute(second_low, second_high, in_second)))
  return tuple(halves)


# -7, 5, -1, 3 by FLAG 2, a byte each, the first in the lowest bits:
#
#   levels        00000011 11111111 00000101 11111001
#   word << 2     00001111 11111100 00010111 11100100    11: from its neighbour
#   mask          11111100 11111100 11111100 11111100
#   shifted       00001100 11111100 00010100 11100100    12, -4, 20, -28
def shifted(levels, flag, ops: Ops, base: int):
  """QuaRTZ's decompression: the 4 bytes of a word, times 2^flag.

  Args:
    levels: codes of 4 bits as int8, -7 to 7 or 0 to 15.
    flag: 0 to 4.
    ops: that both take.
    base: 128 to subtract it afterwards, where levels without sign reach 240;
      else 0.

  Returns:
    What is always int8: -112 to 112, or 0 to 240 less 128.
  """
  # Each byte's upper bits leave it for the next one, whose lower bits they
  # become: those are masked. 0x100 - 2^flag is the mask of a byte, four of
  # which, less what leaves the word, are:
  mask = ops.less(ops.constant(0x01010100),
                  ops.shift_left(ops.constant(0x01010101), flag))
  word = ops.both(ops.shift_left(levels, flag), mask)
  return ops.xor(word, ops.constant(0x80808080)) if base else word


def _permute(xp, low, high, selector):
  """Does what PTX's prmt.b32 does in its default mode, on uint32 arrays."""
  table = xp.stack([(word >> np.uint32(8 * i)) & np.uint32(255)
                    for word in (low, high) for i in range(4)])
  out = xp.zeros_like(selector)
  for i in range(4):
    nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
    byte = table[(nibble & np.uint32(7)).astype(np.int32)]
    sign = (byte >> np.uint32(7)) * np.uint32(255)
    byte = xp.where(nibble >> np.uint32(3) != 0, sign, byte)
    out = out | (byte << np.uint32(8 * i))
  return out


def array_ops(xp) -> Ops:
  """The operations on uint32 arrays of NumPy or JAX."""
  return Ops(lambda a, b: a ^ b, lambda a, b: a & b, lambda a, b: a - b,
             lambda a, n: a >> np.uint32(n), lambda a, n: a << n,
             lambda low, high, sel: _permute(xp, low, high, sel),
             lambda value: xp.uint32(value))


def decode_array(packed, fmt: FPFormat, carrier: str, flags=None,
                 base: int = 0):
  """Decodes prepared bytes `[..., K / 2]` to levels `[..., K]` in the carrier.

  What the kernel computes, in NumPy or JAX.

  Args:
    packed: uint8, from `prepare`.
    fmt: of the codes.
    carrier: 'int8' or 'fp8'.
    flags: `[..., K / 16]`, by which `shifted` multiplies levels; or None.
    base: as for `shifted`.
  """
  xp = jnp if isinstance(packed, jax.Array) else np
  groups = packed.reshape(*packed.shape[:-1], -1, 4, 4).astype(np.uint32)
  word = sum(groups[..., i] << np.uint32(8 * i) for i in range(4))
  ops = array_ops(xp)
  halves = decode(word, tables(fmt, carrier), ops)
  if flags is not None:
    flags = flags.reshape(*word.shape[:-1], 2, 1).astype(np.uint32)
    halves = [shifted(half, flags[..., i, :], ops, base)
              for i, half in enumerate(halves)]
  levels = xp.stack([  # [..., group, half, lane, byte]
      xp.stack([half >> np.uint32(8 * i) for i in range(4)], axis=-1)
      for half in halves], axis=-3).astype(np.uint8)
  levels = levels.reshape(*packed.shape[:-1], -1)
  dtype = carriers.DTYPES[carrier][0]
  if xp is np:
    return levels.view(dtype)
  return jax.lax.bitcast_convert_type(levels, dtype)


def prepare(codes, length: int, signed: bool = True):
  """Lays canonical packed weights out as the kernels read them.

  Done once, when a model is loaded.

  Args:
    codes: uint8 `[..., ceil(K / 2), N]` of `layout.pack_halves`, NumPy or
      JAX, of a format of 4 bits.
    length: K.
    signed: whether the format is.

  Returns:
    uint8 `[N', ..., K' / 2]`, N' and K' the next multiples of 64; padded with
    level 0.
  """
  xp = jnp if isinstance(codes, jax.Array) else np
  codes = xp.moveaxis(layout_lib.unpack_halves(codes, length), -1, 0)
  codes = xp.pad(codes, [
      (0, -codes.shape[0] % CHANNELS), *[(0, 0)] * (codes.ndim - 2),
      (0, -length % DEPTH)])
  if signed:
    codes = xp.where(codes == 8, 0, codes)  # -0
    nibbles = codes & 3 | (codes & 4) << 1 | (codes & 8) >> 1
  else:
    nibbles = codes >> 1 | (codes & 1) << 3
  nibbles = nibbles.astype(np.uint8)
  # Lane l of 4 holds codes 4l..4l+3 of either half of its group in one word.
  nibbles = nibbles.reshape(*codes.shape[:-1], -1, 2, 4, 2, 2)
  nibbles = xp.moveaxis(nibbles, -4, -3)
  packed = nibbles[..., 0] | nibbles[..., 1] << 4
  return packed.reshape(*codes.shape[:-1], -1)
