"""Takes the statistics of a set's features, in one pass over its images."""

from collections.abc import Callable
import contextlib
import math
from typing import NamedTuple

import numpy as np

from msfp_jax import data
from msfp_jax.base import progress as progress_lib
from msfp_jax.data import stream
from msfp_jax.metrics import features as features_lib
from msfp_jax.metrics import frechet

_CHUNK_BYTES = 2**26  # of what passes the feature network at once
_BYTES_A_NUMBER = 20  # of the outputs: float32, and float64 twice


class Moments(NamedTuple):
  """The statistics of a set's features.

  Attributes:
    pool: Gaussian of the feature vectors.
    spatial: of the spatial ones; None where the network has none.
    vectors: some of the feature vectors themselves, float32 `[K, D]`, for
      metrics that a Gaussian is not enough for; None if none were asked for.
  """
  pool: frechet.Stats
  spatial: frechet.Stats | None
  vectors: np.ndarray | None = None


def collect(
    images: data.Images, network: features_lib.FeatureNetwork,
    watch: Callable[[features_lib.Outputs], None] = lambda outputs: None,
    num_vectors: int = 0) -> Moments:
  """Passes a set through a network in chunks; memory does not grow with it.

  Args:
    images: the set.
    network: of the images' shape.
    watch: called with the outputs of every chunk, in order.
    num_vectors: how many vectors are kept at most: those of images at equal
      distances, as a set may be in order of classes.

  Raises:
    ValueError: images of another type or shape than the network's, or
      features that are not finite.
  """
  pool, spatial, count = frechet.GaussianStats(), None, len(images)
  kept, vectors = spread(np.arange(count), num_vectors), []
  # Whole batches of the network, and no more than a set needs in memory.
  each = (math.prod(images.shape[1:])
          + _BYTES_A_NUMBER * network.numbers_per_image)
  size = 256 * max(1, _CHUNK_BYTES // (256 * each))
  chunks = [slice(i, i + size) for i in range(0, count, size)]
  progress = progress_lib.Progress(network.metric, count, unit='images')
  with contextlib.closing(
      stream.read_ahead(images.__getitem__, chunks)) as read:
    for chunk, some in zip(chunks, read, strict=True):
      outputs = network.outputs(some)
      pool.update(outputs.features)
      if outputs.spatial is not None:
        spatial = spatial or frechet.GaussianStats()
        spatial.update(outputs.spatial)
      # Of the rows to keep, those in this chunk, counted from its start.
      vectors.append(outputs.features[
          kept[(kept >= chunk.start) & (kept < chunk.stop)] - chunk.start])
      watch(outputs)
      if len(chunks) > 1:
        progress.update(min(chunk.stop, count))
  return Moments(
      pool, spatial, np.concatenate(vectors) if num_vectors else None)


def spread(rows: np.ndarray, most: int) -> np.ndarray:
  """At most `most` of the rows, at equal distances."""
  few = min(len(rows), most)
  return rows[np.arange(few) * len(rows) // max(few, 1)]
