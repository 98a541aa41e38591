"""Tensors of a packed model's file, with account of what does not fit."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from flax import traverse_util
import flax.linen as nn
import numpy as np

from msfp_jax.convert import abstract_params
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.packed import header as header_lib
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.qtensor import SHIFT_BITS


class Reader:
  """Takes tensors out of a file and keeps account of what does not fit.

  Attributes:
    problems: what does not fit, in words.
    nbytes: of all tensors of the file.
  """

  def __init__(self, tensors: Mapping[str, LazyTensor]):
    self._left = dict(tensors)
    self.problems: list[str] = []
    self.nbytes = sum(math.prod(tensor.shape) * tensor.dtype.itemsize
                      for tensor in tensors.values())

  def take(self, name: str, dtype: Any, shape: tuple[int | None, ...]
           ) -> np.ndarray:
    """A tensor of this type and shape (None: any size); zeros if it is not."""
    # What stands for a missing tensor has its shape and takes no memory:
    # reading goes on, and finds the other problems.
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
    # However many axes a window has, or none in dense layers: h, rows and O at
    # least.
    axes = 3 if tensor is None else max(len(tensor.shape), 3)
    codes = self.take(name, np.uint8, (*(None,) * (axes - 2), rows, None))
    if not codes.size:
      self.problems.append(f'{name} is empty: {codes.shape}')
    return codes

  def shape_of(self, name: str) -> tuple[int, ...]:
    """A tensor's shape; of one that is not there, or has no axis, (1,)."""
    tensor = self._left.get(name)
    return (1,) if tensor is None else tensor.shape or (1,)

  def has(self, name: str) -> bool:
    """Whether the file has a tensor that nobody took yet."""
    return name in self._left

  def take_stream(self, name: str, bits: int, shape: tuple[int, ...]
                  ) -> np.ndarray:
    """Codes of `bits` bits each that lie in the file as a stream."""
    size = -(-math.prod(shape) * bits // 8)
    known = len(self.problems)
    stream = self.take(name, np.uint8, (size,))
    if len(self.problems) > known:
      return np.broadcast_to(np.uint8(0), shape)
    return layout_lib.unpack_bits(stream, bits, shape)

  def take_typed(self, name: str, dtype: str | None,
                 shape: tuple[int | None, ...]) -> np.ndarray:
    """A tensor in float32, or in a type that the file has as bytes.

    Raises:
      ValueError: there is no such type.
    """
    if dtype is None:
      return self.take(name, np.float32, shape)
    if dtype not in header_lib.TYPES:
      raise ValueError(f'{name} of type {dtype!r}')
    whole = header_lib.TYPES[dtype]
    *rest, last = shape
    size = None if last is None else last * whole.itemsize
    stored = self.take(name, np.uint8, (*rest, size))
    if stored.shape[-1] % whole.itemsize:
      self.problems.append(f'{name} is {stored.shape}, no {dtype}')
      stored = np.repeat(stored, whole.itemsize, axis=-1)
    return np.ascontiguousarray(stored).view(whole)

  def take_scales(self, name: str, dtype: str | None, shape: tuple[int, ...]
                  ) -> np.ndarray:
    """Scales, or shifts, of a layer: one a group, or fewer.

    Args:
      name: of the tensor; of shifts it ends with 'shift'.
      dtype: see `take_typed`.
      shape: `[h, *window, groups, O]`; the file's may have 1 in its place, or
        fewer axes where all share a scale.
    """
    if name.endswith('.shift'):
      return self.take_stream(name, SHIFT_BITS, shape)
    tensor = self._left.get(name)
    if tensor is not None and len(tensor.shape) <= len(shape):
      # From the end, as arrays broadcast: any axis may be shared.
      last = shape[len(shape) - len(tensor.shape):]
      stored = list(tensor.shape)
      if stored and dtype in header_lib.TYPES:
        # As bytes the last axis is longer.
        stored[-1] //= header_lib.TYPES[dtype].itemsize
      shape = tuple(size if found == size else 1 for found, size in zip(
          stored, last, strict=True))
    return self.take_typed(name, dtype, shape)

  def rest(self, vectors: Mapping[str, np.ndarray]) -> Any:
    """Tensors that nobody took, and `vectors`, as nested parameters."""
    flat = {tuple(name.split('/')): value
            for name, value in vectors.items()}
    for name, tensor in self._left.items():
      value = tensor.read()
      if not np.isfinite(value).all():
        self.problems.append(f'{name} holds values that are not finite')
      flat[tuple(name.split('/'))] = value
    return traverse_util.unflatten_dict(flat)


@dataclasses.dataclass(frozen=True)
class Found:
  """What a file has of a layer.

  Attributes:
    shape: of the kernel, `[*window, I, O]`.
    has_bias: whether there is a bias.
  """

  shape: tuple[int, ...]
  has_bias: bool

  @classmethod
  def of(cls, layer: QLayer) -> 'Found':
    """Of a layer as it was read."""
    *window, _, outputs = layer.weight.data.shape[1:]
    return cls((*window, layer.weight.length, outputs), layer.bias is not None)


def misfits(model: nn.Module, layers: Mapping[str, Found],
            others: Mapping[str, Any], params: Any) -> list[str]:
  """Lists where the tensors of a file and the parameters of a model differ.

  Args:
    model: of this package's registry.
    layers: those with weights of their own.
    others: those without.
    params: what else the file holds.
  """
  flat = {path: leaf.shape for path, leaf in
          traverse_util.flatten_dict(abstract_params(model)).items()}
  found = {path: value.shape
           for path, value in traverse_util.flatten_dict(params).items()}
  kernels_of = {'.'.join(path[:-1]): (path, shape)
                for path, shape in flat.items() if path[-1] == 'kernel'}
  problems = [f'missing layer {name}' for name in kernels_of
              if name not in layers and name not in others]
  problems += [f'layer {name}, which the model lacks'
               for name in {*layers, *others} - set(kernels_of)]
  # Kernels and biases of packed layers are in the layers, not in the
  # parameters.
  expected = {path: shape for path, shape in flat.items()
              if '.'.join(path[:-1]) not in layers}
  for path in expected.keys() | found.keys():
    name = '/'.join(path)
    if path not in found:
      problems.append(f'missing {name} {expected[path]}')
    elif path not in expected:
      problems.append(f'unexpected {name} {found[path]}')
    elif found[path] != expected[path]:
      problems.append(
          f'{name} is {found[path]}, the model wants {expected[path]}')
  for name in layers.keys() & kernels_of.keys():
    path, wanted = kernels_of[name]
    own, bias = layers[name], flat.get((*path[:-1], 'bias'))
    if own.shape != wanted:
      problems.append(f'{name} is {own.shape}, the model wants {wanted}')
    if own.has_bias != (bias is not None):
      problems.append(f'{name}: a bias in the model or in the file alone')
  return problems
