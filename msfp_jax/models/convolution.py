"""3x3 convolutions on the CPU with 2.25 times fewer multiplications.

XLA's own convolution runs at the speed of a matrix product there, so only
fewer products make it faster. Elsewhere the hardware's convolution is better.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# With a tile d of 4x4 inputs, a window g of 3x3 weights and transforms along
# both axes, Winograd's F(2x2, 3x3) is
#
#   y [2, 2] = A^T [ (G g G^T) * (B^T d B) ] A        (* element by element)
#
#   . . . .
#   . y y .     16 products for 4 pixels, where 4 windows take 36. Tiles overlap
#   . y y .     by 2 pixels, as windows reach one beyond theirs.
#   . . . .
#
# Over C channels and all tiles, each of the 16 positions is one matrix product
# [tiles, C] x [C, D]. F(4x4, 3x3) would save more, and lose 3 digits of floats.

# From so many channels on, in and out, the transforms cost less than they save.
_LEAST_CHANNELS = 128
# Transformed values held at once: 64 MB; larger batches are taken in parts.
_AT_ONCE = 2**24
_WINDOW, _STRIDES, _PADDING = (3, 3), (1, 1), [(1, 1), (1, 1)]
_DIMENSIONS = ('NHWC', 'HWIO', 'NHWC')
# G of F(2, 3): 3 weights -> 4.
_WEIGHTS = np.array([[1, 0, 0], [.5, .5, .5], [.5, -.5, .5], [0, 0, 1]],
                    np.float32)


def conv_general_dilated(x: jax.Array, kernel: jax.Array,
                         strides: Sequence[int], padding: Any,
                         **options: Any) -> jax.Array:
  """`lax.conv_general_dilated`, by `winograd` where that is faster.

  A drop-in for `nn.Conv(conv_general_dilated=...)`. Gradients are those of the
  plain convolution.
  """
  plain = lambda x, kernel: jax.lax.conv_general_dilated(
      x, kernel, strides, padding, **options)
  # Chosen where the program is lowered, not here: the default device need not
  # be the one that it is compiled for.
  if not _fits(x, kernel, strides, padding, options):
    return plain(x, kernel)
  return jax.lax.platform_dependent(x, kernel, cpu=_fast, default=plain)


# Tells those who replace an nn.Conv by its product that this is one.
conv_general_dilated.is_convolution = True


def _fits(x, kernel, strides, padding, options):
  """Whether `winograd` computes this convolution, and pays."""
  ones = (None, 1, (1, 1), [1, 1])
  return (x.dtype == kernel.dtype == jnp.float32
          and kernel.shape[:2] == _WINDOW and tuple(strides) == _STRIDES
          and not isinstance(padding, str)
          and [tuple(side) for side in padding] == _PADDING
          and min(kernel.shape[2:]) >= _LEAST_CHANNELS
          and options.get('feature_group_count', 1) == 1
          and options.get('lhs_dilation') in ones
          and options.get('rhs_dilation') in ones
          and options.get('preferred_element_type') in (None, jnp.float32))


@jax.custom_vjp
def _fast(x, kernel):
  # The largest number of images that divides the batch and fits, or one.
  images, height, width, channels = x.shape
  each = 16 * -(-height // 2) * -(-width // 2) * channels
  part = next(n for n in range(images, 0, -1)
              if images % n == 0 and (n * each <= _AT_ONCE or n == 1))
  if part == images:
    return winograd(x, kernel)
  out = jax.lax.map(lambda some: winograd(some, kernel),
                    x.reshape(images // part, part, *x.shape[1:]))
  return out.reshape(*x.shape[:3], kernel.shape[-1])


def _forward(x, kernel):
  return _fast(x, kernel), (x, kernel)


# Of the plain convolution: XLA would else differentiate every slice and sum.
def _backward(residuals, gradient):
  plain = lambda x, kernel: jax.lax.conv_general_dilated(
      x, kernel, _STRIDES, _PADDING, dimension_numbers=_DIMENSIONS)
  return jax.vjp(plain, *residuals)[1](gradient)


_fast.defvjp(_forward, _backward)


def winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """3x3 convolution, stride 1, one pixel of zeros around; F(2x2, 3x3).

  Every 2x2 pixels of the result come from 4x4 of the input by 16 products
  where there were 36. Source: Lavin and Gray, CVPR 2016, arXiv 1509.09308.

  Args:
    x: `[B, H, W, C]` float32.
    kernel: `[3, 3, C, D]`.

  Returns:
    `[B, H, W, D]`.
  """
  images, height, width, channels = x.shape
  tall, wide = -(-height // 2), -(-width // 2)  # tiles
  # One pixel around, and one more where an odd side leaves half a tile. Then
  # rows[i] has row i of all tiles, tiles[i][j] pixel (i, j): [B, tall, wide,
  # C].
  x = jnp.pad(x, ((0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0)))
  rows = _inputs([x[:, i:i + 2 * tall - 1:2] for i in range(4)])
  tiles = [_inputs([row[:, :, j:j + 2 * wide - 1:2] for j in range(4)])
           for row in rows]
  weights = jnp.einsum('ai,bj,ijcd->abcd', _WEIGHTS, _WEIGHTS, kernel,
                       precision='highest')
  products = [[jnp.matmul(tiles[i][j].reshape(-1, channels), weights[i, j])
               for j in range(4)] for i in range(4)]
  # Back along one axis, 4 x 4 -> 2 x 4, then along the other, -> 2 x 2.
  columns = [_outputs([products[i][j] for i in range(4)]) for j in range(4)]
  pixels = [_outputs([columns[j][p] for j in range(4)]) for p in range(2)]
  out = jnp.stack([jnp.stack(row, axis=1) for row in pixels], axis=1)
  # Pixels of a tile beside those of its neighbours; the padding is cut off.
  out = out.reshape(images, tall, wide, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
  return out.reshape(images, 2 * tall, 2 * wide, -1)[:, :height, :width]


def _inputs(a):
  """Transforms 4 inputs along one axis: B^T of F(2, 3)."""
  return [a[0] - a[2], a[1] + a[2], a[2] - a[1], a[1] - a[3]]


def _outputs(a):
  """Transforms 4 products along one axis to 2 results: A^T of F(2, 3)."""
  return [a[0] + a[1] + a[2], a[1] - a[2] - a[3]]
