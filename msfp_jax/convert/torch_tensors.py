"""Tensors in the pickles of torch.save: read, or refused by name when needed.

A file may hold tensors of a form that is not read here, sparse or quantized
ones such as an optimizer keeps. They refuse a model that needs them, and no
file.
"""

import math
from typing import Any

import numpy as np

from msfp_jax.base import pickles
from msfp_jax.base.pickle_names import shown
from msfp_jax.base.pickles import Global
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.convert.tensors import Storage

_MOST_DIMENSIONS = 32
_LARGEST = 2**62  # what NumPy counts with
# Classes that add nothing to a tensor's values.
_PLAIN = frozenset({
    'torch.Tensor', 'torch._tensor.Tensor', 'torch.nn.parameter.Parameter',
    'torch.nn.parameter.Buffer'})


class TorchFileError(pickles.PickleError):
  """The file is no torch checkpoint, or is damaged; names what is wrong."""


def is_size(value: Any) -> bool:
  """Whether a value can count elements."""
  return isinstance(value, int) and 0 <= value < _LARGEST


def are_sizes(values: Any) -> bool:
  """Whether a value can be a shape, or strides."""
  return (isinstance(values, tuple | list) and len(values) <= _MOST_DIMENSIONS
          and all(map(is_size, values)))


def rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any,
                   unused_gradient: Any = None, unused_hooks: Any = None,
                   metadata: Any = None) -> LazyTensor:
  """Does what torch._utils._rebuild_tensor does, or its _v2, when read.

  Raises:
    TorchFileError: of no storage, or not within it.
  """
  if not isinstance(storage, Storage):
    raise TorchFileError(f'a tensor made of {shown(storage)}')
  text = f'a tensor of shape {shown(shape)}, strides {shown(strides)}'
  if not are_sizes(shape) or not are_sizes(strides) or not is_size(offset):
    raise TorchFileError(text)
  # The pickle could still append to its lists.
  shape, strides = tuple(shape), tuple(strides)
  if len(shape) != len(strides):
    raise TorchFileError(text)
  # Elements from the first to the last that the view touches.
  count = 0
  if 0 not in shape:
    count = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  if offset + count > storage.count:
    raise TorchFileError(f'{text} at {offset} reaches beyond its storage of '
                         f'{storage.count} elements')
  # With strides of 0 a few bytes could stand for any size.
  if math.prod(shape) > storage.count:
    return LazyTensor.odd(
        shape, f'is an expanded view of {storage.count} elements: save it with '
        '.contiguous()')
  if isinstance(metadata, dict) and any(map(bool, metadata.values())):
    return LazyTensor.odd(shape, 'is a view with other signs: save it with '
                          '.resolve_conj().resolve_neg()')

  def read():
    flat = storage.read(offset, count)
    if 0 in shape:
      return flat.reshape(shape)
    return np.lib.stride_tricks.as_strided(
        flat, shape, [s * storage.dtype.itemsize if n > 1 else 0
                      for n, s in zip(shape, strides, strict=True)],
        writeable=False)
  return LazyTensor(shape, storage.dtype, read)


def of_type(name: str) -> str:
  """Why a tensor of a type that NumPy does not have is refused."""
  return (f'has type {name}: convert it to float32, float16 or bfloat16 '
          'first')


def _odd(shape, why):
  """A tensor that is not read; `shape` is whatever the pickle says."""
  if not are_sizes(shape):
    raise TorchFileError(f'a tensor of shape {shown(shape)}')
  return LazyTensor.odd(tuple(shape), why)


def _of_other_type(storage, offset, shape, strides, gradient, hooks, dtype,
                   *unused):
  return _odd(shape, of_type(shown(dtype)))


def _quantized(storage, offset, shape, *unused):
  return _odd(shape, 'is quantized: save it with .dequantize()')


def _sparse(layout, data):
  # (indices, values, shape, ...), or two kinds of indices, by the layout.
  shape = () if not isinstance(data, tuple | list) else next(
      (part for part in data if isinstance(part, tuple | list)), ())
  return _odd(shape, 'is sparse: save it with .to_dense()')


def _of_other_device(*unused):
  return LazyTensor.odd((), 'was on a device of its own: save it with .cpu()')


def _of_subclass(make, kind, args, state=None):
  """A tensor of a class that inherits from torch's; of torch's own, as it is.

  Those come here where someone gave them attributes.
  """
  plain = isinstance(kind, Global) and str(kind) in _PLAIN
  known = isinstance(make, Global) and make in CALLS
  if plain and known and isinstance(args, tuple) and len(args) < 16:
    return CALLS[make](*args)
  return LazyTensor.odd((), _instead(kind))


def _instead(kind):
  return f'is a {shown(kind)}: save its values as a plain tensor'


# Whether it requires a gradient, hooks and the like say nothing of its values.
CALLS = {
    Global('torch._utils', '_rebuild_tensor'): rebuild_tensor,
    Global('torch._utils', '_rebuild_tensor_v2'): rebuild_tensor,
    Global('torch._utils', '_rebuild_parameter'):
        lambda data, *unused: data,
    Global('torch._utils', '_rebuild_parameter_with_state'):
        lambda data, *unused: data,
    Global('torch.nn.parameter', 'Parameter'): lambda data, *unused: data,
    Global('torch', 'Size'): tuple,
    Global('torch._tensor', '_rebuild_from_type_v2'): _of_subclass,
    **{Global('torch._utils', name): make for name, make in {
        '_rebuild_tensor_v3': _of_other_type,
        '_rebuild_qtensor': _quantized,
        '_rebuild_sparse_tensor': _sparse,
        '_rebuild_sparse_csr_tensor': lambda data: _sparse(None, data),
        '_rebuild_nested_tensor': lambda *unused: LazyTensor.odd(
            (), 'is nested: save its parts'),
        '_rebuild_meta_tensor_no_storage': lambda dtype, shape, *unused: _odd(
            shape, 'has no values: it was on the meta device'),
        '_rebuild_wrapper_subclass': lambda kind, dtype, shape, *unused: _odd(
            shape, _instead(kind)),
        '_rebuild_xla_tensor': _of_other_device,
        '_rebuild_device_tensor_from_numpy': _of_other_device,
        '_rebuild_device_tensor_from_cpu_tensor':
            lambda data, *unused: data}.items()},
}
