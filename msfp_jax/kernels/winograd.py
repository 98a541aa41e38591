"""3x3 convolutions of levels with fewer multiplications, exactly.

F(m x m, 3x3) of Lavin and Gray (CVPR 2016, arXiv 1509.09308) in two sizes, with
the fractions of its matrices moved to the end: levels are integers, so are all
transformed values, and the result is divided by a constant without remainder.
In plain float32 the same algorithm loses 3 digits.

- `FLOAT`, m = 4: 4 times fewer multiplications, in float32, which is exact as
  long as no sum of magnitudes exceeds 2^24. `splits` finds out for given
  weights, and cuts the channels where needed.
- `BYTES`, m = 2: 2.25 times fewer, in int8 with sums in int32. `fits` finds out
  whether all transformed values are in int8. Where a CPU multiplies int8 fast
  (see `cpu`) it is the faster one: a quarter of the bytes move.

The last transform is in int32, where a sum may leave the range and come back.
"""

from collections.abc import Callable, Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.kernels import carriers
from msfp_jax.kernels import compiler


# Along one axis, a tile of m + 2 inputs d gives m outputs of the window g by
#
#   y = outputs @ ((weights @ g) * (inputs @ d)) / excess
#
# with m + 2 products in place of 3 m; along both axes (m + 2)^2 in place of
# 9 m^2 (Toom-Cook at the points 0, 1, -1, for m = 4 also 2 and -2, and
# infinity, transposed).
#
#   x [H, W, C] --> 6x6 tiles, 4 apart --> 36 x [tiles, C] --+
#                                                            | 36 products
#   w [3, 3, C, D] --------------------------> 36 x [C, D] --+
#                                                            v
#   y [H, W, D] <-- 4x4 tiles, side by side <-- 36 x [tiles, D]
#
# drawn for m = 4. Lavin and Gray divide the rows of `weights`; here the columns
# of `outputs`, or the rows of `weights`, are multiplied until all are integers.
@dataclasses.dataclass(frozen=True)
class Algorithm:
  """F(m x m, 3x3) in integers.

  Attributes:
    weights: `[m + 2, 3]`.
    inputs: `[m + 2, m + 2]`.
    outputs: `[m, m + 2]`.
    excess: how much too large results are along one axis.
    carrier: a key of `carriers.DTYPES`, in which products are made.
    at_once: bytes of transformed inputs held at once, so that they, and sums of
      4 bytes, stay in the cache.
    images: that are taken at once even so.
  """

  weights: np.ndarray
  inputs: np.ndarray
  outputs: np.ndarray
  excess: int
  carrier: str
  at_once: int
  images: int = 1

  @property
  def tile(self) -> int:
    """m, the side of a tile of outputs."""
    return len(self.outputs)


# Lavin and Gray's rows of `weights` are divided by 4, 6, 6, 24, 24 and 1; here
# the columns of `outputs` have 24 over these.
FLOAT = Algorithm(
    weights=np.array([[1, 0, 0], [-1, -1, -1], [-1, 1, -1], [1, 2, 4],
                      [1, -2, 4], [0, 0, 1]]),
    inputs=np.array([[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0],
                     [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0],
                     [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]),
    outputs=np.array([[6, 4, 4, 1, 1, 0], [0, 4, -4, 2, -2, 0],
                      [0, 4, 4, 4, 4, 0], [0, 4, -4, 8, -8, 24]]),
    excess=24, carrier='f32', at_once=2**24)
# Halves in the two middle rows of `weights`: all of it is twice as large. The
# inputs of E2M1 reach 4 x 12 then, its weights 9 x 12: both are in int8.
BYTES = Algorithm(
    weights=np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]),
    inputs=np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0],
                     [0, 1, 0, -1]]),
    outputs=np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
    # YNN lays the weights out anew for each product: of one large image alone
    # that takes half as long as the product.
    excess=2, carrier='int8', at_once=2**21, images=2)
# From so many channels on, in and out, the transforms cost less than they save.
_LEAST_CHANNELS = 64
# Weights are transformed in every call, which fewer tiles do not pay for.
_LEAST_TILES = 64


