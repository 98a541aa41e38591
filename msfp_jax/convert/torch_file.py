"""Reads what torch.save wrote (.ckpt, .pth, .pt, .bin) without torch.

Both containers: the zip of torch >= 1.6 and the older stream of pickles; and
the zip of torch.jit.save, whose modules become dicts of their attributes. The
pickle is read as data (`pickles.py`), the code of a script is not looked at,
and tensors stay in the file until they are needed.
"""

from collections.abc import Iterator
import contextlib
import pathlib
import struct
import sys
from typing import Any
import zipfile
import zlib

import numpy as np

from msfp_jax.base import pickles
from msfp_jax.base.pickle_names import shown
from msfp_jax.base.pickles import Global
from msfp_jax.convert import contents
from msfp_jax.convert import torch_tensors
from msfp_jax.convert.tensors import BFLOAT16
from msfp_jax.convert.tensors import Storage
from msfp_jax.convert.torch_tensors import TorchFileError

# The containers, and where their tensors lie:
#
#   zip                                 legacy, one stream
#     NAME/data.pkl   the object          pickle: magic number
#     NAME/byteorder  'little' or 'big'   pickle: protocol
#     NAME/data/0     a storage           pickle: sizes and byte order
#     NAME/data/1     a storage           pickle: the object
#     ...                                 pickle: keys of the storages, in order
#                                         for each: count (8 bytes), elements
#
# In the object's pickle a tensor is a call of _rebuild_tensor with a persistent
# id ('storage', type, key, ...), an offset, a shape and strides; several
# tensors may be views of one storage. Everything that a file states about sizes
# is checked against what it has, before memory is asked for.
_LEGACY_MAGIC = 0x1950a86a20f9469cfc6c
_LEGACY_PROTOCOL = 1001

_DTYPES = {
    'DoubleStorage': np.float64, 'FloatStorage': np.float32,
    'HalfStorage': np.float16, 'BFloat16Storage': BFLOAT16,
    'LongStorage': np.int64, 'IntStorage': np.int32,
    'ShortStorage': np.int16, 'CharStorage': np.int8,
    'ByteStorage': np.uint8, 'BoolStorage': np.bool_,
    'ComplexFloatStorage': np.complex64, 'ComplexDoubleStorage': np.complex128,
    # Of tensors that `torch_tensors` refuses by name, by the bytes they take.
    'QInt8Storage': np.int8, 'QUInt8Storage': np.uint8,
    'QInt32Storage': np.int32, 'QUInt4x2Storage': np.uint8,
    'QUInt2x4Storage': np.uint8, 'UntypedStorage': np.uint8,
}

# Deflate shrinks the pickle of a model about five times, of zeros a thousand.
_MOST_INFLATED = 100
_LONGEST_KEY = 255
# What a member of a zip begins with, and the flag of a name in UTF-8.
_MEMBER, _UTF_8 = b'PK\x03\x04', 0x800


class _Scripted(dict, pickles.Buildable):
  """Stands for a module or an object of TorchScript, with its attributes."""

  def build(self, state: Any) -> None:
    if isinstance(state, dict):
      self.update(state)


def _other(name: Global) -> Any:
  # The classes of a script are made up per file, all below __torch__.
  scripted = name.module.partition('.')[0] == '__torch__'
  return _Scripted() if scripted else pickles.Opaque(str(name))


def load(path: str | pathlib.Path) -> Any:
  """The content of a file: nested plain containers with `LazyTensor`s.

  Nothing is imported or run, whatever the file says: an object of any other
  kind is a `pickles.Opaque`.

  Raises:
    TorchFileError: not such a file, truncated, or one whose pickle names
      functions that have no place in a checkpoint.
  """
  path = pathlib.Path(path)
  with _naming(path):
    if zipfile.is_zipfile(path):
      return _load_zip(path)
    return _load_legacy(path)


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  """Turns whatever damage leads to into an error that names the file."""
  try:
    yield
  except (ValueError, OSError, zipfile.BadZipFile, zlib.error, EOFError,
          struct.error, NotImplementedError, RuntimeError) as error:
    # Of one that is not there, say, an OSError tells itself; of a place before
    # its beginning it tells nothing.
    if isinstance(error, OSError) and error.filename is not None:
      raise
    raise TorchFileError(f'{path}: {error}') from error


