"""CIFAR-10 in both published forms, CelebA's crop, parquet."""

import io
import os
import pickle
import sys

import cifar_files
import numpy as np
from PIL import Image
import pytest

from msfp_jax import data
from msfp_jax.data import parquet as parquet_lib

RNG = np.random.default_rng(0)


@pytest.fixture(scope='module')
def planes():
  """Makes five files of 10,000 rows as published: red, green, blue planes."""
  return RNG.integers(0, 256, (5, 10_000, 3, 32, 32), np.uint8)


def images_of(planes):
  return np.concatenate([np.moveaxis(batch, 1, -1) for batch in planes])


def test_the_hand_made_pickle_is_one():
  rows = RNG.integers(0, 256, (3, 3072), np.uint8)
  loaded = pickle.loads(cifar_files.python2_pickle(rows), encoding='latin1')
  np.testing.assert_array_equal(loaded['data'], rows)


@pytest.mark.slow
@pytest.mark.parametrize('write', [
    cifar_files.write_binary, cifar_files.write_python2,
    cifar_files.write_python3])
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
    (pickle.dumps({b'data': 5}), "'data' is 5, expected an array"),
    (pickle.dumps([1]), r'\[1\], expected a dict'),
    (b'\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\n)R('
     b'K\x01K\x02N\x89Ntbs.', 'pixels of type None'),
    # The name of the type is a tuple whose text never ends.
    (b'\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\n)R('
     b'K\x01K\x02cnumpy\ndtype\nN\x85' + b'2\x86' * 40
     + b'\x85R\x89Ntbs.', 'pixels of type .*<tuple>'),
])
def test_a_damaged_python_batch_is_named(tmp_path, planes, content, message):
  cifar_files.write_python3(tmp_path, planes[:, :1])
  (tmp_path / 'data_batch_1').write_bytes(content)
  with pytest.raises(ValueError, match=rf'data_batch_1 is no .*{message}'):
    data.load('cifar10', str(tmp_path))


def test_a_batch_that_would_run_code(tmp_path, planes):
  cifar_files.write_python3(tmp_path, planes[:, :1])
  (tmp_path / 'data_batch_1').write_bytes(
      pickle.dumps({b'data': Attack(tmp_path / 'proof')}))
  with pytest.raises(ValueError, match=r'posix\.system'):
    data.load('cifar10', str(tmp_path))
  assert not (tmp_path / 'proof').exists()


def test_a_truncated_binary_batch_is_named(tmp_path, planes):
  cifar_files.write_binary(tmp_path, planes)
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
  assert (loaded[:] == pixels[60, 30]).all()


def test_celeba_of_another_size_is_named(tmp_path):
  Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / 'a.png')
  with pytest.raises(ValueError, match=r'a.png is 64 x 64.*178 x 218'):
    data.load('celeba', str(tmp_path))
  with pytest.raises(FileNotFoundError, match='img_align_celeba'):
    data.load('celeba', str(tmp_path / 'absent'))


@pytest.fixture
def write_parquet(tmp_path):
  """Writes images, two to a row group."""
  arrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')

  def write(name, images):
    encoded = []
    for image in images:
      out = io.BytesIO()
      if image is not None:
        Image.fromarray(image).save(out, 'PNG')
      encoded.append({'bytes': out.getvalue(), 'path': ''})
    parquet.write_table(
        arrow.table({'label': list(range(len(images))), 'img': encoded}),
        tmp_path / name, row_group_size=2)
    return tmp_path

  return write


def test_parquet(write_parquet):
  """Rows of two files are read in any order, also twice."""
  images = RNG.integers(0, 256, (8, 4, 6, 3), np.uint8)
  write_parquet('a.parquet', images[:3])
  loaded = data.load('parquet', str(write_parquet('b.parquet', images[3:])))
  assert loaded.shape == images.shape and len(loaded) == 8
  for rows in (slice(None), slice(1, 6), [7, 0, 3, 3, 2], [-1]):
    np.testing.assert_array_equal(loaded[rows], images[rows])


