"""CIFAR-10 in both published forms, CelebA's crop, parquet."""

import os
import pickle

import numpy as np
from PIL import Image
import pytest

from msfp_jax import data

RNG = np.random.default_rng(0)


@pytest.fixture(scope='module')
def planes():
  """Five files of 10,000 rows as published: red, green, blue planes."""
  return RNG.integers(0, 256, (5, 10_000, 3, 32, 32), np.uint8)


def images_of(planes):
  return np.concatenate([np.moveaxis(batch, 1, -1) for batch in planes])


def write_binary(folder, planes):
  for i, batch in enumerate(planes, 1):
    labels = RNG.integers(0, 10, (len(batch), 1), np.uint8)
    rows = np.concatenate([labels, batch.reshape(len(batch), -1)], axis=1)
    (folder / f'data_batch_{i}.bin').write_bytes(rows.tobytes())


def python2_pickle(rows):
  """As Python 2 wrote it: everything a string of bytes, old module names."""
  short = lambda text: b'U' + bytes([len(text)]) + text
  content = rows.tobytes()
  dtype = (b'cnumpy\ndtype\n' + short(b'u1') + b'K\x00K\x01\x87R'
           + b'(K\x03' + short(b'|') + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff'
           + b'K\x00tb')
  shape = b'M' + len(rows).to_bytes(2, 'little') + b'M\x00\x0c\x86'
  array = (b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n'
           + b'K\x00\x85' + short(b'b') + b'\x87R(K\x01' + shape + dtype
           + b'\x89T' + len(content).to_bytes(4, 'little') + content + b'tb')
  return (b'\x80\x02}(' + short(b'batch_label') + short(b'batch 1 of 5')
          + short(b'data') + array + short(b'labels') + b']u.')


def test_the_hand_made_pickle_is_one():
  rows = RNG.integers(0, 256, (3, 3072), np.uint8)
  loaded = pickle.loads(python2_pickle(rows), encoding='latin1')
  np.testing.assert_array_equal(loaded['data'], rows)


def write_python2(folder, planes):
  for i, batch in enumerate(planes, 1):
    (folder / f'data_batch_{i}').write_bytes(
        python2_pickle(batch.reshape(len(batch), -1)))


def write_python3(folder, planes):
  for i, batch in enumerate(planes, 1):
    (folder / f'data_batch_{i}').write_bytes(pickle.dumps({
        b'data': batch.reshape(len(batch), -1), b'labels': [0] * len(batch)}))


@pytest.mark.parametrize('write', [write_binary, write_python2, write_python3])
def test_cifar10(tmp_path, planes, write):
  write(tmp_path, planes)
  loaded = data.load('cifar10', str(tmp_path))
  assert loaded.dtype == np.uint8
  np.testing.assert_array_equal(loaded, images_of(planes))


def test_cifar10_that_is_absent_says_what_to_get(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'cifar-10-binary.*data.path'):
    data.load('cifar10', str(tmp_path))
  (tmp_path / 'data_batch_1.bin').write_bytes(b'')
  with pytest.raises(FileNotFoundError, match='no CIFAR-10'):
    data.load('cifar10', str(tmp_path))


class Attack:

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize('content, message', [
    (b'junk', 'not a pickle'),
    (pickle.dumps({b'labels': []}), 'data'),
    (pickle.dumps({b'data': np.zeros((4, 3072), np.uint8)}), r'\(4, 3072\)'),
    (pickle.dumps({b'data': np.zeros((4, 3072), np.float32)}), 'f4'),
])
def test_a_damaged_python_batch_is_named(tmp_path, planes, content, message):
  write_python3(tmp_path, planes[:, :1])
  (tmp_path / 'data_batch_1').write_bytes(content)
  with pytest.raises(ValueError, match=rf'data_batch_1 is no .*{message}'):
    data.load('cifar10', str(tmp_path))


def test_a_batch_that_would_run_code(tmp_path, planes):
  write_python3(tmp_path, planes[:, :1])
  (tmp_path / 'data_batch_1').write_bytes(
      pickle.dumps({b'data': Attack(tmp_path / 'proof')}))
  with pytest.raises(ValueError, match=r'posix\.system'):
    data.load('cifar10', str(tmp_path))
  assert not (tmp_path / 'proof').exists()


def test_a_truncated_binary_batch_is_named(tmp_path, planes):
  write_binary(tmp_path, planes)
  file = tmp_path / 'data_batch_3.bin'
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(ValueError, match=r'data_batch_3.bin.*truncated'):
    data.load('cifar10', str(tmp_path))


def test_celeba_is_cropped_around_the_face(tmp_path):
  pixels = np.zeros((218, 178, 3), np.uint8)
  pixels[57:185, 25:153] = RNG.integers(0, 256, (1, 1, 3))
  Image.fromarray(pixels).save(tmp_path / '000001.png')
  loaded = data.load('celeba', str(tmp_path))
  assert loaded.shape == (1, 64, 64, 3)
  assert (loaded == pixels[60, 30]).all()


def test_celeba_of_another_size_is_named(tmp_path):
  Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / 'a.png')
  with pytest.raises(ValueError, match=r'a.png is 64 x 64.*178 x 218'):
    data.load('celeba', str(tmp_path))
  with pytest.raises(FileNotFoundError, match='img_align_celeba'):
    data.load('celeba', str(tmp_path / 'absent'))


def test_parquet(tmp_path):
  arrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  images = RNG.integers(0, 256, (3, 8, 8, 3), np.uint8)
  encoded = []
  for i, image in enumerate(images):
    Image.fromarray(image).save(tmp_path / f'{i}.png')
    encoded.append({'bytes': (tmp_path / f'{i}.png').read_bytes(), 'path': ''})
  parquet.write_table(arrow.table({'label': [0, 1, 2], 'img': encoded}),
                      tmp_path / 'a.parquet')
  np.testing.assert_array_equal(
      data.load('parquet', str(tmp_path / 'a.parquet')), images)


def test_synthetic():
  assert data.load('synthetic', '3x8x16').shape == (256, 8, 16, 3)
  with pytest.raises(ValueError, match=r"'8'.*CxHxW"):
    data.load('synthetic', '8')
