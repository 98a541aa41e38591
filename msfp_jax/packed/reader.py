"""Tensors of a packed model's file, with account of what does not fit."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util
import numpy as np

from msfp_jax.convert.tensors import LazyTensor


class Reader:
  """Takes tensors out of a file and keeps account of what does not fit."""

  def __init__(self, tensors: Mapping[str, LazyTensor]):
    self._left = dict(tensors)
    self.problems: list[str] = []

  def take(self, name: str, dtype: Any, shape: tuple[int | None, ...]
           ) -> np.ndarray:
    """A tensor of this type and shape (None: any size); zeros if it is not."""
    zeros = np.broadcast_to(
        np.zeros((), dtype), [1 if size is None else size for size in shape])
    tensor = self._left.pop(name, None)
    if tensor is None:
      self.problems.append(f'missing {name} {shape}')
      return zeros
    fits = len(shape) == len(tensor.shape) and all(
        want in (None, size)
        for want, size in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype != np.dtype(dtype):
      self.problems.append(f'{name} is {tensor.dtype} {tensor.shape}, expected '
                           f'{np.dtype(dtype)} {shape}')
      return zeros
    return tensor.read()

  def take_codes(self, name: str, rows: int) -> np.ndarray:
    """Codes `[h, *window, rows, O]`, whatever the window."""
    tensor = self._left.get(name)
    axes = 3 if tensor is None else max(len(tensor.shape), 3)
    codes = self.take(name, np.uint8, (*(None,) * (axes - 2), rows, None))
    if not codes.size:
      self.problems.append(f'{name} is empty: {codes.shape}')
    return codes

  def rest(self, vectors: Mapping[str, np.ndarray]) -> Any:
    """What is left, and `vectors`, as nested parameters."""
    flat = {tuple(name.split('/')): value
            for name, value in vectors.items()}
    for name, tensor in self._left.items():
      value = tensor.read()
      if not np.isfinite(value).all():
        self.problems.append(f'{name} holds values that are not finite')
      flat[tuple(name.split('/'))] = value
    return traverse_util.unflatten_dict(flat)
