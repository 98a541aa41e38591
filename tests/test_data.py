"""Images in: the embedded digits, folders, .npz files, and what is refused."""

import io
import re
import zipfile

import numpy as np
from PIL import Image
import pytest
from sklearn.datasets import load_digits

from msfp_jax import data


def images(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save_images(folder, arrays):
  folder.mkdir(parents=True, exist_ok=True)
  for i, array in enumerate(arrays):
    Image.fromarray(array).save(folder / f'{i:03d}.png')


def test_uint8_survives_the_way_to_float_and_back():
  x = np.arange(256, dtype=np.uint8)
  floats = data.to_float(x)
  assert floats.dtype == np.float32
  assert (floats.min(), floats.max()) == (-1, 1)
  assert np.array_equal(data.to_uint8(floats), x)


def test_to_uint8_rounds_to_the_nearest_and_clips():
  x = np.array([-9, -1, 1, 9], np.float32)
  assert data.to_uint8(x).tolist() == [0, 0, 255, 255]
  assert data.to_uint8(x).dtype == np.uint8
  levels = np.arange(256) / 127.5 - 1
  off = np.random.default_rng(0).uniform(-0.45, 0.45, 256) / 127.5
  assert data.to_uint8((levels + off).astype(np.float32)).tolist() == list(
      range(256))


def test_digits_are_uint8_on_black():
  digits, labels = data.digits()
  assert digits.shape == (1797, 16, 16, 1) and digits.dtype == np.uint8
  assert (digits.min(), digits.max()) == (0, 255)
  assert digits.mean() < 128
  assert np.array_equal(labels, load_digits().target)
  assert np.array_equal(data.load('digits'), digits)


def test_digits_shrunk_again_are_the_scans():
  """Means of 2 x 2 pixels give the scans, blurred by (1, 6, 1) / 8."""
  scans = load_digits().images * 255 / 16
  blur = lambda a, axis: np.apply_along_axis(
      lambda v: np.convolve(np.pad(v, 1, 'edge'), [1/8, 6/8, 1/8], 'valid'),
      axis, a)
  some = slice(0, 1797, 40)
  expected = blur(blur(scans[some], 1), 2)
  digits = data.digits()[0][some, :, :, 0].astype(float)
  shrunk = digits.reshape(-1, 8, 2, 8, 2).mean(axis=(2, 4))
  np.testing.assert_allclose(shrunk, expected, rtol=0, atol=1.5)


@pytest.mark.parametrize('shape', [(5, 4, 6), (5, 4, 6, 1), (5, 4, 6, 3)])
def test_npz(tmp_path, shape):
  x = images(*shape)
  np.savez(tmp_path / 'a.npz', x)
  loaded = data.load('images', str(tmp_path / 'a.npz'))
  assert loaded.dtype == np.uint8
  assert np.array_equal(loaded, x if len(shape) == 4 else x[..., None])


def test_npz_compressed(tmp_path):
  x = images(5, 4, 6, 3)
  np.savez_compressed(tmp_path / 'a.npz', x)
  assert np.array_equal(data.load('images', str(tmp_path / 'a.npz')), x)


def test_npz_of_several_arrays_takes_the_one_named_images(tmp_path):
  x = images(5, 4, 6, 3)
  np.savez(tmp_path / 'a.npz', labels=np.arange(5), images=x)
  assert np.array_equal(data.load('images', str(tmp_path / 'a.npz')), x)


def test_npz_of_several_arrays_and_no_name_is_refused(tmp_path):
  np.savez(tmp_path / 'a.npz', a=images(5, 4, 6), b=images(5, 4, 6))
  with pytest.raises(ValueError, match='name the array to use "images"'):
    data.load('images', str(tmp_path / 'a.npz'))


def test_npz_of_no_array_is_refused(tmp_path):
  np.savez(tmp_path / 'a.npz')
  with pytest.raises(ValueError, match='a.npz is no .npz of images'):
    data.load('images', str(tmp_path / 'a.npz'))


def test_folder_of_colour_images_in_the_order_of_names(tmp_path):
  x = images(3, 4, 6, 3)
  save_images(tmp_path, x)
  (tmp_path / 'notes.txt').write_text('not an image')
  assert np.array_equal(data.load('images', str(tmp_path))[:], x)


def test_folder_of_grey_images(tmp_path):
  x = images(3, 4, 6)
  save_images(tmp_path, x)
  assert np.array_equal(data.load('images', str(tmp_path))[:], x[..., None])


def test_folders_inside_the_folder_and_capital_suffixes(tmp_path):
  x = images(2, 4, 6, 3)
  save_images(tmp_path / 'a/b', x[:1])
  Image.fromarray(x[1]).save(tmp_path / 'a.PNG')  # '.' sorts before '/'
  assert np.array_equal(data.load('images', str(tmp_path))[:], x)


@pytest.mark.parametrize('order', [(0, 1), (1, 0)], ids=['colour', 'grey'])
def test_one_colour_image_makes_all_colour(tmp_path, order):
  """Whichever comes first: colour is not lost to the order of names."""
  x = images(2, 4, 6, 3)
  x[1] = x[1, ..., :1]  # grey
  files = [x[0], x[1, ..., 0]]
  save_images(tmp_path, [files[i] for i in order])
  assert np.array_equal(data.load('images', str(tmp_path))[:], x[list(order)])


def test_sixteen_bit_grey_keeps_its_high_byte_or_is_refused(tmp_path):
  """A PNG of 16 bits is not saturated to white."""
  x = images(4, 6)
  Image.fromarray(x.astype(np.uint16) * 257).save(tmp_path / 'a.png')
  try:
    loaded = data.load('images', str(tmp_path))[:]
  except ValueError as error:
    assert 'a.png' in str(error)
  else:
    assert np.array_equal(loaded, x[None, ..., None])


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  np.savez(tmp_path / 'a.npz', images(2, 4, 6))
  assert data.load('images', '~/a.npz').shape == (2, 4, 6, 1)


def test_nothing_there(tmp_path):
  with pytest.raises(FileNotFoundError,
                     match='absent: put a folder .*config.data.path'):
    data.load('images', str(tmp_path / 'absent'))


def test_no_path():
  for name in ('images', 'celeba', 'cifar10'):
    with pytest.raises(FileNotFoundError,
                       match='no --config.data.path was given'):
      data.load(name)


def test_unknown_name():
  with pytest.raises(ValueError, match="'cifar'.*cifar10.*digits.*images"):
    data.load('cifar')


@pytest.mark.parametrize('shape, layout', [
    ((4, 6, 1), '[H, W, C]'), ((4, 6, 3), '[H, W, C]'),
    ((4, 6, 4), '[H, W, C]'), ((3, 4, 6), '[C, H, W]'),
    ((4, 4, 6), '[C, H, W]')])
def test_one_image_is_not_read_as_many_grey_ones(tmp_path, shape, layout):
  np.savez(tmp_path / 'a.npz', images(*shape))
  with pytest.raises(ValueError, match=re.escape(
      f'{list(shape)} may be one image {layout} or {shape[0]} grey ones')):
    data.load('images', str(tmp_path / 'a.npz'))
  # The way out that the message names.
  np.savez(tmp_path / 'a.npz', images(*shape, 1))
  assert data.load('images', str(tmp_path / 'a.npz')).shape == (*shape, 1)


@pytest.mark.parametrize('value', [0.5, np.nan])
def test_floats_are_refused(tmp_path, value):
  np.savez(tmp_path / 'a.npz', np.full((2, 4, 6), value, np.float32))
  with pytest.raises(ValueError, match='is float32, must be uint8'):
    data.load('images', str(tmp_path / 'a.npz'))


@pytest.mark.parametrize('shape', [
    (4,), (4, 6), (2, 4, 6, 2), (2, 4, 6, 4), (0, 4, 6, 3), (2, 3, 4, 6, 3)])
def test_other_shapes_are_refused(tmp_path, shape):
  np.savez(tmp_path / 'a.npz', images(*shape))
  with pytest.raises(ValueError, match='images must be uint8 .N, H, W'):
    data.load('images', str(tmp_path / 'a.npz'))


def test_pickles_are_refused(tmp_path):
  np.savez(tmp_path / 'a.npz', np.array([{}, None], object))
  with pytest.raises(ValueError, match='a.npz is no .npz of images'):
    data.load('images', str(tmp_path / 'a.npz'))


def test_two_sizes_are_refused_by_name(tmp_path):
  save_images(tmp_path, [images(4, 6, 3), images(4, 6, 3), images(5, 6, 3)])
  loaded = data.load('images', str(tmp_path))
  with pytest.raises(ValueError, match=r'002.png is 6 x 5.*000.png is 6 x 4'):
    loaded[:]


def test_empty_folder(tmp_path):
  with pytest.raises(ValueError, match='holds no images'):
    data.load('images', str(tmp_path))


def png_bytes():
  out = io.BytesIO()
  Image.fromarray(images(16, 16, 3)).save(out, 'PNG')
  return out.getvalue()


def flipped(content, places):
  content = bytearray(content)
  for place in places:
    content[place] ^= 0xff
  return bytes(content)


@pytest.mark.parametrize('damage', [
    lambda c: b'', lambda c: b'nothing', lambda c: c[:20], lambda c: c[:-200],
    lambda c: flipped(c, [12]), lambda c: flipped(c, [37]),
    lambda c: flipped(c, [20]),
    lambda c: flipped(c, range(41, 60)),
], ids=['empty', 'text', 'header', 'cut', 'IHDR', 'IDAT', 'size', 'data'])
def test_a_damaged_image_is_named(tmp_path, damage):
  (tmp_path / 'a.png').write_bytes(png_bytes())
  (tmp_path / 'b.png').write_bytes(damage(png_bytes()))
  loaded = data.load('images', str(tmp_path))
  assert loaded[:1].shape == (1, 16, 16, 3)
  with pytest.raises(ValueError, match='b.png is '):
    loaded[:]


def npz_bytes(save=np.savez):
  out = io.BytesIO()
  save(out, images(20, 8, 8))
  return out.getvalue()


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
@pytest.mark.parametrize('damage', [
    lambda c: b'', lambda c: b'nothing', lambda c: c[:len(c) // 2],
    lambda c: flipped(c, range(200, 210)),
    lambda c: flipped(c, range(60, 70)),
], ids=['empty', 'text', 'cut', 'data', 'header'])
def test_a_damaged_npz_is_named(tmp_path, damage, save):
  (tmp_path / 'a.npz').write_bytes(damage(npz_bytes(save)))
  with pytest.raises(ValueError, match='a.npz is no .npz of images'):
    data.load('images', str(tmp_path / 'a.npz'))


def test_npy_renamed_npz_is_refused(tmp_path):
  np.save(tmp_path / 'a.npy', images(2, 4, 6))
  (tmp_path / 'a.npy').rename(tmp_path / 'a.npz')
  with pytest.raises(ValueError, match='a.npz is no .npz of images'):
    data.load('images', str(tmp_path / 'a.npz'))


def test_a_zip_of_something_else_is_refused(tmp_path):
  with zipfile.ZipFile(tmp_path / 'a.npz', 'w') as file:
    file.writestr('readme.txt', 'hello')
  with pytest.raises(ValueError, match='a.npz'):
    data.load('images', str(tmp_path / 'a.npz'))
