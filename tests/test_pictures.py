"""Tests of pictures.py: grids, PNG files."""

import os

import numpy as np
from PIL import Image
import pytest

from msfp_jax.base import pictures


def test_grid_places_images_row_by_row():
  images = np.arange(5 * 2 * 3).reshape(5, 2, 3, 1).astype(np.uint8)
  grid = pictures.image_grid(images, 3)
  assert grid.shape == (4, 9, 1)
  for i in range(5):
    y, x = 2 * (i // 3), 3 * (i % 3)
    np.testing.assert_array_equal(grid[y:y + 2, x:x + 3], images[i])
  assert not grid[2:, 6:].any()
  assert pictures.image_grid(images, 16).shape == (2, 15, 1)


@pytest.mark.parametrize('images, columns, message', [
    (np.zeros((1, 2, 2, 1)), 1, 'float64'),
    (np.zeros((1, 2, 2, 2), np.uint8), 1, r'\[1, 2, 2, 2\]'),
    (np.zeros((0, 2, 2, 1), np.uint8), 1, 'not empty'),
    (np.zeros((1, 2, 2, 1), np.uint8), 0, 'columns is 0'),
])
def test_grid_refuses_other_images(images, columns, message):
  with pytest.raises(ValueError, match=message):
    pictures.image_grid(images, columns)


@pytest.mark.parametrize('channels, mode', [(1, 'L'), (3, 'RGB')])
def test_png_keeps_every_pixel(tmp_path, channels, mode):
  image = np.random.RandomState(0).randint(0, 256, (4, 5, channels), np.uint8)
  path = tmp_path / 'samples' / 'x.png'
  pictures.save_png(path, image)
  with Image.open(path) as read:
    assert read.mode == mode
    np.testing.assert_array_equal(
        np.asarray(read).reshape(image.shape), image)
  assert os.listdir(path.parent) == ['x.png']


def test_png_refuses_other_images(tmp_path):
  for bad in (np.zeros((2, 2)), np.zeros((2, 2, 4), np.uint8)):
    with pytest.raises(ValueError, match='x.png.*uint8'):
      pictures.save_png(tmp_path / 'x.png', bad)
  assert not os.listdir(tmp_path)
