"""QTensor: the only form of quantized data.

With level() the value of a code in its number format, an element is

    x = outer * scale * level(code) * 2^shift + zero_point

where a negative level's scale may be `negative` times that of a positive one.
With a format `wide`, of more steps, shifted steps of the code's format are
steps of that one: 5 << 3 = 40 of E1M2 (codes 0 to 7) is 40 of E1M6 (0 to 127).
`scale`, `zero_point` and `shift` broadcast to the tensor, except along the
axis of the contraction (-1 of inputs, -2 of weights), where each entry stands
for a group of neighbours: `group` of them for scale and zero point,
`shift_group` for shift. The last group may be shorter.

    tensor              scale                 one scale for ...
    x [B, H, W, C]      []                    the tensor
                        [B, 1, 1, 1]          an image
                        [B, H, W, 1]          a pixel, or token
                        [B, H, W, C / 16]     16 channels of a pixel
    w [kh, kw, I, O]    [1, 1, 1, O]          an output channel
                        [kh, kw, I / 16, O]   16 inputs of an output
"""

import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.quant import functional
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant.numbers import FPFormat

# A dense layer's weights [I, O] with I = 10 and group = 4, the last one short:
#
#   data [10, O]         scale [3, O]
#   rows 0 to 3   <---   row 0
#   rows 4 to 7   <---   row 1
#   rows 8 and 9  <---   row 2
#
# `spread` repeats the rows of scale to [12, O] and cuts them to [10, O]. Axes
# are counted from the end everywhere, so that an axis of banks in front, [h, I,
# O], changes nothing.
_static = lambda **options: flax.struct.field(pytree_node=False, **options)
# For methods of many operations: called by themselves, every one of these would
# be compiled for every shape. In other programs it changes nothing.
_compiled = functools.partial(jax.jit, inline=True)
SHIFT_BITS = 3  # a shift is 0 to 4, of 3 bits to 5


