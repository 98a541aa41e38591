"""Prepares images for Inception, in the three conventions in use.

They differ by up to 0.6 of the range -1..1 at a pixel of a 32 x 32 image, so a
FID holds for its convention alone, and so do reference statistics.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.metrics import inception

CONVENTIONS = ('tf', 'pytorch', 'clean')


def check(convention: str) -> None:
  """Raises ValueError unless it is one of CONVENTIONS."""
  if convention not in CONVENTIONS:
    raise ValueError(f'preprocessing {convention!r}: must be one of '
                     f'{", ".join(map(repr, CONVENTIONS))}')


def to_inception(images: jax.Array, convention: str = 'tf') -> jax.Array:
  """Resizes images to 299 x 299 and scales them as a convention says.

  'tf': TensorFlow 1's bilinear resize, whose pixel i lies at i * in / out, and
  (x - 128) / 128: FID's original code, torch-fidelity, ADM.

  'pytorch': bilinear between pixel centres without antialiasing, and
  2 x / 255 - 1: pytorch-fid.

  'clean': bicubic with antialiasing, as Pillow resizes floats, clipped to
  0..255, and (x - 128) / 128: clean-fid (Parmar et al., 2022).

  Args:
    images: uint8 `[N, H, W, C]`, C = 3, or 1 for grey, which is repeated.
    convention: one of CONVENTIONS.

  Returns:
    float32 `[N, 299, 299, 3]`.

  Raises:
    ValueError: another convention or number of channels.
  """
  if images.ndim != 4 or images.shape[-1] not in (1, 3):
    raise ValueError('Inception takes images [N, H, W, C] with C = 1 or 3, got '
                     f'{list(images.shape)}')
  check(convention)
  x = jnp.asarray(images, jnp.float32)
  if convention == 'tf':
    x = (_resize_tf(x) - 128) / 128
  elif convention == 'pytorch':
    shape = (x.shape[0], inception.SIZE, inception.SIZE, x.shape[3])
    x = 2 * jax.image.resize(x / 255, shape, 'bilinear', antialias=False) - 1
  else:
    x = (_resize_pillow(x) - 128) / 128
  return jnp.broadcast_to(x, (*x.shape[:3], 3))


def _resize_tf(x: jax.Array) -> jax.Array:
  """Resizes to 299 x 299, bit for bit as TensorFlow 1 does."""
  for axis in (2, 1):
    size = x.shape[axis]
    # In float32 as there: where `at` is nearly a whole number, its floor
    # decides which two pixels are mixed.
    at = np.arange(inception.SIZE, dtype=np.float32)
    at *= np.float32(size / inception.SIZE)
    low = at.astype(np.int64)
    high = np.minimum(low + 1, size - 1)
    along = [1] * 4
    along[axis] = inception.SIZE
    weight = (at - low.astype(np.float32)).reshape(along)
    low, high = jnp.take(x, low, axis), jnp.take(x, high, axis)
    # The clip changes nothing, but stands between the product and the sum: a
    # compiler that fused them would round once where TensorFlow rounds twice.
    x = low + jnp.clip((high - low) * weight, -256, 256)
  return x


def _resize_pillow(x: jax.Array) -> jax.Array:
  """Pillow's bicubic resize of mode F, as two products."""
  rows, columns = (_pillow_weights(size) for size in x.shape[1:3])
  # Columns first, as Pillow does; floats are not rounded between the passes.
  x = jnp.einsum('nhwc,ow->nhoc', x, columns, precision='highest')
  x = jnp.einsum('nhwc,oh->nowc', x, rows, precision='highest')
  return jnp.clip(x, 0, 255)


@functools.cache
def _pillow_weights(size: int) -> np.ndarray:
  """The weights of a resize, float32 `[299, size]`: each row sums to 1."""
  scale = size / inception.SIZE
  stretch = max(scale, 1.0)  # a smaller image averages
  # Pixel i covers i to i + 1. The kernel reaches 2 pixels of the smaller of
  # both images each way; Pillow rounds where it begins and ends to whole
  # pixels.
  centre = (np.arange(inception.SIZE)[:, None] + 0.5) * scale
  pixel = np.arange(size)[None]
  weights = _cubic((pixel - centre + 0.5) / stretch)
  first = np.floor(centre - 2 * stretch + 0.5)
  last = np.floor(centre + 2 * stretch + 0.5)
  weights[(pixel < first) | (pixel >= last)] = 0
  return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _cubic(x: np.ndarray) -> np.ndarray:
  """Keys' kernel with a = -1/2."""
  x = np.abs(x)
  near = (1.5 * x - 2.5) * x * x + 1
  far = ((-0.5 * x + 2.5) * x - 4) * x + 2
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))
