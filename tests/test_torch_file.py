"""Files of torch.save, read without torch."""

import collections
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch_writer

from msfp_jax.base import pickles
from msfp_jax.convert import torch_file
from msfp_jax.convert import torch_tensors
from msfp_jax.convert.tensors import flatten
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.convert.tensors import Storage

both_formats = pytest.mark.parametrize('save', torch_writer.SAVERS.values(),
                                       ids=torch_writer.SAVERS)
RNG = np.random.default_rng(0)
ARRAYS = {
    'float32': RNG.normal(size=(3, 4, 5)).astype(np.float32),
    'float64': RNG.normal(size=(2,)),
    'float16': RNG.normal(size=(2, 3)).astype(np.float16),
    'bfloat16': RNG.normal(size=(7,)).astype(torch_writer.BFLOAT16),
    'int64': np.arange(6).reshape(2, 3),
    'int32': np.arange(3, dtype=np.int32),
    'uint8': np.arange(256, dtype=np.uint8),
    'bool': np.array([True, False, True]),
    'scalar': np.array(0.18215, np.float32),
    'empty': np.zeros((0, 3), np.float32),
}


@both_formats
def test_every_dtype(tmp_path, save):
  save(tmp_path / 'f', {'state_dict': ARRAYS})
  loaded = torch_file.load(tmp_path / 'f')['state_dict']
  assert loaded.keys() == ARRAYS.keys()
  for key, array in ARRAYS.items():
    assert loaded[key].shape == array.shape
    assert loaded[key].dtype == array.dtype
    np.testing.assert_array_equal(loaded[key].read(), array)


@both_formats
def test_views_of_one_storage(tmp_path, save):
  base = np.arange(24, dtype=np.float32).reshape(4, 6)
  views = {'base': base, 'rows': base[1:3], 'columns': base[:, 2:4],
           'transposed': base.T, 'steps': base[::2, 1::3], 'last': base[3, 5:]}
  save(tmp_path / 'f', views)
  loaded = torch_file.load(tmp_path / 'f')
  for key, view in views.items():
    np.testing.assert_array_equal(loaded[key].read(), view)


@both_formats
def test_nested_containers_and_other_values(tmp_path, save):
  save(tmp_path / 'f', [collections.OrderedDict(a=ARRAYS['float32']),
                        {'step': 5, 'lr': [1e-3]}, 'text', None])
  state, optimizer, text, none = torch_file.load(tmp_path / 'f')
  assert list(state) == ['a'] and isinstance(state['a'], LazyTensor)
  assert (optimizer, text, none) == ({'step': 5, 'lr': [1e-3]}, 'text', None)


def test_flatten():
  tensor = LazyTensor.of(ARRAYS['float32'])
  tree = [{'a': {'b': tensor, 'step': 1}}, (tensor,), 'x']
  assert flatten(tree) == {'0.a.b': tensor, '1.0': tensor}
  assert list(flatten({'z': tensor, 'a': {'y': tensor}, 'b': tensor})) == [
      'z', 'a.y', 'b']


def test_flatten_of_what_contains_itself_or_is_deep():
  tensor = LazyTensor.of(ARRAYS['float32'])
  tree = {'w': tensor}
  tree['self'] = [tree]
  assert flatten(tree) == {'w': tensor}
  deep = tensor
  for _ in range(1000):
    deep = [deep]
  assert list(flatten(deep).values()) == [tensor]
  with pytest.raises(ValueError, match='more than 1000 levels'):
    flatten([deep])


def test_flatten_of_what_shares_its_parts():
  """Shared lists with 2**40 leaves, or endless names, are refused."""
  tensor = LazyTensor.of(ARRAYS['float32'])
  with pytest.raises(ValueError, match='more than 1000000 entries'):
    flatten([[tensor] * 2000] * 2000)
  with pytest.raises(ValueError, match='more than 1000000 entries'):
    flatten([[1] * 2000] * 2000)
  tree = {}
  for _ in range(40):
    tree = [tree, tree]
  with pytest.raises(ValueError, match='10000000 letters'):
    flatten(tree)
  tree = {'x' * 10_000: [tensor] * 5_000}
  with pytest.raises(ValueError, match='10000000 letters'):
    flatten(tree)
  assert len(flatten({'a': [tensor] * 100_000})) == 100_000


