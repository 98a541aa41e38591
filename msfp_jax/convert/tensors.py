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


def flatten(tree: Any, prefix: str = '') -> dict[str, LazyTensor]:
  """Nested dicts and lists of a checkpoint -> {dotted name: tensor}.

  What is no tensor is left out.
  """
  if isinstance(tree, LazyTensor):
    return {prefix: tree}
  if isinstance(tree, Mapping):
    items = tree.items()
  elif isinstance(tree, list | tuple):
    items = enumerate(tree)
  else:
    return {}
  found = {}
  for key, value in items:
    found |= flatten(value, f'{prefix}.{key}' if prefix else str(key))
  return found
