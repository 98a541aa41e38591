"""Every format that Pillow reads safely, as its viewers show it."""

import io
import logging

import numpy as np
from PIL import Image
import pytest

from msfp_jax import data
from msfp_jax.data import images as images_lib

RNG = np.random.default_rng(0)
ORIENTATION = 0x0112  # of EXIF
# EXIF's orientations, from what is stored to what is seen.
UPRIGHT = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90}


def load(folder):
  return data.load('images', str(folder))


@pytest.mark.parametrize('suffix', [
    '.png', '.apng', '.bmp', '.dib', '.tif', '.tiff', '.ppm', '.pnm', '.tga',
    '.sgi', '.rgb', '.pcx', '.qoi'])
def test_formats_that_lose_nothing(tmp_path, suffix):
  pixels = RNG.integers(0, 256, (5, 7, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / f'a{suffix}')
  np.testing.assert_array_equal(load(tmp_path)[:], pixels[None])


@pytest.mark.parametrize('suffix', [
    '.jpg', '.jpeg', '.jpe', '.jfif', '.jp2', '.j2k', '.webp', '.gif'])
def test_formats_that_lose_something(tmp_path, suffix):
  pixels = np.full((16, 16, 3), (200, 100, 50), np.uint8)
  Image.fromarray(pixels).save(tmp_path / f'a{suffix}')
  np.testing.assert_allclose(load(tmp_path)[:], pixels[None], atol=3)


@pytest.mark.parametrize('suffix', ['.pgm', '.tif', '.gif', '.pcx', '.jp2'])
@pytest.mark.parametrize('pixels', [
    np.full((8, 8), 77, np.uint8), RNG.integers(0, 256, (8, 8), np.uint8)],
    ids=['even', 'noise'])
def test_grey_formats_are_grey(tmp_path, suffix, pixels):
  Image.fromarray(pixels).save(tmp_path / f'a{suffix}')
  loaded = load(tmp_path)
  assert loaded.shape == (1, 8, 8, 1)
  np.testing.assert_array_equal(loaded[:], pixels[None, ..., None])


def test_a_palette_of_colours_is_not_grey(tmp_path):
  pixels = np.full((8, 8, 3), (77, 77, 78), np.uint8)
  Image.fromarray(pixels).convert('P', palette=Image.Palette.ADAPTIVE).save(
      tmp_path / 'a.gif')
  np.testing.assert_array_equal(load(tmp_path)[:], pixels[None])


def test_what_is_not_safe_or_no_image_is_not_read():
  assert not images_lib.suffixes() & {
      '.eps', '.ps', '.wmf', '.emf', '.mpg', '.h5', '.hdf', '.grib', '.pdf'}


@pytest.mark.parametrize('name', ['a.png', 'a.jpg', 'a.tif'])
def test_a_postscript_program_is_not_run_under_another_name(
    tmp_path, name, monkeypatch):
  out = io.BytesIO()
  Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(out, 'EPS')
  (tmp_path / name).write_bytes(out.getvalue())
  from PIL import EpsImagePlugin
  monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *a, **k: 1 / 0)
  with pytest.raises(ValueError, match=f'{name} is no readable image: .*none '
                     'of the formats'):
    load(tmp_path)


def test_sixteen_bits_of_a_pgm_keep_their_high_byte(tmp_path):
  pixels = RNG.integers(0, 256, (4, 6), np.uint8)
  wide = (pixels * np.uint16(256) + np.uint16(255)).astype('>u2').tobytes()
  (tmp_path / 'a.pgm').write_bytes(b'P5 6 4 65535\n' + wide)
  np.testing.assert_array_equal(load(tmp_path)[:], pixels[None, ..., None])


@pytest.mark.parametrize('dtype', [np.float32, np.int32])
def test_numbers_of_unknown_range_are_refused(tmp_path, dtype):
  """A conversion would clip them: floats in 0..1 would all be black."""
  Image.fromarray(np.ones((4, 6), dtype)).save(tmp_path / 'a.tif')
  with pytest.raises(ValueError, match='a.tif has numbers of 32 bits'):
    load(tmp_path)


def save_held(path, pixels, orientation, **options):
  exif = Image.Exif()
  exif[ORIENTATION] = orientation
  Image.fromarray(pixels).save(path, exif=exif, **options)


@pytest.mark.parametrize('orientation', UPRIGHT)
@pytest.mark.parametrize('suffix', ['.png', '.tif'])
def test_images_are_turned_as_they_are_seen(tmp_path, orientation, suffix):
  stored = RNG.integers(0, 256, (4, 6, 3), np.uint8)
  save_held(tmp_path / f'a{suffix}', stored, orientation)
  expected = UPRIGHT[orientation](stored)
  loaded = load(tmp_path)
  assert loaded.shape == (1, *expected.shape)
  np.testing.assert_array_equal(loaded[0:][0], expected)


def test_a_photograph_held_upright_has_the_size_that_is_seen(tmp_path):
  """A camera stores 6 as it saw it: 90 degrees to the left."""
  stored = np.zeros((8, 16, 3), np.uint8)
  stored[:, :8] = 255  # its left becomes the top
  save_held(tmp_path / 'a.jpg', stored, 6, quality=100)
  Image.fromarray(np.zeros((16, 8, 3), np.uint8)).save(tmp_path / 'b.png')
  image = load(tmp_path)[:][0]
  assert image.shape == (16, 8, 3)
  assert image[:8].min() > 250 and image[8:].max() < 5


@pytest.mark.parametrize('orientation', [0, 9])
def test_an_orientation_that_means_nothing_turns_nothing(
    tmp_path, orientation):
  stored = RNG.integers(0, 256, (4, 6, 3), np.uint8)
  save_held(tmp_path / 'a.png', stored, orientation)
  np.testing.assert_array_equal(load(tmp_path)[:], stored[None])


@pytest.mark.parametrize('suffix', ['.gif', '.tif', '.png'])
def test_the_first_of_several_pictures_is_read_with_a_warning(
    tmp_path, suffix, caplog):
  first, *others = [Image.fromarray(np.full((4, 6), value, np.uint8))
                    for value in (50, 100, 150)]
  for name in 'ab':
    first.save(tmp_path / f'{name}{suffix}', save_all=True,
               append_images=others)
  caplog.set_level(logging.WARNING, logger='absl')
  assert (load(tmp_path)[:] == 50).all()
  warned = [r.getMessage() for r in caplog.records]
  assert len(warned) == 1 and f'a{suffix} holds several pictures' in warned[0]


@pytest.mark.parametrize('kind', [
    'AVIF', 'BLP', 'DDS', 'GIF', 'ICO', 'JPEG', 'JPEG2000', 'PCX', 'PPM',
    'QOI', 'SGI', 'TGA', 'TIFF', 'WEBP'])
def test_damage_is_named_in_every_format(tmp_path, kind):
  """Whatever a decoder runs into, the file is named."""
  out = io.BytesIO()
  Image.fromarray(RNG.integers(0, 256, (16, 16, 3), np.uint8)).convert(
      'P' if kind == 'BLP' else 'RGB').save(out, kind)
  content, suffix = out.getvalue(), next(
      s for s, k in Image.registered_extensions().items() if k == kind)
  path, refused = tmp_path / f'a{suffix}', 0
  for length in range(1, len(content), len(content) // 15):
    for damaged in (content[:length], content[:length] + bytes(
        byte ^ 0xff for byte in content[length:])):
      path.write_bytes(damaged)
      try:
        load(tmp_path)[:]
      except ValueError as error:
        refused += 1
        assert str(path) in str(error)
  assert refused  # pixels alone, changed, are an image too
