"""Images in files: an `.npz`, or a folder of pictures."""

from collections.abc import Callable
import pathlib

import numpy as np
from PIL import Image

from msfp_jax.base import npz
from msfp_jax.data import folder
from msfp_jax.data import images as images_lib
from msfp_jax.data.images import EncodedImages
from msfp_jax.data.images import Images

# The axis of colours, of arrays of any kind of image.
_CHANNELS = (1, 3, 4)


def read(path: str) -> Images:
  """Reads an array of images, or opens a folder, decoded when asked for.

  Args:
    path: a folder of image files of one size (see `folder.find`, and
      `images.suffixes`), or an `.npz` with one uint8 array `[N, H, W]` or
      `[N, H, W, C]`.

  Raises:
    ValueError: files that do not hold such images; of a folder, those that
      are met.
    FileNotFoundError: nothing at `path`.
  """
  root = pathlib.Path(path).expanduser()
  if not root.exists():
    raise FileNotFoundError(
        f'no images at {root}: put a folder of images of one size there, or '
        'an .npz of uint8 [N, H, W] or [N, H, W, C]; or pass another '
        '--config.data.path')
  if root.is_dir():
    return _read_folder(root)
  images = _read_npz(root)
  if images.ndim == 3:
    _refuse_single(root, images.shape)
    images = images[..., None]
  if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
    raise ValueError(f'{root}: images must be uint8 [N, H, W] or [N, H, W, C] '
                     f'with C = 1 or 3 and N > 0, got {images.shape}')
  return images


def _refuse_single(path: pathlib.Path, shape: tuple[int, ...]) -> None:
  """Raises ValueError for `[N, H, W]` that looks like one image in colours."""
  if shape[-1] in _CHANNELS:
    layout, whole = '[H, W, C]', [1, *shape]
  elif shape[0] in _CHANNELS[1:]:
    layout, whole = '[C, H, W]', [1, *shape[1:], shape[0]]
  else:
    return
  raise ValueError(
      f'{path}: {list(shape)} may be one image {layout} or {shape[0]} grey '
      f'ones: save it as {whole} (transposed, not reshaped, if the colours '
      f'come first), or as {[*shape, 1]}')


def _read_npz(path: pathlib.Path) -> np.ndarray:
  with npz.opened(path, 'of images') as arrays:
    names = list(arrays)
    name = 'images' if 'images' in names else names[0] if names else None
    if name is None or (len(names) > 1 and name != 'images'):
      raise ValueError(f'holds {names}: name the array to use "images"')
    images = arrays[name]
  if images.dtype != np.uint8:
    raise ValueError(
        f'{path}: array {name!r} is {images.dtype}, must be uint8 in 0..255; '
        'convert floats by np.round(x * 255).astype(np.uint8)')
  return images


def read_celeba(path: str) -> EncodedImages:
  """Opens CelebA's aligned photographs as DDIM's models saw them, 64 x 64.

  The 128 x 128 pixels around (89, 121), halved with a bilinear filter, as
  ermongroup/ddim prepares them.

  Args:
    path: img_align_celeba, a folder of 178 x 218 pictures.

  Raises:
    FileNotFoundError: no such folder.
    ValueError: no pictures, or one met is of another size.
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
  x, y = 89, 121  # the centre of the faces, as DDIM's code has it
  return image.crop((x - 64, y - 64, x + 64, y + 64)).resize(
      (64, 64), Image.BILINEAR)


def _read_folder(root: pathlib.Path,
                 change: Callable[[Image.Image], Image.Image] = lambda i: i
                 ) -> EncodedImages:
  # Strings: a million paths are many times their size.
  suffixes = images_lib.suffixes()
  contents = folder.find(root, suffixes)
  if not (names := contents.files):
    raise ValueError(
        f'{root} holds no images, only: {contents.left_out() or "nothing"}; '
        f'what is read are {", ".join(sorted(suffixes))}')
  return EncodedImages(
      len(names), lambda rows: [(names[i], names[i]) for i in rows], change)
