"""Images in files: an `.npz`, or a folder of pictures."""

from collections.abc import Callable
import pathlib
import zipfile
import zlib

import numpy as np
from PIL import Image

_SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.webp')


def read(path: str) -> np.ndarray:
  """The images at a path, uint8 `[N, H, W, C]`.

  Args:
    path: a folder of image files of one size, or an `.npz` with one uint8
      array `[N, H, W]` or `[N, H, W, C]`.

  Raises:
    ValueError: files that do not hold such images.
    FileNotFoundError: nothing at `path`.
  """
  root = pathlib.Path(path).expanduser()
  if not root.exists():
    raise FileNotFoundError(f'no images at {root}: neither a folder nor a '
                            'file; check --config.data.path')
  images = _read_folder(root) if root.is_dir() else _read_npz(root)
  if images.ndim == 3:
    images = images[..., None]
  if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
    raise ValueError(f'{root}: images must be uint8 [N, H, W] or [N, H, W, C] '
                     f'with C = 1 or 3 and N > 0, got {images.shape}')
  return images


def _read_npz(path: pathlib.Path) -> np.ndarray:
  try:
    # np.load leaves a damaged file open if it opened it itself.
    with (open(path, 'rb') as file,
          np.load(file, allow_pickle=False) as arrays):
      names = arrays.files
      name = 'images' if 'images' in names else names[0] if names else None
      if name is None or (len(names) > 1 and name != 'images'):
        raise ValueError(f'holds {names}: name the array to use "images"')
      images = arrays[name]
      if not isinstance(images, np.ndarray):
        raise ValueError(f'{name!r} is no array')
  except (OSError, ValueError, AttributeError, TypeError, EOFError,
          NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
    raise ValueError(f'{path} is no .npz of images: {error}') from error
  if images.dtype != np.uint8:
    raise ValueError(
        f'{path}: array {name!r} is {images.dtype}, must be uint8 in 0..255; '
        'convert floats by np.round(x * 255).astype(np.uint8)')
  return images


def read_celeba(path: str) -> np.ndarray:
  """CelebA's aligned photographs as DDIM's models saw them, 64 x 64.

  The 128 x 128 pixels around (89, 121), halved with a bilinear filter, as
  ermongroup/ddim prepares them.

  Args:
    path: img_align_celeba, a folder of 178 x 218 pictures.

  Raises:
    FileNotFoundError: no such folder.
    ValueError: pictures of another size.
  """
  root = pathlib.Path(path).expanduser()
  if not root.is_dir():
    raise FileNotFoundError(
        f'no CelebA at {root}: get img_align_celeba.zip from the data set\'s '
        'page (mmlab.ie.cuhk.edu.hk/projects/CelebA.html), unpack it, and pass '
        '--config.data.path=.../img_align_celeba')
  return _read_folder(root, _celeba_crop)


def _celeba_crop(image: Image.Image) -> Image.Image:
  if image.size != (178, 218):
    raise ValueError(f'is {image.size[0]} x {image.size[1]} pixels, not CelebA'
                     "'s aligned 178 x 218")
  x, y = 89, 121
  return image.crop((x - 64, y - 64, x + 64, y + 64)).resize(
      (64, 64), Image.BILINEAR)


def _read_folder(root: pathlib.Path,
                 change: Callable[[Image.Image], Image.Image] = lambda i: i
                 ) -> np.ndarray:
  files = sorted(
      p for p in root.rglob('*') if p.suffix.lower() in _SUFFIXES)
  if not files:
    raise ValueError(f'{root} holds no images ({", ".join(_SUFFIXES)})')
  images = []
  for file in files:
    try:
      with Image.open(file) as image:
        if image.mode.startswith('I;16'):
          # Pillow's conversion would saturate.
          image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        grey = image.mode in ('1', 'L')
        image = change(image.convert('L' if grey else 'RGB'))
        images.append(np.asarray(image))
    except ValueError as error:
      raise ValueError(f'{file} {error}') from error
    except OSError as error:
      raise ValueError(f'{file} is no readable image: {error}') from error
    if images[-1].shape[:2] != images[0].shape[:2]:
      raise ValueError(
          f'{file} is {images[-1].shape[1]} x {images[-1].shape[0]} pixels, '
          f'{files[0].name} is {images[0].shape[1]} x {images[0].shape[0]}: '
          'all images must have one size')
  if len({image.ndim for image in images}) > 1:
    images = [image if image.ndim == 3 else np.stack([image] * 3, axis=-1)
              for image in images]
  return np.stack(images)
