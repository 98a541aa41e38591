"""Reads and writes reference statistics, in files that other tools read too.

An `.npz` with `mu` and `sigma` is what pytorch-fid, clean-fid and EDM write and
read; ADM's has `mu_s` and `sigma_s` beside them, for sFID, and sample images.
Beside these stands where our own come from, and feature vectors themselves
where metrics need them.
"""

from collections.abc import Mapping
import functools
import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from msfp_jax import data
from msfp_jax.base import files
from msfp_jax.base import npz
from msfp_jax.base import seal
from msfp_jax.metrics import collect
from msfp_jax.metrics import features
from msfp_jax.metrics import frechet


class Reference(NamedTuple):
  """Statistics of a set of images.

  Attributes:
    pool: of the feature vectors; None in NOTHING.
    spatial: of sFID's; None where the file or the network has none.
    provenance: JSON-like: 'features', 'preprocessing' and more; empty in
      files of other tools.
    vectors: some of the feature vectors, float32 `[K, D]`, or None.
  """
  pool: frechet.Stats | None
  spatial: frechet.Stats | None
  provenance: Mapping[str, Any]
  vectors: np.ndarray | None = None


# Statistics that ship with the package: of a data set by a network.
_SHIPPED = pathlib.Path(__file__).parent
_DATA_SETS = ('cifar10',)
# Where images are compared with full precision's alone.
NOTHING = Reference(None, None, {})


class _Hashed:
  """Images whose bytes are hashed as they are read, in order."""

  def __init__(self, images: data.Images):
    self._images, self.shape = images, images.shape
    self.sha256 = hashlib.sha256()

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, rows: slice) -> np.ndarray:
    found = np.ascontiguousarray(self._images[rows])
    self.sha256.update(found.data)
    return found


def measure(images: data.Images, network: features.FeatureNetwork,
            dataset: str, num_vectors: int = 0) -> Reference:
  """Takes the statistics of a set, in chunks.

  Args:
    images: the set.
    network: of the images' shape.
    dataset: what the images are, for the provenance, where it stands beside
      the SHA-256 of their bytes.
    num_vectors: how many feature vectors are kept at most.

  Raises:
    ValueError: see `collect.collect`.
  """
  # The hash tells sets apart that have a name in common, at no further read.
  images = _Hashed(images)
  seen = collect.collect(images, network, num_vectors=num_vectors)
  return Reference(seen.pool, seen.spatial, {
      'dataset': dataset, 'num_samples': len(images),
      'images_sha256': images.sha256.hexdigest(), **network.provenance},
      seen.vectors)


def save(path: str | os.PathLike, reference: Reference) -> None:
  """Writes an `.npz`, all or nothing.

  Raises:
    ValueError: fewer than 2 samples.
    OSError: the file cannot be written; one already there is kept.
  """
  pool, spatial, provenance, vectors = reference
  # mu and sigma are what other tools look for; they ignore the rest.
  arrays = {'mu': pool.mean, 'sigma': pool.cov,
            'provenance': np.array(json.dumps(dict(provenance)))}
  if pool.num_samples is not None:
    arrays['num_samples'] = np.int64(pool.num_samples)
  if spatial is not None:
    arrays |= {'mu_s': spatial.mean, 'sigma_s': spatial.cov}
  if vectors is not None:
    arrays['vectors'] = vectors
  # First, so that no cut leaves it out and keeps others.
  arrays = {seal.KEY: np.array(_digest(arrays))} | arrays
  # Opened here: by name, savez would add a suffix.
  with files.atomic_path(path) as temporary, open(temporary, 'wb') as file:
    np.savez(file, **arrays)


def is_shipped(name: str) -> bool:
  """Whether it names statistics of the package, and no file that is there."""
  # A folder of that name holds the data, if anything.
  return name in _DATA_SETS and not os.path.isfile(name)


def locate(name: str, network: str) -> pathlib.Path:
  """The file of statistics that is meant.

  Args:
    name: its path, or 'cifar10' for those of the package, of its 50,000
      training images.
    network: the feature network's name.

  Raises:
    ValueError: the package has none by that network.
  """
  if not is_shipped(name):
    return pathlib.Path(name).expanduser()
  path = _SHIPPED / f'{name}_{network}.npz'
  if not path.is_file():
    there = sorted(found.stem.removeprefix(f'{name}_')
                   for found in _SHIPPED.glob(f'{name}_*.npz'))
    raise ValueError(f'the statistics of {name!r} that ship with the package '
                     f'are of {there}, not of {network!r}: name a file, or '
                     'the data')
  return path


def load(path: str | os.PathLike) -> Reference:
  """Reads what `save`, pytorch-fid, clean-fid, EDM or ADM wrote.

  Raises:
    FileNotFoundError: nothing at `path`.
    ValueError: no `.npz` with a finite `mu` `[D]` and `sigma` `[D, D]`.
  """
  try:
    with npz.opened(path, 'with mu and sigma') as arrays:
      pool = arrays['mu'], arrays['sigma']
      spatial = ((arrays['mu_s'], arrays['sigma_s'])
                 if 'mu_s' in arrays else None)
      count = (int(arrays['num_samples']) if 'num_samples' in arrays else None)
      vectors = arrays['vectors'] if 'vectors' in arrays else None
      provenance = (json.loads(str(arrays['provenance']))
                    if 'provenance' in arrays else {})
      if not isinstance(provenance, dict):
        raise ValueError('its provenance is no JSON object')
      # What is neither sealed nor of known origin is another tool's.
      if provenance or seal.KEY in arrays:
        seal.check(str(path),
                   str(arrays[seal.KEY]) if seal.KEY in arrays else None,
                   lambda: _digest(arrays), 'make the statistics anew')
  except FileNotFoundError:
    raise FileNotFoundError(f'no statistics file at {path}') from None
  # The count holds for both; files of other tools have none.
  pool = _gaussian(path, '', pool, count)
  if vectors is not None and (vectors.shape[1:] != pool.mean.shape
                              or vectors.dtype.kind != 'f'):
    raise ValueError(f'{path}: vectors must be [K, {len(pool.mean)}] as mu, '
                     f'got {vectors.dtype} {list(vectors.shape)}')
  return Reference(
      pool, None if spatial is None else _gaussian(path, '_s', spatial, count),
      provenance, vectors)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
  """Of all arrays of a file but the digest itself."""
  return seal.digest_of(None, {
      name: functools.partial(arrays.__getitem__, name)
      for name in arrays if name != seal.KEY})


def _gaussian(path, suffix: str, pair, count: int | None) -> frechet.Gaussian:
  if odd := [str(x.dtype) for x in pair if x.dtype.kind not in 'fiu']:
    raise ValueError(f'{path}: mu{suffix} and sigma{suffix} must be numbers, '
                     f'got {odd[0]}')
  mean, cov = (np.asarray(x, np.float64) for x in pair)
  if mean.ndim != 1 or cov.shape != mean.shape * 2:
    raise ValueError(f'{path}: mu{suffix} must be [D] and sigma{suffix} [D, D],'
                     f' got {mean.shape} and {cov.shape}')
  if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
    raise ValueError(f'{path}: mu{suffix} or sigma{suffix} holds NaN or '
                     'infinity; make the statistics anew')
  return frechet.Gaussian(mean, cov, count)
