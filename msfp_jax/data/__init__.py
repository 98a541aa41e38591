"""Data sets: uint8 images `[N, H, W, C]`, which models see in [-1, 1]."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.data import cifar10
from msfp_jax.data import files
from msfp_jax.data import parquet
from msfp_jax.data.digits import digits
from msfp_jax.data.images import Images

__all__ = ['DATASETS', 'Images', 'digits', 'load', 'to_float', 'to_uint8']


def synthetic(path: str) -> np.ndarray:
  """256 images of noise, for runs that only try whether everything works.

  Args:
    path: their size, 'CxHxW'.
  """
  try:
    channels, height, width = map(int, path.split('x'))
  except ValueError:
    channels = height = width = 0
  if min(channels, height, width) < 1:
    raise ValueError(f'synthetic images of size {path!r}: must be CxHxW')
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (256, height, width, channels), np.uint8)


# Name -> reader of a path; a new data set is one entry.
DATASETS: dict[str, Callable[[str], Images]] = {
    'digits': lambda path: digits()[0],  # scikit-learn's
    'images': files.read,
    'celeba': files.read_celeba,
    'cifar10': cifar10.read,
    'parquet': parquet.read,
    'synthetic': synthetic,
}


# Those that no path belongs to.
_NO_PATH = frozenset({'digits'})


def to_float(images: np.ndarray | jax.Array) -> jax.Array:
  """Scales uint8 0..255 to float32 in [-1, 1]."""
  return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def to_uint8(x: jax.Array) -> jax.Array:
  """Clips float32 to [-1, 1], and scales it to the nearest uint8.

  NaN becomes 0 in the cast; callers check samples for NaN before (see
  `generate.batches`).
  """
  return jnp.round((jnp.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def load(name: str, path: str = '') -> Images:
  """Loads the images of a data set, or opens it for reading by rows.

  Folders and parquet files stay on the disk; the others are arrays.

  Args:
    name: a name in DATASETS.
    path: where its files are; 'digits' needs none.

  Raises:
    ValueError: an unknown name, files that do not hold images, or a path of
      what has none.
    FileNotFoundError: no path, or nothing there; what to get is said.
  """
  if name not in DATASETS:
    raise ValueError(f'data set {name!r}: must be one of {sorted(DATASETS)}')
  if path and name in _NO_PATH:
    raise ValueError(f'config.data.path={path}: the data set {name!r} has no '
                     'files; set config.data.name to whose they are, of '
                     f'{sorted({*DATASETS} - _NO_PATH)}')
  # So that every reader says in its own words what to get.
  return DATASETS[name](path or '(no --config.data.path was given)')
