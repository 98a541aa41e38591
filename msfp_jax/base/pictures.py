"""Pictures: grids of images, PNG files."""

import os

import jax
import numpy as np
from PIL import Image

from msfp_jax.base import files


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
  """Puts images side by side, row by row, without gaps.

  Args:
    images: uint8 `[N, H, W, C]`, C = 1 or 3, N > 0.
    columns: images a row; a last row that is not full ends in black.

  Returns:
    uint8 `[ceil(N / columns) * H, min(N, columns) * W, C]`.

  Raises:
    ValueError: other images, or columns < 1.
  """
  images = check_pixels('image_grid', images, 'NHWC')
  if columns < 1:
    raise ValueError(f'image_grid: columns is {columns}, must be at least 1')
  count, height, width, channels = images.shape
  columns = min(columns, count)
  rows = -(-count // columns)
  images = np.pad(
      images, ((0, rows * columns - count), (0, 0), (0, 0), (0, 0)))
  # [rows, columns, H, W, C] -> [rows, H, columns, W, C]: rows of pixels run
  # through all images of a row.
  grid = images.reshape(rows, columns, height, width, channels)
  return grid.transpose(0, 2, 1, 3, 4).reshape(
      rows * height, columns * width, channels)


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
  """Writes uint8 `[H, W, C]`, C = 1 or 3, on process 0; all or nothing.

  Raises:
    ValueError: not such an image.
    OSError: the file cannot be written.
  """
  image = check_pixels(str(path), image, 'HWC')
  if image.shape[-1] == 1:
    image = image[..., 0]  # Pillow has grey images without an axis of colours
  if jax.process_index() == 0:
    with files.atomic_path(path) as temporary:
      Image.fromarray(image).save(temporary, format='PNG')


def check_pixels(name: str, images: np.ndarray, axes: str) -> np.ndarray:
  """Returns `images` as an array; raises ValueError unless they are pictures.

  Args:
    name: for the error.
    images: uint8 of these axes, C = 1 or 3, not empty.
    axes: 'HWC' or 'NHWC'.
  """
  images = np.asarray(images)
  if (images.dtype != np.uint8 or images.ndim != len(axes) or not images.size
      or images.shape[-1] not in (1, 3)):
    raise ValueError(
        f'{name}: needs uint8 [{", ".join(axes)}] with C = 1 or 3, not empty; '
        f'got {images.dtype} {list(images.shape)}')
  return images