@both_formats
def test_objects_of_other_frameworks_are_inert(tmp_path, save):
  """Objects of other frameworks, as in latent diffusion's files, are inert."""
  name = 'pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint'

  def content(made):
    callback = made[name]()
    callback.best_model_path = 'x'
    return {'state_dict': {'w': ARRAYS['float32']},
            'callbacks': {made[name]: {'best': ARRAYS['scalar']},
                          'instance': callback}}

  save(tmp_path / 'f', content, extra=[name])
  loaded = torch_file.load(tmp_path / 'f')
  np.testing.assert_array_equal(
      loaded['state_dict']['w'].read(), ARRAYS['float32'])
  assert isinstance(loaded['callbacks']['instance'], pickles.Opaque)
  assert loaded['callbacks']['instance'].made_by == name


class Attack:

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f'touch {self.path}',)


@both_formats
@pytest.mark.parametrize('place', [
    lambda attack: attack,
    lambda attack: {'state_dict': {'w': attack}},
    lambda attack: {'state_dict': {'w': ARRAYS['float32']}, 'hook': [attack]},
], ids=['root', 'tensor', 'aside'])
def test_code_is_named_and_not_run(tmp_path, save, place):
  save(tmp_path / 'f', place(Attack(tmp_path / 'proof')))
  with pytest.raises(torch_file.TorchFileError, match=r'posix\.system'):
    torch_file.load(tmp_path / 'f')
  assert not (tmp_path / 'proof').exists()


@both_formats
def test_truncated_anywhere(tmp_path, save):
  path = tmp_path / 'f'
  save(path, {'w': ARRAYS['float32'], 'v': ARRAYS['int64']})
  content = path.read_bytes()
  for end in range(0, len(content), 7):
    path.write_bytes(content[:end])
    with pytest.raises(torch_file.TorchFileError, match=str(path)):
      torch_file.load(path)


def test_a_compressed_archive(tmp_path):
  torch_writer.save_zip(tmp_path / 'f', ARRAYS,
                        compression=zipfile.ZIP_DEFLATED)
  for key, tensor in torch_file.load(tmp_path / 'f').items():
    np.testing.assert_array_equal(tensor.read(), ARRAYS[key])


def test_big_endian_files_are_swapped(tmp_path):
  path = tmp_path / 'f'
  torch_writer.save_zip(path, {'w': ARRAYS['float32']})
  with zipfile.ZipFile(path) as archive:
    members = {n: archive.read(n) for n in archive.namelist()}
  members['archive/byteorder'] = b'big'
  members['archive/data/0'] = ARRAYS['float32'].byteswap().tobytes()
  with zipfile.ZipFile(path, 'w') as archive:
    for name, content in members.items():
      archive.writestr(name, content)
  np.testing.assert_array_equal(
      torch_file.load(path)['w'].read(), ARRAYS['float32'])


def repack(path, change):
  with zipfile.ZipFile(path) as archive:
    members = {n: archive.read(n) for n in archive.namelist()}
  change(members)
  with zipfile.ZipFile(path, 'w') as archive:
    for name, content in members.items():
      archive.writestr(name, content)


@pytest.mark.parametrize('change, message', [
    (lambda m: m.pop('archive/data/0'), 'lacks the member archive/data/0'),
    (lambda m: m.update({'archive/data/0': b'123'}), '3 bytes of the 240'),
    (lambda m: m.pop('archive/data.pkl'), 'no checkpoint of torch.save'),
    (lambda m: m.update({'archive/data.pkl': b'junk'}), 'not a pickle'),
    (lambda m: m.update({'archive/data.pkl': b''}), 'not a pickle'),
])
def test_damaged_archives(tmp_path, change, message):
  path = tmp_path / 'f'
  torch_writer.save_zip(path, {'w': ARRAYS['float32']})
  repack(path, change)
  with pytest.raises(torch_file.TorchFileError, match=message):
    torch_file.load(path)