def test_parquet_keeps_no_more_row_groups_than_fit(write_parquet, monkeypatch):
  parquet = pytest.importorskip('pyarrow.parquet')
  read, groups = parquet.ParquetFile.read_row_group, []
  monkeypatch.setattr(
      parquet.ParquetFile, 'read_row_group',
      lambda self, index, columns: groups.append(index) or read(
          self, index, columns=columns))
  images = RNG.integers(0, 256, (6, 8, 8, 3), np.uint8)
  path = str(write_parquet('a.parquet', images))
  loaded = data.load('parquet', path)
  loaded[[5, 0, 4, 1]]
  loaded[:]
  assert groups == [0, 2, 1]  # the first for the shape
  groups.clear()
  monkeypatch.setattr(parquet_lib, '_KEPT_BYTES', 1)
  loaded = data.load('parquet', path)
  loaded[[5, 0, 4, 1]]
  loaded[:]
  assert groups == [0, 2, 0, 1, 2]


def test_parquet_of_grey_images(write_parquet):
  images = RNG.integers(0, 256, (3, 4, 6), np.uint8)
  loaded = data.load('parquet', str(write_parquet('a.parquet', images)))
  np.testing.assert_array_equal(loaded[:], images[..., None])


def test_an_image_in_parquet_that_cannot_be_read_is_named(write_parquet):
  image = np.zeros((4, 6, 3), np.uint8)
  loaded = data.load('parquet', str(write_parquet(
      'a.parquet', [image, image, image, None, image[:2]])))
  assert loaded[:3].shape == (3, 4, 6, 3)
  with pytest.raises(ValueError, match='a.parquet: image 3 is no readable'):
    loaded[3:]
  with pytest.raises(ValueError, match='image 4 is 6 x 2 .*image 0 is 6 x 4'):
    loaded[4:]


def test_parquet_that_holds_no_images(tmp_path, write_parquet):
  arrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  path = tmp_path / 'a.parquet'
  parquet.write_table(arrow.table({'label': [1]}), path)
  with pytest.raises(ValueError, match=r"a.parquet .*no column.*\['label'\]"):
    data.load('parquet', str(path))
  path.write_bytes(b'nothing')
  with pytest.raises(ValueError, match='a.parquet is no .parquet of images'):
    data.load('parquet', str(path))
  write_parquet('a.parquet', [np.zeros((4, 6, 3), np.uint8)])
  table = parquet.read_table(path)
  parquet.write_table(table.slice(0, 0), path)
  with pytest.raises(ValueError, match='hold no rows'):
    data.load('parquet', str(path))


@pytest.mark.parametrize('name', ['ArrowNotImplementedError', 'ArrowKeyError',
                                  'ArrowInvalid'])
def test_what_arrow_says_of_damage_has_the_files_name(
    write_parquet, monkeypatch, name):
  """As of a flipped bit that makes integers of more than 64 bits."""
  folder = write_parquet('a.parquet', RNG.integers(
      0, 256, (2, 4, 6, 3), np.uint8))
  import pyarrow
  from pyarrow import parquet

  def fail(*unused, **options):
    raise getattr(pyarrow, name, pyarrow.lib.ArrowKeyError)('no such')

  monkeypatch.setattr(parquet.ParquetFile, 'read_row_group', fail)
  with pytest.raises(ValueError, match='a.parquet is no .parquet of images'):
    data.load('parquet', str(folder))


def test_a_row_group_without_all_of_its_rows(write_parquet, monkeypatch):
  """As where a flipped bit in the footer says more than there are."""
  folder = write_parquet('a.parquet', RNG.integers(
      0, 256, (4, 4, 6, 3), np.uint8))
  from pyarrow import parquet
  read = parquet.ParquetFile.read_row_group
  monkeypatch.setattr(
      parquet.ParquetFile, 'read_row_group', lambda *args, **options: read(
          *args, **options).slice(0, 1))
  with pytest.raises(ValueError, match='a.parquet is no .* 1 rows of the 2'):
    data.load('parquet', str(folder))


def test_parquet_that_is_absent_says_what_to_get(tmp_path):
  for path in (tmp_path, tmp_path / 'a.parquet'):
    with pytest.raises(FileNotFoundError, match='download.*config.data.path'):
      data.load('parquet', str(path))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
  (tmp_path / 'a.parquet').write_bytes(b'')
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(ValueError, match='pip install pyarrow'):
    data.load('parquet', str(tmp_path))


def test_synthetic():
  assert data.load('synthetic', '3x8x16').shape == (256, 8, 16, 3)
  with pytest.raises(ValueError, match=r"'8'.*CxHxW"):
    data.load('synthetic', '8')
