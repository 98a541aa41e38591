"""A safetensors file of ours that is written in pieces, and may be resumed.

Shapes are known beforehand, so that every tensor has its place from the start:

    FOLDER/data            the file to be, all of its room taken; no header yet
    FOLDER/journal.jsonl   which pieces are in it, and their tensors' digests

When all are there the header is written, with the digest of them all, and the
file gets its name. Equal tensors make the very file of
`native.write_safetensors`.
"""

from collections.abc import Mapping
import os
import pathlib
import shutil
from typing import Any

import numpy as np

from msfp_jax.base import journal as journal_lib
from msfp_jax.base import seal
from msfp_jax.convert import native
from msfp_jax.convert import source as source_lib

_DATA, JOURNAL = 'data', 'journal.jsonl'


class PiecewiseFile:
  """Writes a file piece by piece; a piece is whole in it, or not at all.

  Of a process that dies at any moment the next one goes on after the last
  piece whose `write` returned. One process at a time: see `base.lock`.

  Attributes:
    done: the pieces that are in the file.
  """

  def __init__(self, path: pathlib.Path, folder: pathlib.Path,
               metadata: Mapping[str, str], shapes: Mapping[str, Any],
               job: Any):
    """Takes the room of the whole file, or finds that of an earlier process.

    Args:
      path: of the file to be.
      folder: there, on the same disk, for what is needed meanwhile.
      metadata: of the header; `seal.KEY` is added to it.
      shapes: {name: what has the shape and dtype of the tensor}.
      job: JSON-like: what the tensors' values follow from.

    Raises:
      ValueError: the folder is of another job.
      OSError: there is no room on the disk.
    """
    self._path, self._folder = path, folder
    self._metadata, self._shapes = dict(metadata), dict(shapes)
    head, self._places = native.safetensors_head(
        self._metadata | {seal.KEY: seal.UNKNOWN}, self._shapes)
    self._size = len(head) + sum(map(nbytes, self._shapes.values()))
    check_room(path, self._size, folder)
    folder.mkdir(parents=True, exist_ok=True)
    data, journal = folder / _DATA, folder / JOURNAL
    open_journal = lambda: journal_lib.Journal(
        journal, {'job': job, 'metadata': self._metadata},
        f'delete {folder} to begin anew, or ask for what it was begun with')
    self._journal, self._file = open_journal(), None
    self._is_named = self._was_named(data)
    if not self._is_named and self._journal.entries and not (
        data.exists() and data.stat().st_size == self._size):
      # Somebody took the data: what the journal says of it is void.
      self._journal.remove()
      self._journal = open_journal()
    self._parts = {
        name: bytes.fromhex(part) for entry in self._journal.of('tensors')
        for name, part in entry['tensors'].items()}
    self.done = {entry['piece'] for entry in self._journal.of('piece')}
    try:
      if not self._is_named:
        self._file = _with_room(data, self._size)
    except BaseException:
      self._journal.close()
      raise

  def __enter__(self) -> 'PiecewiseFile':
    return self

  def __exit__(self, *unused) -> None:
    if self._file is not None:
      self._file.close()
    self._journal.close()

  def _was_named(self, data):
    """Whether a process died between naming the file and tidying up."""
    digest = next(
        (entry['digest'] for entry in self._journal.of('digest')), None)
    if digest is None or data.exists() or not self._path.is_file():
      return False
    return source_lib.read_safetensors(self._path)[1].get(seal.KEY) == digest

  def write(self, piece: str, tensors: Mapping[str, np.ndarray],
            within: Mapping[tuple[str, int], np.ndarray] | None = None
            ) -> None:
    """Writes a piece; when this returns a kill does not undo it.

    Args:
      piece: its name, unlike any other's.
      tensors: whole ones.
      within: {(tensor, index of its first element): part of one of one axis},
        for tensors that several pieces share.

    Raises:
      ValueError: a tensor of another shape or type than was said.
    """
    parts = {}
    for name, array in tensors.items():
      array, expected = np.asarray(array), self._shapes[name]
      if (array.shape, array.dtype) != (tuple(expected.shape), expected.dtype):
        raise ValueError(f'{name} is {array.dtype} {array.shape}, where '
                         f'{expected.dtype} {expected.shape} was expected')
      parts[name] = seal.part_of(name, array).hex()
      self._put(self._places[name], array)
    shared = []
    for (name, first), array in (within or {}).items():
      array = np.asarray(array, self._shapes[name].dtype)
      shared.append([name, first, array.size, seal.part_of(name, array).hex()])
      self._put(self._places[name] + first * array.itemsize, array)
    # The data before the line that says that they are there.
    self._file.flush()
    os.fsync(self._file.fileno())
    self._journal.add({'piece': piece, 'tensors': parts, 'within': shared})
    self._parts |= {name: bytes.fromhex(part) for name, part in parts.items()}
    self.done.add(piece)

  def _put(self, place, array):
    self._file.seek(place)
    self._file.write(
        np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

  def finish(self) -> None:
    """Writes the header, gives the file its name, and deletes the folder."""
    if not self._is_named:
      # Of those that pieces share, now that all of them are there.
      for name in self._shapes.keys() - self._parts.keys():
        self._parts[name] = seal.part_of(name, self._checked(name))
      digest = seal.whole_of(self._metadata, self._parts)
      head, _ = native.safetensors_head(
          self._metadata | {seal.KEY: digest}, self._shapes)
      self._file.seek(0)
      self._file.write(head)
      self._file.flush()
      os.fsync(self._file.fileno())
      # By this line the next process knows the named file as this job's.
      self._journal.add({'digest': digest})
      os.replace(self._folder / _DATA, self._path)
    self._journal.remove()

  def _checked(self, name):
    """A tensor that pieces share, as the disk has it, if that is as written."""
    tensor = self._read(name)
    for entry in self._journal.of('piece', 'within'):
      for other, first, size, digest in entry['within']:
        if other == name and digest != seal.part_of(
            name, tensor[first:first + size]).hex():
          raise ValueError(
              f'{self._folder / _DATA}: the disk changed {name}, of '
              f'{entry["piece"]!r}; delete {self._folder} to begin anew')
    return tensor

  def _read(self, name):
    shape, dtype = self._shapes[name].shape, np.dtype(self._shapes[name].dtype)
    self._file.seek(self._places[name])
    read = self._file.read(nbytes(self._shapes[name]))
    return np.frombuffer(read, dtype).reshape(shape)


def check_room(path: pathlib.Path, size: int, folder: pathlib.Path) -> None:
  """Raises OSError unless the disk has room for a file of `size` bytes.

  Args:
    path: of the file.
    size: of it.
    folder: in which an earlier process may have taken room already.
  """
  data = folder / _DATA
  # st_blocks is in units of 512 bytes, whatever the file system's are.
  taken = (512 * getattr(data.stat(), 'st_blocks', 0) if data.exists()
           else 0)
  free = shutil.disk_usage(_there(path.parent)).free
  if free + taken < size:
    raise OSError(f'{path} will take {size:,} bytes, and its disk has '
                  f'{free + taken:,} left: free some, or choose another')


def _there(folder):
  """The folder, or the first above it that exists."""
  folder = folder.absolute()
  return next(p for p in (folder, *folder.parents) if p.exists())


def _with_room(data, size):
  """Opens the data with all of its room taken."""
  data.touch()
  file = open(data, 'r+b')  # noqa: SIM115
  try:
    if hasattr(os, 'posix_fallocate'):
      # A disk that others fill meanwhile does not end hours of work.
      os.posix_fallocate(file.fileno(), 0, size)
    file.truncate(size)
  except BaseException as error:
    file.close()
    if isinstance(error, OSError):
      raise OSError(error.errno, error.strerror, str(data)) from error
    raise
  return file


def nbytes(like: Any) -> int:
  """Bytes of an array of this shape and dtype."""
  return int(np.prod(like.shape)) * np.dtype(like.dtype).itemsize
