"""Checkpoints made to crash, hang or fill the memory of their reader."""

import io
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch_writer

from msfp_jax.base import pickles
from msfp_jax.convert import torch_file
from msfp_jax.convert import torch_tensors
from msfp_jax.convert.tensors import Storage

LONG_LIST = b'](' + b'K\x01' * 10_000 + b'e'
LONG_TEXT = b'X' + (20_000).to_bytes(4, 'little') + b'x' * 20_000
LONG_DICT = b'}(' + b''.join(
    b'M' + i.to_bytes(2, 'little') + b'N' for i in range(5_000)) + b'u'


@pytest.mark.parametrize('first, function, arguments', [
    (LONG_TEXT, b'_codecs\nencode\n', b'X\x06\x00\x00\x00latin1\x86'),
    (LONG_LIST, b'__builtin__\nlist\n', b'\x85'),
    (LONG_LIST, b'__builtin__\nset\n', b'\x85'),
    (LONG_LIST, b'__builtin__\nbytes\n', b'\x85'),
    (LONG_DICT, b'__builtin__\ndict\n', b'\x85'),
    (LONG_DICT, b'collections\nOrderedDict\n', b'\x85'),
    (LONG_TEXT, b'torch\nSize\n', b'\x85'),
    (LONG_LIST, b'torch\nSize\n', b''),
], ids=['encode', 'list', 'set', 'bytes', 'dict', 'ordered', 'caller',
        'arguments'])
def test_calls_copy_no_more_than_the_file_holds(first, function, arguments):
  calls = {pickles.Global('torch', 'Size'): lambda *args: args}
  content = (b'\x80\x02(' + first + b'q\x00c' + function + b'q\x01'
             + (b'h\x01h\x00' + arguments + b'R') * 1_000 + b'l.')
  with pytest.raises(pickles.PickleError, match='bytes copy .* values'):
    pickles.read_pickle(io.BytesIO(content), calls)


