"""Reference statistics of a set of images, as a file: eval.py --make_stats."""

import os

from msfp_jax import data
from msfp_jax.metrics import features
from msfp_jax.metrics import stats_file


def load(source: str) -> data.Images:
  """The images of a source.

  Args:
    source: 'NAME:PATH' or 'NAME' of a data set (see `data.DATASETS`), or the
      path of a folder or an `.npz`.

  Raises:
    ValueError, FileNotFoundError: see `data.load`.
  """
  name, _, path = source.partition(':')
  if name in data.DATASETS and not os.path.exists(source):
    return data.load(name, path)
  return data.load('images', source)


def run(source: str, path: str, feature_name: str, *, weights: str = '',
        preprocessing: str = 'tf', num_vectors: int = 0) -> str:
  """Writes the statistics of a source's images.

  Args:
    source: see `load`.
    path: of the `.npz`, see `stats_file.save`.
    feature_name: see `features.get`, as are `weights` and `preprocessing`.
    weights: of Inception.
    preprocessing: likewise.
    num_vectors: feature vectors kept in the file at most.

  Returns:
    A line that says what was written.

  Raises:
    ValueError: no images, or another network than there is.
    OSError: files that are not there or cannot be written.
  """
  if num_vectors < 0:
    raise ValueError(f'vectors={num_vectors}: must be at least 0')
  images = load(source)
  network = features.get(feature_name, tuple(images.shape[1:]),
                         weights=weights, preprocessing=preprocessing)
  reference = stats_file.measure(images, network, source, num_vectors)
  stats_file.save(path, reference)
  return (f'{path}: {len(images):,} images of {images.shape[1:]}, features '
          f'{network.name!r} ({network.dim})')
