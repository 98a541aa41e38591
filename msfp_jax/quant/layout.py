"""How the elements of a quantized tensor lie in memory, and in files.

A `QTensor` holds its elements in one of these layouts. A chip's kernels may
have a layout of their own: a subclass of `Layout` in that chip's folder.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.quant import functional
from msfp_jax.quant.numbers import FPFormat


@dataclasses.dataclass(frozen=True)
class Layout:
  """Turns stored data into codes and levels; see the subclasses.

  `length` is the number of elements along axis -2, which some layouts halve.
  """

  @property
  def name(self) -> str:
    return type(self).__name__.lower()

  def codes(self, data: jax.Array, fmt: FPFormat, length: int) -> jax.Array:
    """uint8 codes, one an element."""
    raise NotImplementedError

  def levels(self, data: jax.Array, fmt: FPFormat, length: int) -> jax.Array:
    """The codes' values before scale and zero point, float32."""
    # Decoded with a scale of 1: what comes out are the levels of the format,
    # which products keep exact until the very end.
    return functional.decode(self.codes(data, fmt, length), fmt, np.float32(1))

  def window(self, data: Any) -> tuple[int, ...]:
    """Of weights of one set, the window, `()` of a dense layer's."""
    return tuple(data.shape[:-2])

  def size(self, data: Any, length: int) -> int:
    """How many elements there are."""
    del length
    return int(np.prod(data.shape))


class Levels(Layout):
  """Levels in float32, not packed: inputs, and weights of a simulation."""

  def codes(self, data, fmt, length):
    del length
    return functional.encode(data, fmt, np.float32(1))

  def levels(self, data, fmt, length):
    del fmt, length
    return data


class Bytes(Layout):
  """One code a byte: formats of more than 4 bits, in memory."""

  def codes(self, data, fmt, length):
    del fmt, length
    return data


class Nibbles(Layout):
  """Two codes a byte, formats of up to 4 bits; see `pack_halves`."""

  def codes(self, data, fmt, length):
    del fmt
    return unpack_halves(data, length)

  def size(self, data, length):
    # An odd length has half a byte of padding, which is no element.
    return int(np.prod(data.shape)) // data.shape[-2] * length


# Codes that become a stream of bits at once, or come of one: a bit takes a byte
# meanwhile, of a large layer more than the layer. Of so many a piece of the
# stream is of whole bytes, whatever the bits of a code.
_AT_ONCE = 2**18
# Layouts have no fields, so those of a class are equal: compare them with ==.
LEVELS, BYTES, NIBBLES = Levels(), Bytes(), Nibbles()


def packed_layout(fmt: FPFormat) -> Layout:
  """The layout in memory of packed codes of a format."""
  return NIBBLES if fmt.bits <= 4 else BYTES


def pack_halves(codes: np.ndarray) -> np.ndarray:
  """4-bit codes `[..., K, N]` -> bytes `[..., ceil(K / 2), N]`.

  Byte k holds code k in its low nibble and code k + ceil(K / 2) in its high
  one (a code of 0 beyond an odd K), so that a kernel multiplies the two halves
  of x by the two nibbles and never interleaves.

  Raises:
    ValueError: a code exceeds 15.
  """
  if codes.size and codes.max() > 15:
    raise ValueError(f'codes go up to {codes.max()}, but half a byte holds at '
                     'most 15')
  # K = 5 codes of a column:
  #
  #   byte          0    1    2
  #   low nibble    c0   c1   c2
  #   high nibble   c3   c4   0
  half = -(-codes.shape[-2] // 2)
  low, high = codes[..., :half, :], codes[..., half:, :]
  missing = 2 * half - codes.shape[-2]
  high = np.pad(high, [(0, 0)] * (codes.ndim - 2) + [(0, missing), (0, 0)])
  return np.uint8(low | high << 4)


def unpack_halves(packed: jax.Array, length: int) -> jax.Array:
  """The inverse of `pack_halves`; NumPy or JAX, `length` is K."""
  xp = jnp if isinstance(packed, jax.Array) else np
  both = xp.concatenate([packed & 15, packed >> 4], axis=-2)
  return both[..., :length, :]


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
  """Codes as a stream of `bits` bits each, the lowest bit first: a file's.

  Args:
    codes: uint8 below 2^bits, any shape.
    bits: of a code.

  Returns:
    uint8 `[ceil(size * bits / 8)]`.
  """
  # Codes 5 (101) and 3 (011) of 3 bits: the stream 1 0 1 1 1 0, the byte
  # 0b011101. Files alone: 6-bit codes a byte each would waste a quarter of the
  # room, but in memory a kernel wants to find a code without shifting across
  # bytes.
  flat = codes.reshape(-1, 1)
  packed = [np.packbits(np.unpackbits(
      flat[first:first + _AT_ONCE], axis=1, bitorder='little')[:, :bits],
                        bitorder='little')
            for first in range(0, len(flat), _AT_ONCE)]
  return np.concatenate([np.zeros(0, np.uint8), *packed])


def unpack_bits(packed: np.ndarray, bits: int, shape: tuple[int, ...]
                ) -> np.ndarray:
  """The inverse of `pack_bits`, uint8 of `shape`."""
  codes = np.empty(int(np.prod(shape)), np.uint8)
  for first in range(0, codes.size, _AT_ONCE):
    part = codes[first:first + _AT_ONCE]
    each = np.unpackbits(packed[first * bits // 8:], count=part.size * bits,
                         bitorder='little')
    part[:] = np.packbits(each.reshape(part.size, bits), axis=1,
                          bitorder='little')[:, 0]
  return codes.reshape(shape)