def _load_zip(path: pathlib.Path) -> Any:
  with zipfile.ZipFile(path) as archive:
    members = {info.filename: info for info in archive.infolist()}
    roots = [name.removesuffix('data.pkl') for name in members
             if name.endswith('/data.pkl') and name.count('/') == 1]
    if not roots and members and all(n.endswith('.npy') for n in members):
      raise TorchFileError(contents.arrays(
          [name.removesuffix('.npy') for name in members]))
    if len(roots) != 1:
      raise TorchFileError(
          'a zip archive, but no checkpoint of torch.save: it holds '
          f'{len(roots)} files named */data.pkl, not one')
    root, = roots
    size_on_disk = path.stat().st_size
    for info in members.values():
      _check_member(info, size_on_disk)
    _check_pickle_size(members[f'{root}data.pkl'], size_on_disk)
    order = _byte_order(archive, members.get(f'{root}byteorder'))
    swap = order != sys.byteorder

    def resolve(pid):
      dtype, key, count = _parse_id(pid)
      name = f'{root}data/{key}'
      # A member may be longer than its tensors need, but not shorter.
      if name not in members:
        raise TorchFileError(f'truncated: it lacks the member {name}')
      size = members[name].file_size
      if size < count * dtype.itemsize:
        raise TorchFileError(
            f'truncated: the member {name} has {size} bytes of the '
            f'{count * dtype.itemsize} that a tensor needs')
      return Storage(
          dtype, count, _zip_reader(path, members[name], dtype, swap))

    with archive.open(f'{root}data.pkl') as file:
      return pickles.read_pickle(file, torch_tensors.CALLS, resolve, _other)


def _check_member(info, size_on_disk):
  name, size, method = shown(info.filename), info.file_size, info.compress_type
  if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    raise TorchFileError(f'its member {name} is compressed by method {method}, '
                         'which torch does not know')
  if method == zipfile.ZIP_STORED and size > size_on_disk:
    raise TorchFileError(f'truncated: its member {name} has {size} bytes, the '
                         f'file {size_on_disk}')


def _check_pickle_size(info, size_on_disk):
  # The pickle is read whole, unlike tensors, and the directory may lie about
  # sizes; a bomb of zeros is refused before it is inflated.
  held = min(info.compress_size, size_on_disk)
  if info.file_size > _MOST_INFLATED * held:
    raise TorchFileError(f'damaged: {held} bytes inflate to {info.file_size} '
                         'of data.pkl; torch.save compresses nothing')


def _byte_order(archive, info):
  if info is None:  # older torch wrote none
    return 'little'
  if info.file_size > 16:
    raise TorchFileError(f'damaged: its byteorder has {info.file_size} bytes, '
                         'expected "little" or "big"')
  return archive.read(info).decode('ascii', 'replace').strip()


def _zip_reader(path, info, dtype, swap):
  """Makes the reader of a storage's elements; torch.save compresses nothing."""
  if info.compress_type != zipfile.ZIP_STORED:
    def read_compressed(first, count):
      with (_naming(path), zipfile.ZipFile(path) as archive,
            archive.open(info) as member):
        member.seek(first * dtype.itemsize)  # inflates and drops
        return _from_bytes(
            member.read(count * dtype.itemsize), dtype, count, swap)
    return read_compressed

  def read(first, count):
    with _naming(path), open(path, 'rb') as file:
      # The local header is not the directory's: its extra field pads.
      file.seek(info.header_offset)
      header = file.read(30)
      name, extra = struct.unpack('<HH', header[26:30])
      # At another place than the directory says, or with a name of another
      # length, values would be read that are none of this member's.
      if header[:4] != _MEMBER or file.read(name) != info.orig_filename.encode(
          'utf-8' if info.flag_bits & _UTF_8 else 'cp437'):
        raise TorchFileError(
            f'damaged: no member {shown(info.filename)} where its directory '
            'says')
      file.seek(info.header_offset + 30 + name + extra
                + first * dtype.itemsize)
      return _from_bytes(
          file.read(count * dtype.itemsize), dtype, count, swap)
  return read


