"""Pictures of samples, one row of images per method."""

import numpy as np
import pytest

from msfp_jax.report import grid


def images(*shape):
  return np.random.default_rng(0).integers(0, 255, shape, np.uint8)


def test_images_stand_enlarged_at_the_right_in_the_order_of_the_rows():
  rows = {'data': images(3, 8, 8, 3), 'msfp': images(2, 8, 8, 3)}
  canvas = grid.labelled(rows, height=48)
  side = 48
  assert canvas.dtype == np.uint8
  assert canvas.shape[0] == 2 * (side + 2) and canvas.shape[2] == 3
  left = canvas.shape[1] - 3 * (side + 2)
  assert left > 0
  for i, batch in enumerate(rows.values()):
    for j, image in enumerate(batch):
      top, start = i * (side + 2), left + j * (side + 2)
      np.testing.assert_array_equal(
          canvas[top:top + side, start:start + side],
          image.repeat(6, axis=0).repeat(6, axis=1))
  # The shorter row ends in white, and gaps are white.
  assert (canvas[side + 2:, left + 2 * (side + 2):] == 255).all()
  assert (canvas[side:side + 2] == 255).all()


def test_grey_images_are_drawn_in_grey():
  batch = images(1, 16, 16, 1)
  canvas = grid.labelled({'a': batch}, height=16)
  picture = canvas[:16, -18:-2]
  np.testing.assert_array_equal(picture, np.repeat(batch[0], 3, axis=-1))


def test_names_are_written_left_of_their_row():
  blank = np.full((1, 8, 8, 1), 255, np.uint8)
  canvas = grid.labelled({'first': blank, 'x' * 30: blank})
  left = canvas.shape[1] - 50
  ink = (canvas < 128).all(axis=-1)
  assert not ink[:, left:].any()
  short, long = ink[:50].sum(axis=0), ink[50:].sum(axis=0)
  assert short.any() and long.any()
  assert np.flatnonzero(long).max() > np.flatnonzero(short).max()


def test_images_larger_than_a_row_keep_their_size():
  assert grid.labelled({'a': images(1, 100, 60, 3)}, 48).shape[0] == 102


def test_texts_are_listed_below_each_once():
  rows = {'a': images(3, 16, 16, 3)}
  plain = grid.labelled(rows)
  found = {}
  for texts in (['cat', 'dog', 'cat'], ['cat', 'dog', 'dog'], ['cat'] * 3,
                ['cat ' * 100] * 3):
    canvas = grid.labelled(rows, texts=texts)
    height, width = plain.shape[:2]
    np.testing.assert_array_equal(canvas[:height, :width], plain)
    found[tuple(texts)] = canvas[height:]
  two, other, one, long = found.values()
  assert two.shape == other.shape and (two != other).any()  # other numbers
  assert 0 < len(one) == len(two) // 2 < len(long)
  # Long texts are broken, and nothing is cut off.
  assert long.shape[1] < 1000 and (long[:, -4:] == 255).all()


def test_no_rows():
  with pytest.raises(ValueError, match='no rows'):
    grid.labelled({})
