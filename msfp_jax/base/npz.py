"""Reads .npz files, whatever damage does to them."""

from collections.abc import Iterator, Mapping
import contextlib
import os
import tokenize
import warnings
import zipfile
import zlib

import numpy as np


class _Arrays(Mapping):
  """An open file's arrays; what else an archive may hold is refused."""

  def __init__(self, held: Mapping[str, np.ndarray]):
    self._held = held

  def __getitem__(self, name: str) -> np.ndarray:
    with warnings.catch_warnings():
      # Of types that NumPy no longer writes; but what Python 2 wrote is read.
      warnings.filterwarnings(
          'error', 'Data type alias', category=DeprecationWarning)
      warnings.filterwarnings(
          'ignore', '.*additional header parsing', category=UserWarning)
      array = self._held[name]
    if not isinstance(array, np.ndarray):
      raise ValueError(f'{name!r} is no array')
    return array

  def __contains__(self, name: object) -> bool:
    return name in self._held  # which reads nothing

  def __iter__(self) -> Iterator[str]:
    return iter(self._held)

  def __len__(self) -> int:
    return len(self._held)


@contextlib.contextmanager
def opened(path: str | os.PathLike, what: str
           ) -> Iterator[Mapping[str, np.ndarray]]:
  """Opens an .npz whose arrays are read, and checked, in the block.

  Args:
    path: of the file.
    what: that it should be, for messages: 'of images'.

  Raises:
    FileNotFoundError: nothing at `path`.
    ValueError: no such file, or a damaged one; also for what the block raises
      that an array of an unexpected kind may lead to.
  """
  try:
    # np.load leaves a damaged file open if it opened it itself.
    with (open(path, 'rb') as file,
          np.load(file, allow_pickle=False) as held):
      if not isinstance(held, Mapping):
        raise ValueError('it holds one array and no names')
      yield _Arrays(held)
  # RuntimeError is zipfile's, of flags that say a password or a method that it
  # does not have; MemoryError NumPy's, of a shape that says more than there
  # is; TokenError and SyntaxError come of an array's header.
  except (OSError, ValueError, KeyError, AttributeError, TypeError, EOFError,
          RuntimeError, MemoryError, OverflowError, SyntaxError,
          DeprecationWarning, tokenize.TokenError, zipfile.BadZipFile,
          zlib.error) as error:
    if isinstance(error, OSError | ValueError) and str(path) in str(error):
      raise  # it says what is wrong, and of which file
    raise ValueError(f'{path} is no .npz {what}: {error}') from error
