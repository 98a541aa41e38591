"""Images in: scikit-learn's digits, a person's folder or `.npz`.

Images are uint8 `[N, H, W, C]` on the host; models see float32 in [-1, 1].
"""

import pathlib
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

_SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.webp')


def to_float(images: np.ndarray | jax.Array) -> jax.Array:
  """uint8 0..255 -> float32 in [-1, 1]."""
  return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def to_uint8(x: jax.Array) -> jax.Array:
  """float32, clipped to [-1, 1] -> uint8, rounded to the nearest.

  NaN becomes 0 in the cast; callers check samples for NaN before (see
  `evaluate.generate`).
  """
  return jnp.round((jnp.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def digits() -> tuple[np.ndarray, np.ndarray]:
  """scikit-learn's 1,797 scanned digits, 8 x 8 enlarged to 16 x 16.

  Returns:
    uint8 images `[1797, 16, 16, 1]` (white on black), int labels `[1797]`.
  """
  from sklearn.datasets import load_digits  # half a second, only needed here

  bunch = load_digits()
  scans = np.round(bunch.images * (255 / 16)).astype(np.uint8)
  images = np.stack([
      np.asarray(Image.fromarray(scan).resize((16, 16), Image.BILINEAR))
      for scan in scans])
  return images[..., None], bunch.target


def load(name: str, path: str = '') -> np.ndarray:
  """The images of a data set, uint8 `[N, H, W, C]`.

  Args:
    name: 'digits', or 'images' for a person's own.
    path: for 'images': a folder of image files of one size, or an `.npz` with
      one uint8 array `[N, H, W]` or `[N, H, W, C]`.

  Raises:
    ValueError: an unknown name, or files that do not hold such images.
    FileNotFoundError: nothing at `path`.
  """
  if name == 'digits':
    return digits()[0]
  if name != 'images':
    raise ValueError(f"data set {name!r}: must be 'digits' or 'images'")
  if not path:
    raise ValueError("data set 'images' needs a path: pass "
                     '--config.data.path=FOLDER_OR_NPZ')
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


def _read_folder(root: pathlib.Path) -> np.ndarray:
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
        images.append(np.asarray(image.convert('L' if grey else 'RGB')))
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
