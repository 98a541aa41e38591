"""Tensors that stay in their file until they are asked for."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class LazyTensor:
  """A tensor of a checkpoint: what it is, and how to read it.

  A model of several gigabytes is thus converted tensor by tensor, and its
  family is told from names and shapes before anything is read.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray] = dataclasses.field(repr=False)

  @classmethod
  def of(cls, array: np.ndarray) -> 'LazyTensor':
    """One that is in memory."""
    return cls(array.shape, array.dtype, lambda: array)


Tensors = Mapping[str, LazyTensor]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


# More than any checkpoint has; shared containers can multiply without end.
_MOST_CONTAINERS = 100_000


def flatten(tree: Any) -> dict[str, LazyTensor]:
  """Nested dicts and lists of a checkpoint -> {dotted name: tensor}.

  What is no tensor is left out, and so is a container inside of itself.

  Raises:
    ValueError: containers without end.
  """
  found, visited = {}, 0
  waiting = [('', tree, ())]  # name, value, the containers around it
  while waiting:
    name, value, around = waiting.pop()
    if isinstance(value, LazyTensor):
      found[name] = value
      continue
    if isinstance(value, Mapping):
      items = list(value.items())
    elif isinstance(value, list | tuple):
      items = list(enumerate(value))
    else:
      continue
    if id(value) in around:
      continue
    visited += 1
    if visited > _MOST_CONTAINERS:
      raise ValueError('the checkpoint nests its containers without end')
    waiting += [(f'{name}.{key}' if name else str(key), inner,
                 (*around, id(value))) for key, inner in reversed(items)]
  return found
