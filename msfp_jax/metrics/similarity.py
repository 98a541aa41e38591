"""Compares two sets of images, image by image."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax import data

PSNR_CAP = 100.0  # dB; what equal images of bytes count as
# Of SSIM: a Gaussian window, and constants that keep flat areas stable.
_SIDE, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
_ROWS = 256  # images compared at once


def psnr(a: data.Images, b: data.Images) -> float:
  """Peak signal-to-noise ratio in dB, the mean over the images.

  Args:
    a, b: uint8 `[N, H, W, C]` of one shape; image i of `a` is compared with
      image i of `b`, so make both from the same noise.

  Raises:
    ValueError: not uint8, not four axes, different shapes, or no images.
  """
  return float(np.mean(np.concatenate([
      decibels(x, y) for x, y in pairs('psnr', a, b)])))


def decibels(a: np.ndarray, b: np.ndarray, peak: float = 255.0,
             cap: float = PSNR_CAP) -> np.ndarray:
  """10 log10(peak^2 / mse) of every image, float64 `[N]`.

  Args:
    a, b: `[N, H, W, C]` of one shape and any real type.
    peak: the width of the images' range: 2 of floats in [-1, 1].
    cap: the ratio of equal images is infinite; they count as this, so that
      means stay finite. Floats that differ by roundings alone reach 140 dB.
  """
  # Image by image: float64 copies of a whole chunk would be large.
  error = np.array([np.mean(np.square(x.astype(np.float64) - y))
                    for x, y in zip(a, b, strict=True)])
  floor = peak**2 / 10 ** (cap / 10)
  return 10 * np.log10(peak**2 / np.maximum(error, floor))


def can_ssim(shape: tuple[int, ...]) -> bool:
  """Whether images `[N, H, W, C]` of a shape are as large as SSIM's window."""
  return min(shape[1:3]) >= _SIDE


def ssim(a: data.Images, b: data.Images) -> float:
  """Structural similarity, the mean over the images: 1 for equal ones.

  With a Gaussian window of 11 x 11 pixels and deviation 1.5, wherever it fits
  into the image, channel by channel. Source: Wang et al., IEEE Transactions
  on Image Processing 13(4), 2004.

  Args:
    a, b: as in `psnr`, at least 11 pixels high and wide.

  Raises:
    ValueError: as in `psnr`, or images that are too small.
  """
  if not can_ssim(a.shape):
    raise ValueError(f'ssim: images of {list(a.shape[1:3])} pixels are smaller '
                     f'than the window of {_SIDE} x {_SIDE}')
  return float(np.mean(np.concatenate([
      np.asarray(_ssim(x, y), np.float64)
      for x, y in pairs('ssim', a, b)])))


@jax.jit
def _ssim(a: jax.Array, b: jax.Array) -> jax.Array:
  """The structural similarity of every pair of images, `[N]`."""
  planes = lambda x: jnp.moveaxis(x, -1, 1).reshape(-1, *x.shape[1:3], 1)
  # Around 0, where float32 subtracts squares with the least loss.
  x, y = (planes(data.to_float(image)) / 2 for image in (a, b))
  # SSIM = (2 mx my + C1) (2 cov + C2) / ((mx^2 + my^2 + C1) (vx + vy + C2)),
  # with Gaussian means and variances around every place, then its mean.
  mean_x, mean_y = _blur(x), _blur(y)
  var_x = _blur(x * x) - mean_x**2
  var_y = _blur(y * y) - mean_y**2
  cov = _blur(x * y) - mean_x * mean_y
  # Variances do not depend on where 0 is, means do: back to 0..1.
  mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
  found = ((2 * mean_x * mean_y + _C1) * (2 * cov + _C2)
           / ((mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2)))
  return found.reshape(len(a), -1).mean(axis=1)


def _blur(x: jax.Array) -> jax.Array:
  """Gaussian means wherever the window fits; x is `[N, H, W, 1]`."""
  places = np.arange(_SIDE) - _SIDE // 2
  window = np.exp(-places**2 / (2 * _SIGMA**2))
  window = np.float32(window / window.sum())
  # A Gaussian is a product of its axes: two windows of 11 in place of one of
  # 121.
  for shape in ((-1, 1, 1, 1), (1, -1, 1, 1)):
    x = jax.lax.conv_general_dilated(
        x, window.reshape(shape), (1, 1), 'VALID',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=jax.lax.Precision.HIGHEST)
  return x


def pairs(name: str, a: data.Images, b: data.Images
          ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields both sets in chunks of some hundred images, after checking them.

  Args:
    name: of what compares them, for messages.
    a, b: as in `psnr`.

  Raises:
    ValueError: as in `psnr`.
  """
  if tuple(a.shape) != tuple(b.shape) or not np.prod(a.shape):
    raise ValueError(f'{name}: got {list(a.shape)} and {list(b.shape)}; both '
                     'must hold the same number of images of one size')
  for start in range(0, len(a), _ROWS):
    pair = a[start:start + _ROWS], b[start:start + _ROWS]
    for side, images in zip('ab', pair, strict=True):
      if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f'{name}: {side} must be uint8 [N, H, W, C], got '
                         f'{images.dtype} {list(images.shape)}')
    yield pair
