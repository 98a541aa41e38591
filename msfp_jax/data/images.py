"""Random access to images, in memory or encoded on the disk."""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import io
from typing import Protocol

import numpy as np
from PIL import Image

from msfp_jax.base import progress as progress_lib

_THREADS = 8

# What Pillow opens: a path, or the bytes of a file.
File = str | io.BytesIO


class Images(Protocol):
  """Images of one shape; a uint8 array `[N, H, W, C]` is one such.

  Attributes:
    shape: (N, H, W, C) with C = 1 or 3.
  """

  shape: tuple[int, ...]

  def __len__(self) -> int:
    """The number of images, N."""

  def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
    """Reads the images of a slice or int array `[n]`, uint8 `[n, H, W, C]`."""


class EncodedImages:
  """Images that are decoded when they are asked for.

  The first one fixes the size. They are grey if all are grey: headers are
  read up to the first one with colours, which in a set of photographs is one
  of the first.

  Attributes:
    shape: (N, H, W, C).
  """

  def __init__(
      self, count: int,
      fetch: Callable[[Sequence[int]], list[tuple[str, File]]],
      change: Callable[[Image.Image], Image.Image] = lambda image: image):
    """Decodes the first image, whose size all others must have.

    Args:
      count: how many there are, at least one.
      fetch: rows -> (name for messages, path or encoded bytes) of each.
      change: applied to every image, of Pillow's mode L or RGB; a ValueError
        from it is raised behind the image's name.

    Raises:
      ValueError: an image met is not readable, or `change` refuses it.
    """
    # fetch(rows) -> files -> Pillow -> mode L or RGB -> change -> uint8 pixels;
    # `change` may crop and resize, so the size is known after it only.
    self._fetch, self._change = fetch, change
    self._mode = 'L' if _all_grey(count, fetch) else 'RGB'
    (self._first, file), = fetch([0])
    self.shape = (count, *self._decode(self._first, file).shape)

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
    """Decodes some images with several threads, uint8 `[n, H, W, C]`.

    Args:
      rows: a slice, or an int array `[n]`.

    Raises:
      TypeError: a single row.
      IndexError: a row that is not there.
      ValueError: an image is not readable, or has another size than the first.
    """
    wanted = np.arange(len(self))[rows]
    if wanted.ndim != 1:
      raise TypeError(f'images[{rows!r}]: takes a slice or an int array [n]')
    images = np.empty((len(wanted), *self.shape[1:]), np.uint8)

    def store(i: int, named: tuple[str, File]) -> None:
      images[i] = self._decode(*named, images.shape[1:])

    # Pillow decodes outside of Python's lock, so threads are enough.
    with futures.ThreadPoolExecutor(_THREADS) as pool:
      for _ in pool.map(store, range(len(wanted)), self._fetch(wanted)):
        pass  # raises what a thread raised
    return images

  def _decode(self, name: str, file: File,
              shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Decodes one, uint8 `[H, W, C]`; ValueError unless it has the shape."""
    with _opened(name, file) as image:
      if image.mode.startswith('I;16'):
        # Pillow's conversion would saturate.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
      pixels = np.asarray(self._change(image.convert(self._mode)))
      pixels = np.atleast_3d(pixels)
      if shape not in (None, pixels.shape):
        raise ValueError(
            f'is {pixels.shape[1]} x {pixels.shape[0]} pixels, {self._first} '
            f'is {shape[1]} x {shape[0]}: all images must have one size')
    return pixels


def _all_grey(count: int, fetch: Callable) -> bool:
  progress = progress_lib.Progress('looking for colours', count)
  for row in range(count):
    progress.update(row)
    named, = fetch([row])
    with _opened(*named) as image:
      if not (image.mode in ('1', 'L') or image.mode.startswith('I;16')):
        return False
  return True


@contextlib.contextmanager
def _opened(name: str, file: File) -> Iterator[Image.Image]:
  """Opens the image in a file; every error is a ValueError that names it."""
  try:
    with Image.open(file) as image:
      yield image
  except ValueError as error:
    raise ValueError(f'{name} {error}') from error
  except (OSError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(f'{name} is no readable image: {error}') from error
