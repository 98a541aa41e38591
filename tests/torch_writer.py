"""Writes files as torch.save does, without torch.

Written from the format (zip of data.pkl and data/<key>; or a stream of
pickles), apart from `msfp_jax.convert`, which it helps to check.
"""

import collections
import contextlib
import io
import pickle
import struct
import sys
import types
from unittest import mock
import zipfile

import ml_dtypes
import numpy as np

_STORAGES = {'float64': 'DoubleStorage', 'float32': 'FloatStorage',
             'float16': 'HalfStorage', 'bfloat16': 'BFloat16Storage',
             'int64': 'LongStorage', 'int32': 'IntStorage',
             'uint8': 'ByteStorage', 'bool': 'BoolStorage'}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@contextlib.contextmanager
def names(*dotted):
  """Lets pickle write foreign names, by modules of stand-ins, while open.

  Yields {dotted name: stand-in class}.
  """
  made = {}
  with mock.patch.dict(sys.modules):
    for name in dotted:
      module, _, attribute = name.rpartition('.')
      parts = module.split('.')
      for i in range(len(parts)):
        parent = '.'.join(parts[:i + 1])
        if not isinstance(sys.modules.get(parent), _StandIn):
          sys.modules[parent] = _StandIn(parent)
      made[name] = type(attribute, (), {'__module__': module})
      setattr(sys.modules[module], attribute, made[name])
    yield made


class _StandIn(types.ModuleType):
  pass


class _Pickler(pickle.Pickler):
  """A pickler that writes arrays as tensors; equal bases share a storage."""

  def __init__(self, file, made, legacy):
    super().__init__(file, protocol=2)
    self.made, self.legacy = made, legacy
    self.storages = {}  # id of the base -> (key, base)

  def persistent_id(self, obj):
    if not isinstance(obj, _Base):
      return None
    array = obj.array
    key, _ = self.storages.setdefault(
        id(array), (str(len(self.storages)), array))
    kind = self.made[f'torch.{_STORAGES[array.dtype.name]}']
    return ('storage', kind, key, 'cpu', array.size,
            *([None] if self.legacy else []))

  def reducer_override(self, obj):
    if not isinstance(obj, np.ndarray):
      return NotImplemented
    base = obj
    while isinstance(base.base, np.ndarray):
      base = base.base
    flat = base.ravel(order='K')
    if base.size and not np.shares_memory(flat, base):
      raise ValueError('a base must be contiguous')
    start = obj.__array_interface__['data'][0]
    offset = (start - base.__array_interface__['data'][0]) // obj.itemsize
    strides = tuple(s // obj.itemsize for s in obj.strides)
    return (self.made['torch._utils._rebuild_tensor_v2'],
            (_Base(base), offset, obj.shape, strides, False,
             collections.OrderedDict()))


class _Base:

  def __init__(self, array):
    self.array = array


def _pickled(content, legacy, extra=()):
  with names('torch._utils._rebuild_tensor_v2', *extra,
             *(f'torch.{name}' for name in _STORAGES.values())) as made:
    if callable(content):
      content = content(made)
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, made, legacy)
    pickler.dump(content)
  return buffer.getvalue(), dict(pickler.storages.values())


def _bytes(array):
  return array.ravel(order='K').tobytes()


def save_zip(path, content, extra=(), compression=zipfile.ZIP_STORED):
  """Writes containers of arrays as torch.save does, in a zip."""
  pickled, storages = _pickled(content, legacy=False, extra=extra)
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('archive/data.pkl', pickled)
    archive.writestr('archive/byteorder', 'little')
    for key, array in storages.items():
      archive.writestr(f'archive/data/{key}', _bytes(array))
    archive.writestr('archive/version', '3\n')


def save_legacy(path, content, extra=()):
  """Writes as `save_zip` does, in the format before torch 1.6."""
  pickled, storages = _pickled(content, legacy=True, extra=extra)
  with open(path, 'wb') as file:
    pickle.dump(0x1950a86a20f9469cfc6c, file, protocol=2)
    pickle.dump(1001, file, protocol=2)
    pickle.dump({'protocol_version': 1001, 'little_endian': True,
                 'type_sizes': {'short': 2, 'int': 4, 'long': 4}},
                file, protocol=2)
    file.write(pickled)
    pickle.dump(sorted(storages), file, protocol=2)
    for key in sorted(storages):
      file.write(struct.pack('<q', storages[key].size))
      file.write(_bytes(storages[key]))


SAVERS = {'zip': save_zip, 'legacy': save_legacy}
