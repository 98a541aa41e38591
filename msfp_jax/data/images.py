"""Random access to images, in memory or encoded on the disk."""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import functools
import io
from typing import Protocol

from absl import logging
import numpy as np
from PIL import Image
from PIL import ImageOps
from PIL import UnidentifiedImageError

from msfp_jax.base import progress as progress_lib

_THREADS = 8

# What Pillow opens: a path, or the bytes of a file.
File = str | io.BytesIO
# Formats that Pillow knows and that are not read, whatever a file is called:
# EPS runs Ghostscript on it, the others need a decoder that Pillow lacks.
_UNREAD = {'EPS', 'WMF', 'MPEG', 'BUFR', 'GRIB', 'HDF5'}


@functools.cache
def formats() -> tuple[str, ...]:
  """Pillow's names of all formats that are read."""
  Image.init()  # all of them, not only the common ones
  named = set(Image.registered_extensions().values())
  return tuple(sorted((named & Image.OPEN.keys()) - _UNREAD))


@functools.cache
def suffixes() -> frozenset[str]:
  """The suffixes of files of `formats`, such as '.png', lower case."""
  read = set(formats())
  return frozenset(suffix for suffix, kind
                   in Image.registered_extensions().items() if kind in read)


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

  The first one fixes the size. They are turned as their EXIF says, as every
  viewer shows them: cameras store what they saw, and how they were held. Of a
  file of several pictures (GIF, TIFF) the first one is read, with a warning.

  They are grey if all are grey: headers are
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
    self._told = False  # of files of several pictures: once is enough
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
      if not self._told and getattr(image, 'is_animated', False):
        self._told = True
        logging.warning('%s holds several pictures, and maybe others do: the '
                        'first of each file is read', name)
        image.seek(0)  # where asking has moved it
      # Before anything that forgets how it was held.
      ImageOps.exif_transpose(image, in_place=True)
      if _is_16_bit_grey(image):
        # Pillow's conversion would saturate.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
      elif image.mode in ('I', 'F'):
        raise ValueError('has numbers of 32 bits, which do not say what black '
                         'and white are: save it with 8 or 16 bits')
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
      if not (image.mode in ('1', 'L') or _is_16_bit_grey(image)
              or _has_grey_palette(image)):
        return False
  return True


def _has_grey_palette(image: Image.Image) -> bool:
  # GIF knows no other pixels than those of a palette.
  return image.mode == 'P' and not np.ptp(
      np.reshape(image.getpalette('RGB'), (-1, 3)), axis=1).any()


def _is_16_bit_grey(image: Image.Image) -> bool:
  # Pillow opens a PGM of more than 8 bits in 32, of which it fills 16.
  return image.mode.startswith('I;16') or (
      image.mode == 'I' and image.format == 'PPM')


@contextlib.contextmanager
def _opened(name: str, file: File) -> Iterator[Image.Image]:
  """Opens the image in a file; every error is a ValueError that names it."""
  try:
    with Image.open(file, formats=formats()) as image:
      yield image
  except UnidentifiedImageError as error:
    raise ValueError(f'{name} is no readable image: damaged, or of none of '
                     'the formats that are read') from error
  except ValueError as error:
    raise ValueError(f'{name} {error}') from error
  except (OSError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(f'{name} is no readable image: {error}') from error
  except Exception as error:
    # Decoders of rare formats meet damage with whatever they run into.
    raise ValueError(f'{name} is no readable image: {error!r}') from error
