"""Samples on the disk: what a stopped evaluation goes on from.

Every batch is a file, whole or not there, so whatever the moment at which a
run was stopped, the next one draws the batches that are missing, and no other.
"""

from collections.abc import Iterator
import json
import os
import pathlib
import shutil
from typing import Any
import urllib.parse
import zipfile

from absl import logging
import numpy as np

from msfp_jax import data
from msfp_jax.base import files
from msfp_jax.base import pictures

ROW = '.row.json'  # ends the name of a finished row's file
_ROWS = 256  # images held at once when they are copied


def claim(folder: pathlib.Path, samples: dict[str, Any],
          scores: dict[str, Any]) -> None:
  """Deletes what was left by an evaluation that this one does not go on.

  Args:
    folder: of the evaluation.
    samples: what the samples depend on beside the workdir.
    scores: what finished rows depend on beside the samples.
  """
  # What a killed run was writing: folders of PNGs, single files.
  for leftover in (folder.parent / 'samples').glob('.*.tmp'):
    if leftover.is_dir():
      shutil.rmtree(leftover)
    else:
      leftover.unlink()
  claims = [(folder / 'samples.json', samples),
            (folder / 'scores.json', scores)]
  # By way of text, as tuples come back from JSON as lists.
  way_out = f'delete {folder}, to draw all samples again'
  same = [path.is_file() and files.read_json(path, way_out) == json.loads(
      json.dumps(content)) for path, content in claims]
  if all(same):
    logging.info('going on with the evaluation begun in %s', folder)
    return
  # Samples are the dear part: where only metrics changed, they stay.
  if same[0]:
    logging.info('going on with the samples in %s, measured anew', folder)
    for path in (folder / 'scores.json', *folder.glob('reference*.npz'),
                 *folder.glob(f'*{ROW}')):
      path.unlink(missing_ok=True)
  else:
    discard(folder)
  # samples.json last, and `discard` takes it first: while it is there, all the
  # rest of the folder belongs to it.
  for path, content in reversed(claims):
    files.write_json(path, content)


def discard(folder: pathlib.Path) -> None:
  """Deletes a folder; where that is interrupted, it is of no evaluation."""
  (folder / 'samples.json').unlink(missing_ok=True)
  shutil.rmtree(folder, ignore_errors=True)


def folder_name(row: str) -> str:
  """A row's name as that of a folder, of no two rows the same.

  Letters, digits and _-+=, stay; others are escaped as in a URL: 'msfp:w6a6'
  is 'msfp%3Aw6a6'.
  """
  # The full stop too: it sets off the suffixes of the files beside the folder,
  # and '..' is another one. '~' is a home to a shell.
  escaped = urllib.parse.quote(row, safe='+=,')
  return escaped.replace('.', '%2E').replace('~', '%7E')


class SampleStore:
  """Images in a folder, a raw file of each batch; readable as data.Images.

  Attributes:
    folder: of the files.
    shape: (N, H, W, C).
  """

  def __init__(self, folder: str | os.PathLike, num_images: int,
               batch_size: int, image_shape: tuple[int, int, int]):
    """Opens a folder, which need not exist.

    Args:
      folder: of the files.
      num_images: N, when all are there.
      batch_size: images in a file; the last may hold fewer.
      image_shape: (H, W, C).
    """
    self.folder, self._batch_size = pathlib.Path(folder), batch_size
    self.shape = (num_images, *image_shape)

  def __len__(self) -> int:
    return self.shape[0]

  @property
  def missing(self) -> list[int]:
    """Numbers of the batches that are not there as a whole."""
    each = int(np.prod(self.shape[1:]))
    # By size as well: after a power failure a file may have its name and no
    # content.
    whole = lambda number: self._path(number).is_file() and (
        self._path(number).stat().st_size == each * self._count(number))
    return [number for number in range(-(-len(self) // self._batch_size))
            if not whole(number)]

  def write(self, number: int, images: np.ndarray) -> None:
    """Stores a batch, uint8 `[batch_size, H, W, C]`; the last is cut."""
    images = np.ascontiguousarray(images[:self._count(number)], np.uint8)
    if images.shape != (self._count(number), *self.shape[1:]):
      raise ValueError(f'batch {number} has shape {list(images.shape)}, must '
                       f'hold {self._count(number)} images of '
                       f'{list(self.shape[1:])}')
    with files.atomic_path(self._path(number)) as temporary:
      images.tofile(temporary)

  def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
    """uint8 `[n, H, W, C]`.

    Raises:
      FileNotFoundError: a missing batch.
      ValueError: a batch that is cut, or of other images.
    """
    rows = np.arange(len(self))[rows]
    numbers = rows // self._batch_size
    # A file at a time: memory is that of the rows asked for, and of one batch.
    images = np.empty((len(rows), *self.shape[1:]), np.uint8)
    for number in np.unique(numbers):
      batch = np.fromfile(self._path(number), np.uint8)
      shape = (self._count(number), *self.shape[1:])
      if batch.size != np.prod(shape):
        raise ValueError(f'{self._path(number)} has {batch.size} bytes of '
                         f'{np.prod(shape)}: delete it, to draw it again')
      batch = batch.reshape(shape)
      here = numbers == number
      images[here] = batch[rows[here] % self._batch_size]
    return images

  def keep_first(self, count: int) -> None:
    """Deletes the files that hold none of the first `count` images."""
    for number in range(-(-len(self) // self._batch_size)):
      if number * self._batch_size >= count:
        self._path(number).unlink(missing_ok=True)

  def _path(self, number: int) -> pathlib.Path:
    return self.folder / f'{number:06d}.uint8'

  def _count(self, number: int) -> int:
    return min(self._batch_size, len(self) - number * self._batch_size)


def save_npz(path: str | os.PathLike, images: data.Images) -> None:
  """Writes 'arr_0', uint8 `[N, H, W, C]`, as ADM's evaluation reads it.

  Memory does not grow with the number of images; all or nothing.
  """
  with (files.atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, 'w') as archive,
        archive.open('arr_0.npy', 'w', force_zip64=True) as file):
    # Header and chunks by hand: np.savez would need all images in one array.
    np.lib.format.write_array_header_1_0(file, {
        'descr': '|u1', 'fortran_order': False, 'shape': tuple(images.shape)})
    for chunk in _chunks(images):
      file.write(np.ascontiguousarray(chunk).data)


def save_pngs(folder: str | os.PathLike, images: data.Images) -> None:
  """Writes 000000.png and so on; the folder appears once it is complete."""
  folder = pathlib.Path(folder)
  # Hidden and beside the target: one rename makes it appear, whole.
  temporary = folder.with_name(f'.{folder.name}.tmp')
  shutil.rmtree(temporary, ignore_errors=True)
  count = 0
  for chunk in _chunks(images):
    for image in chunk:
      pictures.save_png(temporary / f'{count:06d}.png', image)
      count += 1
  shutil.rmtree(folder, ignore_errors=True)
  temporary.rename(folder)


def _chunks(images: data.Images) -> Iterator[np.ndarray]:
  return (images[i:i + _ROWS] for i in range(0, len(images), _ROWS))


# What config.eval.keep may name -> (suffix in samples/, writer).
FORMS = {'npz': ('.npz', save_npz), 'png': ('', save_pngs)}
