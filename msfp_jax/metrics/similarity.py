"""How close two sets of images are, image by image."""

import numpy as np

PSNR_CAP = 100.0


def psnr(a: np.ndarray, b: np.ndarray) -> float:
  """Peak signal-to-noise ratio in dB, the mean over the images.

  Per image 10 log10(255^2 / mse), at most 100 dB: identical images, whose
  ratio is infinite, count as 100 dB, so that the mean stays finite.

  Args:
    a, b: uint8 `[N, H, W, C]` of one shape; image i of `a` is compared with
      image i of `b`, so make both from the same noise.

  Raises:
    ValueError: not uint8, not four axes, different shapes, or no images.
  """
  a, b = np.asarray(a), np.asarray(b)
  for name, images in (('a', a), ('b', b)):
    if images.dtype != np.uint8 or images.ndim != 4:
      raise ValueError(f'psnr: {name} must be uint8 [N, H, W, C], got '
                       f'{images.dtype} {list(images.shape)}')
  if a.shape != b.shape or not a.size:
    raise ValueError(f'psnr: got {list(a.shape)} and {list(b.shape)}; both '
                     'must hold the same number of images of one size')
  error = [np.mean(np.square(x.astype(np.float64) - y)) for x, y in zip(
      a, b, strict=True)]
  floor = 255.0**2 / 10 ** (PSNR_CAP / 10)
  return float(np.mean(10 * np.log10(255.0**2 / np.maximum(error, floor))))
