"""Tensors that stay in their file until they are asked for."""

from collections.abc import Callable, Mapping
import dataclasses
import os
from typing import Any

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class LazyTensor:
  """A tensor of a checkpoint: what it is, and how to read it.

  A model of several gigabytes is thus converted tensor by tensor, and its
  family is told from names and shapes before anything is read.

  Attributes:
    shape: of its values.
    dtype: of its values.
    read: makes the array.
    refused: why it cannot be read, behind its name: 'is sparse: ...'; '' of
      all others. A file may hold such a tensor as long as no model needs it.
    read_rows: (first, end) -> these rows alone; None where the file can give
      the whole only.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray] = dataclasses.field(repr=False)
  refused: str = ''
  read_rows: Callable[[int, int], np.ndarray] | None = dataclasses.field(
      default=None, repr=False)

  def rows(self, first: int, end: int) -> np.ndarray:
    """Reads rows first to end of its first axis, and no others if it can."""
    if self.read_rows is None:
      return self.read()[first:end]
    return self.read_rows(first, end)

  @classmethod
  def of(cls, array: np.ndarray) -> 'LazyTensor':
    """Wraps an array that is in memory already."""
    return cls(array.shape, array.dtype, lambda: array)

  @classmethod
  def odd(cls, shape: tuple[int, ...], why: str) -> 'LazyTensor':
    """One that cannot be read, for the reason `why`."""

    def read():
      raise ValueError(f'a tensor of shape {shape} {why}')
    return cls(shape, np.dtype(np.void), read, why)


def of_file(path: str | os.PathLike, tensors: Mapping[str, LazyTensor]
            ) -> dict[str, LazyTensor]:
  """The tensors of a file; those that cannot be read say which they are."""

  def told(name, tensor):
    def read():
      raise ValueError(f'{path}: {name} {tensor.refused}')
    return dataclasses.replace(tensor, read=read)

  return {name: told(name, tensor) if tensor.refused else tensor
          for name, tensor in tensors.items()}


@dataclasses.dataclass
class Storage:
  """A flat array in the file that tensors are views of.

  Attributes:
    dtype: of its elements.
    count: how many elements it has.
    read: (first, number of elements) -> `[number]`, from the file.
  """

  dtype: np.dtype
  count: int
  read: Callable[[int, int], np.ndarray] | None = None


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


# More than any checkpoint has; shared containers can multiply without end.
_MOST_ENTRIES = 1_000_000
_MOST_LETTERS = 10_000_000  # of all names together
_DEEPEST = 1_000


def flatten(tree: Any) -> dict[str, LazyTensor]:
  """Collects the tensors of nested dicts and lists as {dotted name: tensor}.

  What is no tensor is left out, and so is a container inside of itself.

  Raises:
    ValueError: more entries, or deeper ones, than a checkpoint has.
  """
  # A loop with a stack of its own, as a file may nest deeper than Python
  # recurses. Each entry is a container that is being walked through; one that
  # is met inside of itself, which a pickle can make, is passed over.
  found, entries, letters = {}, 0, 0
  around = set()  # ids of the containers that are open
  levels = [(None, '', iter([('', tree)]))]  # id, name, items still to visit
  while levels:
    here, prefix, items = levels[-1]
    for key, value in items:
      entries += 1
      _check_size(entries, letters, len(levels) - 1)
      is_tensor = isinstance(value, LazyTensor)
      if not is_tensor and (not isinstance(value, Mapping | list | tuple)
                            or id(value) in around):
        continue
      name = f'{prefix}.{key}' if prefix else str(key)
      letters += len(name)
      if is_tensor:
        found[name] = value
        continue
      around.add(id(value))
      levels.append((id(value), name, iter(
          value.items() if isinstance(value, Mapping) else enumerate(value))))
      break
    else:
      levels.pop()
      around.discard(here)
  return found


def _check_size(entries, letters, depth):
  for count, most, what in ((entries, _MOST_ENTRIES, 'entries'),
                            (letters, _MOST_LETTERS, 'letters in its names'),
                            (depth, _DEEPEST, 'levels of containers')):
    if count > most:
      raise ValueError(
          f'the checkpoint has more than {most} {what}: damaged, or made to '
          'keep its reader busy. Save its state_dict alone')