def _load_legacy(path: pathlib.Path) -> Any:
  # Storages are known before their place is: they follow the pickle, each after
  # the one before, so that `read` is filled in at the end.
  storages = {}

  def resolve(pid):
    dtype, key, count = _parse_id(pid)
    base = storages.setdefault(key, Storage(dtype, count))
    if (base.dtype, base.count) != (dtype, count):
      raise TorchFileError(
          f'damaged: storage {key!r} of {count} {dtype}, elsewhere of '
          f'{base.count} {base.dtype}')
    # A sixth entry makes the storage itself a part of another one.
    view = pid[5] if len(pid) > 5 else None
    if view is None:
      return base
    if not _is_view(view, count):
      raise TorchFileError(
          f'damaged: a view {shown(view)} of {count} elements')
    _, start, size = view
    return Storage(dtype, size, lambda first, number: base.read(
        start + first, number))

  with open(path, 'rb') as file:
    head = file.read(2)
    file.seek(0)
    if head == b'PK':
      raise TorchFileError('a truncated zip archive: get the file again')
    # A pickle of protocol 2 or later starts so; anything else is no torch file.
    if len(head) < 2 or head[0] != 0x80:
      raise TorchFileError('neither a zip archive nor a stream of pickles')
    if (first := pickles.read_pickle(file)) != _LEGACY_MAGIC:
      raise TorchFileError("a pickle, but without torch.save's magic number"
                           + (f': {told}' if (told := contents.told(first))
                              else ''))
    if (protocol := pickles.read_pickle(file)) != _LEGACY_PROTOCOL:
      raise TorchFileError(f'torch protocol {shown(protocol)}, expected '
                           f'{_LEGACY_PROTOCOL}')
    system = pickles.read_pickle(file)
    little = not isinstance(system, dict) or system.get('little_endian', True)
    swap = (sys.byteorder == 'little') != bool(little)
    content = pickles.read_pickle(file, torch_tensors.CALLS, resolve)
    keys = pickles.read_pickle(file)
    if not isinstance(keys, list) or not all(map(_is_key, keys)):
      raise TorchFileError('damaged: no list of storages')
    end = path.stat().st_size
    for key in keys:
      count = int.from_bytes(file.read(8), 'little' if little else 'big')
      if key not in storages:
        raise TorchFileError(f'damaged: a storage {key!r} that no tensor uses')
      storage, offset = storages[key], file.tell()
      if offset + storage.count * storage.dtype.itemsize > end:
        raise TorchFileError(f'truncated: storage {key!r} ends behind the file')
      if count != storage.count:
        raise TorchFileError(f'damaged: storage {key!r} has {count} elements, '
                             f'its tensors expect {storage.count}')
      storage.read = _legacy_reader(path, offset, storage.dtype, swap)
      file.seek(offset + count * storage.dtype.itemsize)
    if missing := sorted(k for k, s in storages.items() if s.read is None):
      raise TorchFileError(f'truncated: it lacks {len(missing)} storages, e.g. '
                           f'{missing[0]!r}')
    return content


def _legacy_reader(path, offset, dtype, swap):
  def read(first, count):
    with _naming(path), open(path, 'rb') as file:
      file.seek(offset + first * dtype.itemsize)
      return _from_bytes(
          file.read(count * dtype.itemsize), dtype, count, swap)
  return read


def _from_bytes(content, dtype, count, swap):
  if len(content) < count * dtype.itemsize:
    raise TorchFileError(f'truncated: a tensor has {len(content)} bytes of '
                         f'{count * dtype.itemsize}')
  array = np.frombuffer(content, dtype, count)
  return array.byteswap() if swap else array


def _parse_id(pid: Any) -> tuple[np.dtype, str, int]:
  """Reads ('storage', type, key, location, count, ..): dtype, key, count."""
  if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != 'storage':
    raise TorchFileError(f'a reference to {shown(pid)}, which is no storage')
  _, kind, key, _, count = pid[:5]
  if (not isinstance(kind, Global) or kind.name not in _DTYPES
      or not str(kind).startswith('torch.')):
    raise TorchFileError(f'a storage of type {shown(kind)}, which is unknown')
  if not _is_key(key):
    raise TorchFileError(f'a storage called {shown(key)}, expected a string')
  if not torch_tensors.is_size(count):
    raise TorchFileError(f'a storage of {shown(count)} elements')
  return np.dtype(_DTYPES[kind.name]), key, count


def _is_key(value):
  return isinstance(value, str) and len(value) <= _LONGEST_KEY


def _is_view(view, count):
  """Whether a view is (key, start, size) within `count` elements."""
  return (isinstance(view, tuple) and len(view) == 3
          and all(map(torch_tensors.is_size, view[1:]))
          and sum(view[1:]) <= count)
