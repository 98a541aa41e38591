"""3x3 convolutions of levels with 4 times fewer multiplications, exactly.

F(4x4, 3x3) of Lavin and Gray (CVPR 2016, arXiv 1509.09308), with the
fractions of its matrices moved to the end: levels are integers, so are all
transformed values, and the result is divided by 576 without remainder.
Products are summed in float32, which is exact as long as no sum of magnitudes
exceeds 2^24; `splits` finds out for given weights, and cuts the channels where
needed. The last transform is in int32, where a sum may leave the range and
come back. In plain float32 the same algorithm loses 3 digits.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.kernels import carriers

# Along one axis, a tile of 6 inputs d gives 4 outputs of the window g by
#
#   y = _OUTPUTS @ ((_WEIGHTS @ g) * (_INPUTS @ d)) / 24
#
# with 6 products in place of 12; along both axes 36 in place of 144, 4 times
# fewer (Toom-Cook at the points 0, 1, -1, 2, -2 and infinity, transposed).
# Lavin and Gray divide the rows of _WEIGHTS by 4, 6, 6, 24, 24 and 1; here the
# columns of _OUTPUTS are multiplied by 24 over these, so that all entries are
# integers.
#
#   x [H, W, C] --> 6x6 tiles, 4 apart --> 36 x [tiles, C] --+
#                                                            | 36 products
#   w [3, 3, C, D] --------------------------> 36 x [C, D] --+
#                                                            v
#   y [H, W, D] <-- 4x4 tiles, side by side <-- 36 x [tiles, D]
#
# Weights 3 -> 6, inputs 6 -> 6, products 6 -> 4; 24 times too large.
_WEIGHTS = np.array([
    [1, 0, 0], [-1, -1, -1], [-1, 1, -1], [1, 2, 4], [1, -2, 4], [0, 0, 1]])
_INPUTS = np.array([
    [4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]])
_OUTPUTS = np.array([
    [6, 4, 4, 1, 1, 0], [0, 4, -4, 2, -2, 0], [0, 4, 4, 4, 4, 0],
    [0, 4, -4, 8, -8, 24]])
_EXCESS = 24**2  # both axes
# From so many channels on, in and out, the transforms cost less than they save.
_LEAST_CHANNELS = 64
# Weights are transformed in every call, which fewer tiles do not pay for.
_LEAST_TILES = 64
# Transformed inputs held at once: 16 MB, so that they stay in the cache.
_AT_ONCE = 2**22


def pays(channels: int, outputs: int) -> bool:
  """Whether `conv` can be faster than a plain convolution."""
  return min(channels, outputs) >= _LEAST_CHANNELS


def pays_for(shape: Sequence[int], parts: int) -> bool:
  """Whether `conv` is faster for an input `[B, H, W, C]`, weights included."""
  images, height, width, _ = shape
  tiles = images * -(-height // 4) * -(-width // 4)
  return tiles >= _LEAST_TILES * parts


def splits(values: np.ndarray, lowest: float, highest: float) -> int:
  """Into how many parts the channels are cut so that all sums are exact.

  Args:
    values: the weights, integers `[..., 3, 3, C, D]`; all banks must fit.
    lowest: of the inputs, which are integers.
    highest: likewise.

  Returns:
    1, 2, 4 or 8; 0 if that is not enough.
  """
  values = np.asarray(values, np.int32)
  # The result, before it is divided, must be in int32. What comes before it
  # need not: integers that wrap around add up to the right ones in the end.
  sums = np.abs(values).sum((-4, -3, -2)).max()
  largest = max(abs(lowest), abs(highest))
  if sums * largest * _EXCESS > carriers.EXACT_INT32:
    return 0
  positions = np.abs(np.einsum(
      'bj,...ajcd->...abcd', _WEIGHTS,
      np.einsum('ai,...ijcd->...ajcd', _WEIGHTS, values)))
  # Sums over channels are in float32, one at each of the 36 positions: at most
  # the largest transformed input there, times the sum of the weights'
  # magnitudes. Halves of the channels have about half of that, and are added up
  # in int32.
  *banks, _, _, channels, outputs = positions.shape
  reach = _reach(lowest, highest)
  for count in (1, 2, 4, 8):
    if channels % count == 0:
      parts = positions.reshape(
          *banks, 6, 6, count, channels // count, outputs)
      largest = parts.sum(-2).max((*range(len(banks)), -2, -1))
      if (largest * reach <= carriers.EXACT_FLOAT32).all():
        return count
  return 0


def _reach(lowest: float, highest: float) -> np.ndarray:
  """The largest magnitude of transformed inputs at every position, `[6, 6]`."""
  # Reached where each of the 36 inputs is at the end of the range that the sign
  # of its weight asks for. Inputs of one sign reach less far than signed ones.
  weights = np.einsum('ai,bj->abij', _INPUTS, _INPUTS)
  ends = np.stack([weights * lowest, weights * highest])
  return np.maximum(ends.max(0).sum((2, 3)), -ends.min(0).sum((2, 3)))


def conv(x: jax.Array, weights: jax.Array, parts: int,
         prepare: Callable[[jax.Array], jax.Array],
         finish: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """3x3 convolution, stride 1, one pixel of zeros around.

  Images are taken a few at a time, with what comes before and after, so that
  everything between stays in the cache.

  Args:
    x: `[B, H, W, C]`.
    weights: integers in float32 `[3, 3, C, D]`.
    parts: what `splits` found, or more.
    prepare: x -> integers in float32, for some images.
    finish: sums, int32 `[b, H, W, D]` -> result, floating-point.

  Returns:
    finish's results, `[B, H, W, D]`; NaN for images that have one.
  """
  images, height, width, channels = x.shape
  weights = _transform(_WEIGHTS, _transform(_WEIGHTS, weights), axis=1)
  weights = weights.reshape(36, *weights.shape[2:])
  # 36 values for 16 pixels: transformed, an image takes 2.25 times its room.
  each = 36 * -(-height // 4) * -(-width // 4) * (channels // parts)
  some = next(n for n in range(images, 0, -1)
              if images % n == 0 and (n * each <= _AT_ONCE or n == 1))

  def run(x):
    x = prepare(x)
    out = finish(_convolve(x, weights, parts))
    # int32 has no NaN.
    lost = jnp.isnan(x).any((1, 2, 3), keepdims=True)
    return jnp.where(lost, jnp.nan, out)

  if some == images:
    return run(x)
  out = jax.lax.map(run, x.reshape(-1, some, *x.shape[1:]))
  return out.reshape(*x.shape[:3], -1)


def _convolve(x, weights, parts):
  """Convolves integers `[b, H, W, C]` to int32 `[b, H, W, D]`."""
  images, height, width, channels = x.shape
  tall, wide = -(-height // 4), -(-width // 4)  # tiles
  # A border of one, and as much at the end as the last tiles need.
  x = jnp.pad(x, ((0, 0), (1, 1 + -height % 4), (1, 1 + -width % 4), (0, 0)))
  # Barriers keep XLA from computing one stage again for each use in the next.
  once = jax.lax.optimization_barrier
  size, products = channels // parts, 0
  for start in range(0, channels, size):
    part = x[..., start:start + size]
    # [b, h, w, c] -> [6, b, tall, w, c] -> [6, 6, b, tall, wide, c]; slice i of
    # an axis has pixel i of every tile.
    part = once(jnp.stack(_combine(
        _INPUTS, [part[:, i:i + 4 * tall - 3:4] for i in range(6)])))
    part = once(jnp.stack(_combine(
        _INPUTS, [part[..., j:j + 4 * wide - 3:4, :] for j in range(6)]),
                          axis=1))
    # 36 products of [b * tall * wide, c] and [c, D].
    products += jnp.matmul(
        part.reshape(36, -1, size), weights[:, start:start + size]
    ).astype(jnp.int32)
  products = products.reshape(6, 6, images, tall, wide, -1)
  out = once(_transform(_OUTPUTS, products))
  out = _transform(_OUTPUTS, out, axis=1)
  # [4, 4, b, tall, wide, D] -> [b, tall, 4, wide, 4, D], which are images.
  out = out.transpose(2, 3, 0, 4, 1, 5)
  out = out.reshape(images, 4 * tall, 4 * wide, -1)[:, :height, :width]
  return out // _EXCESS  # without remainder


def _transform(matrix: np.ndarray, x: jax.Array, axis: int = 0) -> jax.Array:
  """Multiplies an axis of x by a matrix."""
  parts = [jax.lax.index_in_dim(x, i, axis, keepdims=False)
           for i in range(x.shape[axis])]
  return jnp.stack(_combine(matrix, parts), axis)


def _combine(matrix: np.ndarray, parts: list) -> list:
  """Multiplies a list of arrays by a matrix, as if they were its column."""
  # Sums of whole slices, as a product with a 6x6 matrix would be a tiny one;
  # entries that are 0 cost nothing.
  return [sum(int(weight) * part for weight, part
              in zip(row, parts, strict=True) if weight) for row in matrix]
