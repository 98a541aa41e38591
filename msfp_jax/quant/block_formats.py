"""The block formats that recipes use: bits -> quantizers, by their standards.

At 4 bits these are NVFP4, MXFP4 and INT4; at other widths, which exceptions
have, their elements have more or fewer digits.
"""

from collections.abc import Sequence

from msfp_jax.quant import numbers
from msfp_jax.quant.block import Block
from msfp_jax.quant.fit import Seen
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantizers import Quantizer


def nvfp4(bits: int) -> Block:
  """E2M1 in groups of 16, scales in e4m3 below one of the tensor (NVIDIA).

  Its scales are good for 4 bits alone, as their 3 digits cut off up to 6 % of
  a group's maximum: elements of other widths are integers under bfloat16.
  """
  if bits != 4:
    return int_group(bits, 16)
  return Block(FPFormat(2, 1), 'group', 16, 'e4m3', two_level=True)


def mxfp4(bits: int, rule: str = 'floor') -> Block:
  """E2M1 in groups of 32, scales that are powers of two (OCP MX 1.0).

  Args:
    bits: of an element.
    rule: of `block.RULES`; OCP's own is 'floor'.
  """
  return Block(FPFormat(2, bits - 3), 'group', 32, 'e8m0', rule=rule)


def int_group(bits: int, group: int = 64) -> Block:
  """Symmetric integers in groups, a scale of 16 bits each."""
  # A sign and bits - 1 of magnitude: -7 to 7 at 4 bits. The grid's digits are
  # those of one binade and of the one below it, all alike.
  return Block(FPFormat(1, bits - 2), 'group', group, 'bf16')


def int_minmax(bits: int, group: int = 64) -> Block:
  """Integers from a group's minimum, its zero point, to its maximum."""
  return Block(numbers.int_format(bits), 'group', group, 'bf16')


def int_image(bits: int) -> Block:
  """Integers from an image's minimum, its zero point, to its maximum."""
  return Block(numbers.int_format(bits), 'image', 0, 'bf16')


def signed_candidates(shared: str, group: int = 0):
  """(bits, what was seen) -> signed formats with scales from the data.

  Args:
    shared: what shares a scale, see `Block`.
    group: of 'group'.
  """
  def make(bits: int, seen: Seen) -> Sequence[Quantizer]:
    del seen
    return [Block(fmt, shared, group, 'bf16')
            for fmt in numbers.formats_of_width(bits, signed=True)]
  return make


def mixup_candidates(shared: str, group: int = 0):
  """Likewise, and unsigned formats above a zero point from calibration."""
  signed = signed_candidates(shared, group)

  def make(bits: int, seen: Seen) -> Sequence[Quantizer]:
    # Values below the zero point become it. So all the way down to the least
    # value that was seen, half of it, or not at all.
    lowest = min(float(seen.minimum), 0.0)
    return [*signed(bits, seen), *[
        Block(fmt, shared, group, 'bf16', zero_point=zero)
        for fmt in numbers.formats_of_width(bits, signed=False)
        for zero in sorted({lowest, lowest / 2, 0.0})]]
  return make


def unsigned_minmax(bits: int, seen: Seen) -> Sequence[Quantizer]:
  """Unsigned formats from a group's minimum on, for weights.

  As SDNQ stores weights: unsigned floating point with the minimum as zero
  point, 64 neighbours of 4 bits each. It leaves the format to its user.
  """
  del seen
  return [Block(fmt, 'group', 64, 'bf16')
          for fmt in numbers.formats_of_width(bits, signed=False)]