@flax.struct.dataclass
class QTensor:
  """A quantized tensor, or h of them along a first axis (banks).

  Attributes:
    data: the elements, in `layout`.
    scale: float32, or the float8 type in which a format keeps it. Of fewer
      axes than the tensor: all banks share it.
    zero_point: float32, or None.
    shift: uint8, or None.
    outer: float32, a second level of scales, one for the tensor; or None.
    negative: float32 `[]`, the scale of negative levels over that of the
      others; None where all have one.
    fmt: the numbers that codes stand for.
    length: elements along the contraction.
    axis: of the contraction, -1 or -2.
    group: elements that share a scale along the contraction; 0 for all.
    shift_group: elements that share a shift.
    layout: how `data` lies in memory.
    wide: the numbers that levels with their shifts are, of as many steps or
      more; None for `fmt`.
  """

  data: jax.Array
  scale: jax.Array
  zero_point: jax.Array | None = None
  shift: jax.Array | None = None
  outer: jax.Array | None = None
  negative: jax.Array | None = None
  fmt: FPFormat = _static(kw_only=True)
  length: int = _static(kw_only=True)
  axis: int = _static(default=-1)
  group: int = _static(default=0)
  shift_group: int = _static(default=0)
  layout: layout_lib.Layout = _static(default=layout_lib.LEVELS)
  wide: FPFormat | None = _static(default=None)

  @property
  def numbers(self) -> FPFormat:
    """The format whose values `levels` returns, shifts included."""
    return self.wide or self.fmt

  @property
  def is_packed(self) -> bool:
    """Whether the elements are stored as codes."""
    return self.layout != layout_lib.LEVELS

  @property
  def scales_outputs(self) -> bool:
    """Whether scales have the last axis of `data`: of weights, the outputs."""
    return jnp.shape(self.scale)[-1:] == jnp.shape(self.data)[-1:]

  @property
  def window(self) -> tuple[int, ...]:
    """Of weights of one set, the window, `()` of a dense layer's."""
    return self.layout.window(self.data)

  @property
  def size(self) -> int:
    """How many elements there are, all banks counted."""
    return self.layout.size(self.data, self.length)

  @property
  def nbits(self) -> int:
    """Bits that the tensor takes, everything counted.

    Codes, scales, zero points and shifts: the one size that tables, files and
    reports use.
    """
    # By the format's bits and not by data.nbytes: a simulation keeps levels in
    # float32, and has the size that its codes would have.
    bits = self.size * self.fmt.bits
    for part in (self.scale, self.zero_point, self.outer, self.negative):
      if part is not None:
        bits += 8 * math.prod(part.shape) * np.dtype(part.dtype).itemsize
    if self.shift is not None:
      bits += SHIFT_BITS * math.prod(self.shift.shape)
    return bits

  def codes(self) -> jax.Array:
    """uint8, one an element."""
    return self.layout.codes(self.data, self.fmt, self.length)

  def levels(self) -> jax.Array:
    """Values before scale and zero point, their shifts applied; float32."""
    levels = self.layout.levels(self.data, self.fmt, self.length)
    if self.shift is None:
      return levels
    # Exact: a power of two changes the exponent of a level, not its digits.
    return levels * self._shift_factors()

  def _shift_factors(self) -> jax.Array:
    """2^shift of every element, float32."""
    factor = (1 << jnp.asarray(self.shift, jnp.int32)).astype(jnp.float32)
    factor *= np.float32(self.numbers.step / self.fmt.step)
    return self.spread(factor, self.shift_group)

  def scales(self) -> jax.Array:
    """Both levels of scales in one, float32, by group."""
    # The product is rounded, but only here: `Block.quantize` divides by this
    # very number, so levels belong to the scale that is read back.
    scale = jnp.asarray(self.scale, jnp.float32)
    return scale if self.outer is None else scale * self.outer

  def steps(self) -> jax.Array:
    """What 1 in a code's level is worth, float32; broadcasts to the tensor."""
    scales = self.spread(self.scales())
    return scales if self.shift is None else scales * self._shift_factors()

  def element_scales(self, levels: jax.Array) -> jax.Array:
    """The scale of every one of `levels`, or what broadcasts to these."""
    scales = self.spread(self.scales())
    if self.negative is None:
      return scales
    return jnp.where(levels < 0, scales * self.negative, scales)

  def halves(self) -> 'tuple[QTensor, ...]':
    """Tensors with one scale for both signs, whose sum this one is."""
    if self.negative is None:
      return (self,)
    levels = self.levels()
    # An element is in one of them, and 0 in the other.
    half = lambda levels, scale: self.replace(
        data=levels, scale=scale, negative=None, shift=None, fmt=self.numbers,
        wide=None, layout=layout_lib.LEVELS)
    return (half(jnp.maximum(levels, 0.0), self.scale),
            half(jnp.minimum(levels, 0.0), self.scale * self.negative))

  def spread(self, parts: jax.Array, group: int | None = None) -> jax.Array:
    """One entry a group -> one an element, along the contraction."""
    if jnp.ndim(parts) < -self.axis or parts.shape[self.axis] == 1:
      return parts
    # A size of 1 is left to broadcasting: no copy of the tensor's size.
    whole = jnp.repeat(parts, self.group if group is None else group,
                       axis=self.axis)
    axis = whole.ndim + self.axis
    return jax.lax.slice_in_dim(whole, 0, self.length, axis=axis)

  @_compiled
  def dequantize(self) -> jax.Array:
    """The elements themselves, float32."""
    levels = self.levels()
    x = levels * self.element_scales(levels)
    if self.zero_point is None:
      return x
    return x + self.spread(jnp.asarray(self.zero_point, jnp.float32))

  @_compiled
  def with_levels_of(self, x: jax.Array) -> 'QTensor':
    """The tensor with the levels that are nearest to x, at the same scales."""
    zero = (0 if self.zero_point is None
            else self.spread(self.zero_point.astype(jnp.float32)))
    # A group of zeros, or one whose scale rounds to 0, has levels of 0.
    # By the scales as they are stored, rounded to their type: the levels make
    # up for what the rounding of the scale did.
    divisor = self.steps()
    # Two levels of scales, or a shift, may leave a product of both that no
    # device need keep.
    empty = divisor < functional.TINY
    return self.replace(layout=layout_lib.LEVELS, data=functional.nearest_level(
        jnp.where(empty, 0.0, x - zero), self.fmt,
        jnp.where(empty, 1.0, divisor)))

  def bank(self, index: Any) -> 'QTensor':
    """One of h tensors; `index` may be traced."""
    # What has as many axes as the data has one of banks too, and is taken
    # apart; what has fewer serves all banks and stays:
    #
    #   data [h, kh, kw, I, O]   scale [h, kh, kw, I / 16, O]   its own: Block
    #                            scale [1, 1, 1, O]             shared: Static
    #
    # So no field has to say which of a quantizer's arrays are banked, and both
    # keep fitting to the data of one bank, [kh, kw, I, O].
    axes = jnp.ndim(self.data)
    return jax.tree.map(
        lambda part: part[index] if jnp.ndim(part) == axes else part, self)

  def packed(self) -> 'QTensor':
    """The same tensor as codes, in NumPy; a packed one stays as it is.

    Raises:
      ValueError: an element is NaN, which no code stands for.
    """
    if self.is_packed:
      return self
    tensor = jax.tree.map(np.asarray, self)
    if nans := np.isnan(tensor.data).sum():
      raise ValueError(f'{nans} of {tensor.data.size} weights are NaN')
    codes = _encode(tensor.data, self.fmt)
    layout = layout_lib.packed_layout(self.fmt)
    if layout == layout_lib.NIBBLES:
      codes = layout_lib.pack_halves(codes)
    return dataclasses.replace(tensor, data=codes, layout=layout)

  def unpacked(self) -> 'QTensor':
    """The inverse of `packed`: as levels in float32, in NumPy."""
    if not self.is_packed:
      return self
    codes = np.asarray(self.layout.codes(self.data, self.fmt, self.length))
    # A table, as every shape that JAX decodes it compiles for.
    values = np.float32(self.fmt.values())
    return dataclasses.replace(
        self, data=values[codes & (2**self.fmt.bits - 1)],
        layout=layout_lib.LEVELS)


# Elements that are encoded at once: one compilation for a format.
_AT_ONCE = 2**18


def _encode(levels: np.ndarray, fmt: FPFormat) -> np.ndarray:
  # resize fills the last piece with repeats, which are cut off again. By piece,
  # as of all of a large layer it would make two copies.
  flat = np.ravel(levels)
  codes = [np.asarray(functional.encode(
      np.resize(flat[first:first + _AT_ONCE], _AT_ONCE), fmt, np.float32(1)))
           for first in range(0, flat.size, _AT_ONCE)]
  return np.concatenate(codes)[:levels.size].reshape(levels.shape)