def test_other_files(tmp_path):
  path = tmp_path / 'f'
  for content, message in [
      (b'', 'neither'), (b'<html>', 'neither'), (b'\x80', 'neither'),
      (pickle.dumps({'a': 1}, 2), 'magic number')]:
    path.write_bytes(content)
    with pytest.raises(torch_file.TorchFileError, match=message):
      torch_file.load(path)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('readme.txt', 'hello')
  with pytest.raises(torch_file.TorchFileError, match='no checkpoint'):
    torch_file.load(path)


@pytest.mark.parametrize('offset, shape, strides', [
    (0, (61,), (1,)), (57, (4,), (1,)), (-1, (2,), (1,)), (0, (2,), (-1,)),
    (0, (3,), (30,)), (0, (2, 2), (1,)), (0, ('a',), (1,)), (0, (-1,), (1,)),
])
def test_views_beyond_their_storage(offset, shape, strides):
  storage = Storage(np.dtype(np.float32), 60)
  with pytest.raises(torch_file.TorchFileError, match='tensor of shape'):
    torch_tensors.rebuild_tensor(storage, offset, shape, strides)


def test_reading_one_tensor_reads_only_its_bytes(tmp_path, monkeypatch):
  path = tmp_path / 'f'
  base = np.arange(100_000, dtype=np.float32)
  torch_writer.save_zip(path, {'part': base[500:510], 'all': base})
  loaded = torch_file.load(path)
  sizes = []
  monkeypatch.setattr(torch_file, '_from_bytes', lambda content, *rest: (
      sizes.append(len(content)), np.frombuffer(content, np.float32))[1])
  np.testing.assert_array_equal(loaded['part'].read(), base[500:510])
  assert sizes == [40]


def test_a_large_checkpoint_with_its_optimizer(tmp_path):
  names = [f'model.blocks.{i}.attention.weight' for i in range(3_000)]
  base = np.arange(6_000, dtype=np.float32)
  weights = {name: base[i:i + 2] for i, name in enumerate(names)}
  content = {
      'state_dict': collections.OrderedDict(weights),
      'optimizer': {'state': {i: {'step': i, 'exp_avg': weight}
                              for i, weight in enumerate(weights.values())},
                    'param_groups': [{'params': list(range(3_000))}]}}
  torch_writer.save_zip(tmp_path / 'f', content,
                        compression=zipfile.ZIP_DEFLATED)
  loaded = torch_file.load(tmp_path / 'f')
  assert len(flatten(loaded)) == 6_000
  np.testing.assert_array_equal(
      loaded['state_dict'][names[7]].read(), [7, 8])


def damaged_directory(content):
  """The directory's place, changed so that members lie before the file."""
  place = content.rindex(b'PK\5\6') + 16
  content[place:place + 4] = struct.pack('<I', len(content))


def damaged_member(offset, value):
  """A byte of the header before the tensor's elements."""
  def damage(content):
    content[content.index(b'archive/data/0') - 30 + offset] = value

  return damage


def damaged_end(content):
  """The directory places the tensor at the file's end."""
  place = content.rindex(b'archive/data/0') - 4
  content[place:place + 4] = struct.pack('<I', len(content) - 3)


@pytest.mark.parametrize('damage', [
    damaged_directory, damaged_end, damaged_member(0, 0),
    damaged_member(26, 3), damaged_member(27, 255), damaged_member(29, 255),
    damaged_member(31, 0)])
def test_members_that_are_not_where_the_directory_says(tmp_path, damage):
  """Elements from another place would be other weights, in silence."""
  path = tmp_path / 'f'
  torch_writer.save_zip(path, {'w': ARRAYS['float32']})
  content = bytearray(path.read_bytes())
  damage(content)
  path.write_bytes(content)
  with pytest.raises(torch_file.TorchFileError, match=f'^{path}: '):
    torch_file.load(path)['w'].read()


@pytest.mark.parametrize('compression', [
    zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_file_that_is_cut_after_it_was_opened(tmp_path, compression):
  path = tmp_path / 'f'
  torch_writer.save_zip(path, {'w': ARRAYS['float32']},
                        compression=compression)
  loaded = torch_file.load(path)
  path.write_bytes(path.read_bytes()[:400])
  with pytest.raises(torch_file.TorchFileError, match=f'^{path}: '):
    loaded['w'].read()
  path.unlink()
  with pytest.raises(FileNotFoundError):
    loaded['w'].read()