def pickled_tensor(arguments, after=b''):
  """Makes a data.pkl with one tensor of the storage '0', 60 float32."""
  storage = (b'(X\x07\x00\x00\x00storagectorch\nFloatStorage\n'
             b'X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK<tQ')
  return (b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(' + storage
          + arguments + b'tR' + after + b'.')


def archive_of(path, pickled, **members):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('archive/data.pkl', pickled)
    archive.writestr('archive/data/0', bytes(240))
    for name, content in members.items():
      archive.writestr(f'archive/{name}', content)


def test_a_shape_that_the_pickle_changes_afterwards(tmp_path):
  pickled = pickled_tensor(b'K\x00]q\x01K\x3ca]q\x02K\x01a',
                           b'h\x01J\x00\x00\x00\x40a0h\x02K\x01a0')
  archive_of(tmp_path / 'f', pickled)
  loaded = torch_file.load(tmp_path / 'f')
  assert loaded.shape == (60,)
  assert loaded.read().shape == (60,)  # and not (60, 2**30), of any memory


def test_shapes_of_dimensions_that_do_not_count(tmp_path):
  storage = Storage(np.dtype(np.float32), 60, lambda first, count: (
      np.arange(60, dtype=np.float32)[first:first + count]))
  tensor = torch_tensors.rebuild_tensor(storage, 1, [1, 5], [2**61, 2])
  np.testing.assert_array_equal(tensor.read(), [[1, 3, 5, 7, 9]])
  tensor = torch_tensors.rebuild_tensor(storage, 0, (0, 7), (2**61, 2**61))
  assert tensor.read().shape == (0, 7)


@pytest.mark.parametrize('shape, strides', [
    ((100_000_000_000,), (0,)), ((61,), (0,)), ((8, 8), (0, 1)),
    ((2**40, 2**40), (0, 0))])
def test_tensors_larger_than_their_storage(shape, strides):
  storage = Storage(np.dtype(np.float32), 60)
  tensor = torch_tensors.rebuild_tensor(storage, 0, shape, strides)
  assert 'expanded view of 60 elements' in tensor.refused
  with pytest.raises(ValueError, match='contiguous'):
    tensor.read()


ENDLESS = ('x',)
for _ in range(40):
  ENDLESS = (ENDLESS, ENDLESS)
FLOAT = pickles.Global('torch', 'FloatStorage')


@pytest.mark.parametrize('pid, message', [
    (ENDLESS, 'which is no storage'),
    (('storage', ENDLESS, '0', 'cpu', 60), 'of type .*<tuple>'),
    (('storage', 'FloatStorage', '0', 'cpu', 60), "of type 'FloatStorage'"),
    (('storage', FLOAT, ENDLESS, 'cpu', 60), 'called .*<tuple>'),
    (('storage', FLOAT, 0, 'cpu', 60), 'called 0, expected a string'),
    (('storage', FLOAT, 'x' * 300, 'cpu', 60), 'called <str>'),
    (('storage', FLOAT, '0', 'cpu', ENDLESS), 'of .*<tuple>.* elements'),
    (('storage', FLOAT, '0', 'cpu', 2**100_000), 'of <int> elements'),
])
def test_references_are_neither_printed_nor_hashed(pid, message):
  with pytest.raises(torch_file.TorchFileError, match=message):
    torch_file._parse_id(pid)


@pytest.mark.parametrize('shape', [
    ENDLESS, [ENDLESS], (2**100_000,), (1,) * 1000, 5, {1: 1}],
    ids=lambda shape: type(shape).__name__)
def test_shapes_are_sizes(shape):
  storage = Storage(np.dtype(np.float32), 60)
  with pytest.raises(torch_file.TorchFileError, match='tensor of shape'):
    torch_tensors.rebuild_tensor(storage, 0, shape, (1,))


LEGACY_HEAD = b''.join(pickle.dumps(value, 2) for value in (
    0x1950a86a20f9469cfc6c, 1001, {'little_endian': True}))


def legacy_reference(kind, count, view):
  return (b'(X\x07\x00\x00\x00storagectorch\n' + kind + b'\n'
          b'X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK' + bytes([count]) + view
          + b'tQ')


@pytest.mark.parametrize('second, message', [
    (legacy_reference(b'DoubleStorage', 4, b'(NK\x00K\x04t'), 'elsewhere'),
    (legacy_reference(b'FloatStorage', 200, b'(NK\x00K\x64t'), 'elsewhere'),
    (legacy_reference(b'FloatStorage', 4, b'(NK\x02K\x03t'), 'a view'),
    (legacy_reference(b'FloatStorage', 4, b'(NNNt'), 'a view'),
    (legacy_reference(b'FloatStorage', 4, b'N\x85' + b'2\x86' * 40), 'a view'),
], ids=['type', 'count', 'beyond', 'none', 'endless'])
def test_legacy_views_agree_with_their_storage(tmp_path, second, message):
  """A view may not read a storage as of a larger type, beyond its end."""
  path = tmp_path / 'f'
  path.write_bytes(
      LEGACY_HEAD + b'\x80\x02(' + legacy_reference(b'FloatStorage', 4, b'N')
      + second + b'l.' + pickle.dumps(['0'], 2) + struct.pack('<q', 4)
      + bytes(1000))
  with pytest.raises(torch_file.TorchFileError, match=message):
    torch_file.load(path)


def test_legacy_headers_are_not_printed(tmp_path):
  path = tmp_path / 'f'
  path.write_bytes(pickle.dumps(0x1950a86a20f9469cfc6c, 2)
                   + b'\x80\x02N\x85' + b'2\x86' * 40 + b'.')
  with pytest.raises(torch_file.TorchFileError, match='protocol .*<tuple>'):
    torch_file.load(path)


def test_errors_say_what_is_wrong_without_blaming_the_pickle(tmp_path):
  path = tmp_path / 'f'
  torch_writer.save_zip(path, {'w': np.zeros(2)})
  with zipfile.ZipFile(path) as archive:
    pickled = archive.read('archive/data.pkl')
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('archive/data.pkl', pickled)
  with pytest.raises(torch_file.TorchFileError,
                     match=f'^{path}: truncated: it lacks'):
    torch_file.load(path)


def test_archives_that_inflate(tmp_path):
  path = tmp_path / 'f'
  archive_of(path, pickled_tensor(b'K\x00K\x3c\x85K\x01\x85'),
             byteorder=b'little' + bytes(1000))
  with pytest.raises(torch_file.TorchFileError, match='byteorder has 1006'):
    torch_file.load(path)
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('archive/data.pkl', b'\x80\x02' + b'N0' * 10**6 + b'N.')
  with pytest.raises(torch_file.TorchFileError, match='inflate to 2000004'):
    torch_file.load(path)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('archive/data.pkl', b'\x80\x02N.')
    archive.writestr('archive/data/0', b'0', zipfile.ZIP_BZIP2)
  with pytest.raises(torch_file.TorchFileError, match='method 12'):
    torch_file.load(path)


@pytest.mark.parametrize('start', [0, 30_000_000])
def test_compressed_storages_are_inflated_in_parts(tmp_path, start):
  base = np.zeros(50_000_000, np.uint8)
  base[start:start + 10] = range(10)
  torch_writer.save_zip(tmp_path / 'f', {'part': base[start:start + 10]},
                        compression=zipfile.ZIP_DEFLATED)
  tensor = torch_file.load(tmp_path / 'f')['part']
  tracemalloc.start()
  np.testing.assert_array_equal(tensor.read(), range(10))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 40_000_000
