"""Folders are read when rows are asked for, and no sooner."""

import numpy as np
from PIL import Image
import pytest

from msfp_jax import data
from msfp_jax.data import images as images_lib

RNG = np.random.default_rng(0)


def save(folder, arrays):
  for i, array in enumerate(arrays):
    Image.fromarray(array).save(folder / f'{i:03d}.png')
  return str(folder)


@pytest.fixture
def opened(monkeypatch):
  """Records the names of the files that are opened."""
  names, original = [], Image.open

  def counted(file, **options):
    names.append(file[-7:-4])
    return original(file, **options)

  monkeypatch.setattr(images_lib.Image, 'open', counted)
  return names


def test_only_what_is_asked_for_is_read(tmp_path, opened):
  loaded = data.load('images', save(
      tmp_path, RNG.integers(0, 256, (9, 4, 6, 3), np.uint8)))
  assert loaded.shape == (9, 4, 6, 3) and len(loaded) == 9
  assert set(opened) == {'000'}
  opened.clear()
  loaded[[5, 2]]
  assert sorted(opened) == ['002', '005']
  opened.clear()
  assert loaded[4:4].shape == (0, 4, 6, 3)
  assert not opened


@pytest.mark.parametrize('rows', [
    slice(None), slice(2, 5), slice(-3, None), slice(None, None, 4),
    np.array([8, 0, 3]), np.array([3, 3]), np.array([-1]),
    np.arange(9) % 2 == 0], ids=str)
def test_rows_are_those_of_an_array(tmp_path, rows):
  images = RNG.integers(0, 256, (9, 4, 6, 3), np.uint8)
  loaded = data.load('images', save(tmp_path, images))[rows]
  assert loaded.dtype == np.uint8
  np.testing.assert_array_equal(loaded, images[rows])


def test_rows_that_are_not_there(tmp_path):
  loaded = data.load('images', save(tmp_path, np.zeros((3, 4, 6), np.uint8)))
  with pytest.raises(IndexError, match='3'):
    loaded[[3]]
  with pytest.raises(TypeError, match='slice or an int array'):
    loaded[0]


def test_a_set_is_not_turned_into_an_array_by_accident(tmp_path):
  loaded = data.load('images', save(tmp_path, np.zeros((3, 4, 6), np.uint8)))
  with pytest.raises(TypeError, match='slice or an int array'):
    np.asarray(loaded, np.uint8)


def test_all_headers_are_read_before_a_set_is_grey(tmp_path, opened):
  """A set is not taken for grey where its last image alone has colours."""
  images = list(np.zeros((30, 2, 2), np.uint8))
  assert data.load('images', save(tmp_path, images)).shape == (30, 2, 2, 1)
  assert len(set(opened)) == 30
  save(tmp_path, images[:-1] + [np.zeros((2, 2, 3), np.uint8)])
  assert data.load('images', str(tmp_path)).shape == (30, 2, 2, 3)