def pays(channels: int, outputs: int) -> bool:
  """Whether `conv` can be faster than a plain convolution."""
  return min(channels, outputs) >= _LEAST_CHANNELS


def pays_for(algorithm: Algorithm, shape: Sequence[int], parts: int = 1
             ) -> bool:
  """Whether `conv` is faster for an input `[B, H, W, C]`, weights included."""
  images, height, width, _ = shape
  size = algorithm.tile
  tiles = images * -(-height // size) * -(-width // size)
  return tiles >= _LEAST_TILES * parts


def fits(values: np.ndarray, lowest: float, highest: float) -> bool:
  """Whether `BYTES` holds all transformed values in int8, and sums in int32.

  Args:
    values: the weights, integers `[..., 3, 3, C, D]`; all banks must fit.
    lowest: of the inputs, which are integers.
    highest: likewise.
  """
  values = np.asarray(values, np.int32)
  weights = np.abs(_positions(BYTES, values)).max()
  inputs = _reach(BYTES, lowest, highest).max()
  return (max(weights, inputs) <= 127
          and _results_fit(BYTES, values, lowest, highest))


def splits(values: np.ndarray, lowest: float, highest: float) -> int:
  """Into how many parts `FLOAT` cuts the channels so that all sums are exact.

  Args:
    values: the weights, integers `[..., 3, 3, C, D]`; all banks must fit.
    lowest: of the inputs, which are integers.
    highest: likewise.

  Returns:
    1, 2, 4 or 8; 0 if that is not enough.
  """
  values = np.asarray(values, np.int32)
  if not _results_fit(FLOAT, values, lowest, highest):
    return 0
  positions = np.abs(_positions(FLOAT, values))
  # Sums over channels are in float32, one at each of the 36 positions: at most
  # the largest transformed input there, times the sum of the weights'
  # magnitudes. Halves of the channels have about half of that, and are added up
  # in int32.
  *banks, _, _, channels, outputs = positions.shape
  reach = _reach(FLOAT, lowest, highest)
  for count in (1, 2, 4, 8):
    if channels % count == 0:
      parts = positions.reshape(
          *banks, 6, 6, count, channels // count, outputs)
      largest = parts.sum(-2).max((*range(len(banks)), -2, -1))
      if (largest * reach <= carriers.EXACT_FLOAT32).all():
        return count
  return 0


def _results_fit(algorithm, values, lowest, highest):
  """Whether results are in int32 before they are divided."""
  # What comes before them need not be: integers that wrap around add up to the
  # right ones in the end.
  sums = np.abs(values).sum((-4, -3, -2)).max()
  largest = max(abs(lowest), abs(highest))
  return sums * largest * algorithm.excess**2 <= carriers.EXACT_INT32


def _positions(algorithm, values):
  """Transforms weights `[..., 3, 3, C, D]` -> `[..., m + 2, m + 2, C, D]`."""
  return np.einsum(
      'bj,...ajcd->...abcd', algorithm.weights,
      np.einsum('ai,...ijcd->...ajcd', algorithm.weights, values))


def _reach(algorithm: Algorithm, lowest: float, highest: float) -> np.ndarray:
  """The largest magnitude of transformed inputs, `[m + 2, m + 2]`."""
  # Reached where each of the inputs of a tile is at the end of the range that
  # the sign of its weight asks for. Inputs of one sign reach less far than
  # signed ones.
  weights = np.einsum('ai,bj->abij', algorithm.inputs, algorithm.inputs)
  ends = np.stack([weights * lowest, weights * highest])
  return np.maximum(ends.max(0).sum((2, 3)), -ends.min(0).sum((2, 3)))


def conv(algorithm: Algorithm, x: jax.Array, weights: jax.Array, parts: int,
         prepare: Callable[[jax.Array], jax.Array],
         finish: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """3x3 convolution, stride 1, one pixel of zeros around.

  Images are taken a few at a time, with what comes before and after, so that
  everything between stays in the cache.

  Args:
    algorithm: which one.
    x: `[B, H, W, C]`.
    weights: integers in float32 `[3, 3, C, D]`.
    parts: what `splits` found, or more; 1 for `BYTES`.
    prepare: x -> integers in float32, for some images.
    finish: sums, int32 `[b, H, W, D]` -> result, floating-point.

  Returns:
    finish's results, `[B, H, W, D]`; NaN for images that have one.
  """
  images, height, width, channels = x.shape
  weights = _transform(algorithm.weights, _transform(
      algorithm.weights, weights), axis=1)
  dtype = carriers.DTYPES[algorithm.carrier][0]
  weights = weights.reshape(-1, *weights.shape[2:]).astype(dtype)
  size = algorithm.tile
  tiles = -(-height // size) * -(-width // size)
  each = len(weights) * tiles * (channels // parts) * dtype.dtype.itemsize
  some = next(n for n in range(images, 0, -1) if images % n == 0
              and (n * each <= algorithm.at_once or n <= algorithm.images))

  def run(x):
    # Sums in int32 have no NaN. A maximum of bytes is faster than `any`.
    lost = jnp.isnan(x).astype(jnp.uint8).max((1, 2, 3), keepdims=True)
    out = finish(_convolve(algorithm, prepare(x).astype(dtype), weights, parts))
    return jnp.where(lost > 0, jnp.nan, out)

  if some == images:
    return run(x)
  out = jax.lax.map(run, x.reshape(-1, some, *x.shape[1:]))
  return out.reshape(*x.shape[:3], -1)


def _convolve(algorithm, x, weights, parts):
  """Convolves integers `[b, H, W, C]` to int32 `[b, H, W, D]`."""
  images, height, width, channels = x.shape
  m, n = algorithm.outputs.shape
  tall, wide = -(-height // m), -(-width // m)  # tiles
  # A border of one, and as much at the end as the last tiles need.
  x = jnp.pad(x, ((0, 0), (1, 1 + -height % m), (1, 1 + -width % m), (0, 0)))
  # Barriers keep XLA from computing one stage again for each use in the next.
  once = jax.lax.optimization_barrier
  size, products = channels // parts, 0
  for start in range(0, channels, size):
    part = x[..., start:start + size]
    # [b, h, w, c] -> [n, b, tall, w, c] -> [n, n, b, tall, wide, c]; slice i of
    # an axis has pixel i of every tile.
    part = once(jnp.stack(_combine(algorithm.inputs, [
        part[:, i:i + m * (tall - 1) + 1:m] for i in range(n)])))
    part = once(jnp.stack(_combine(algorithm.inputs, [
        part[..., j:j + m * (wide - 1) + 1:m, :] for j in range(n)]), axis=1))
    # n^2 products of [b * tall * wide, c] and [c, D].
    products += _products(
        part.reshape(n * n, -1, size), weights[:, start:start + size])
  products = products.reshape(n, n, images, tall, wide, -1)
  out = once(_transform(algorithm.outputs, products))
  out = _transform(algorithm.outputs, out, axis=1)
  # [m, m, b, tall, wide, D] -> [b, tall, m, wide, m, D], which are images.
  out = out.transpose(2, 3, 0, 4, 1, 5)
  out = out.reshape(images, m * tall, m * wide, -1)[:, :height, :width]
  return _divide(out, algorithm.excess**2)


def _products(x, weights):
  """Products of `[k, rows, c]` with `[k, c, D]`, int32."""
  if x.dtype == jnp.int8:
    return jnp.stack([compiler.product_of_bytes(*pair) for pair in zip(
        x, weights, strict=True)])
  return jnp.matmul(x, weights).astype(jnp.int32)


def _divide(x, divisor):
  """x / divisor in int32, where there is no remainder."""
  # CPUs have no division of vectors. 2^k leaves by a shift; of what is left, an
  # odd number, the inverse modulo 2^32 multiplies to the quotient.
  shift = (divisor & -divisor).bit_length() - 1
  inverse = np.uint32(pow(divisor >> shift, -1, 2**32)).view(np.int32)
  if inverse != 1:
    x = x * inverse
  return jax.lax.shift_right_arithmetic(x, np.int32(shift))


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
