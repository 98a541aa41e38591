"""Takes the statistics of a set's features, in one pass over its images."""

from collections.abc import Collection
import contextlib
import dataclasses
import math

import jax
import numpy as np

from msfp_jax import data
from msfp_jax.base import progress as progress_lib
from msfp_jax.data import stream
from msfp_jax.metrics import features as features_lib
from msfp_jax.metrics import frechet
from msfp_jax.metrics import inception_score

_CHUNK_BYTES = 2**26  # of what passes the feature network at once
_BYTES_A_NUMBER = 20  # of the outputs: float32, and float64 twice


@dataclasses.dataclass(frozen=True)
class Seen:
  """Statistics of a set of images; None for those that nobody asked for.

  Attributes:
    images: the set itself.
    pool: Gaussian of the feature vectors.
    spatial: of the features that know places.
    vectors: some of the feature vectors themselves, float32 `[K, D]`, for
      metrics that a Gaussian is not enough for.
    class_score: the inception score of the network's logits.
    probabilities: of the classes of every image, float32 `[N, K]`.
  """

  images: data.Images
  pool: frechet.Stats
  spatial: frechet.Stats | None = None
  vectors: np.ndarray | None = None
  class_score: inception_score.Score | None = None
  probabilities: np.ndarray | None = None


# Statistics that take no account of single images' classes.
OF_FEATURES = frozenset(('pool', 'spatial'))


def collect(images: data.Images, network: features_lib.FeatureNetwork,
            wanted: Collection[str] = OF_FEATURES, num_vectors: int = 0
            ) -> Seen:
  """Passes a set through a network in chunks.

  Memory does not grow with the set, but for the probabilities.

  Args:
    images: the set.
    network: of the images' shape.
    wanted: which statistics; those that the network does not bring are left
      out, and 'pool' is always there.
    num_vectors: how many vectors are kept at most: those of images at equal
      distances, as a set may be in order of classes.

  Raises:
    ValueError: images of another type or shape than the network's, features
      that are not finite, or too few images for a score.
  """
  wanted = network.brings & {'pool', *wanted}
  count = len(images)
  gaussians = {name: frechet.GaussianStats() for name in wanted & OF_FEATURES}
  score, logits = None, []
  if 'class_score' in wanted:
    score = inception_score.InceptionScore(count)
  kept, vectors = spread(np.arange(count), num_vectors), []
  for chunk, outputs in _chunks(images, network):
    for name, gaussian in gaussians.items():
      gaussian.update(outputs.features if name == 'pool' else outputs.spatial)
    # Of the rows to keep, those in this chunk, counted from its start.
    vectors.append(outputs.features[
        kept[(kept >= chunk.start) & (kept < chunk.stop)] - chunk.start])
    if score is not None:
      score.update(outputs.logits)
    # An inception score adds logits up; single images' classes need all of
    # them, of 10 numbers or so.
    if 'probabilities' in wanted:
      logits.append(outputs.logits)
  return Seen(
      images, **gaussians,
      vectors=np.concatenate(vectors) if num_vectors else None,
      class_score=score and score.result(),
      probabilities=np.asarray(jax.nn.softmax(np.concatenate(logits)))
      if logits else None)


def _chunks(images: data.Images, network: features_lib.FeatureNetwork):
  """Yields (rows, the network's outputs) of one chunk after the other."""
  count = len(images)
  # Whole batches of the network, and no more than a set needs in memory.
  each = (math.prod(images.shape[1:])
          + _BYTES_A_NUMBER * network.numbers_per_image)
  size = 256 * max(1, _CHUNK_BYTES // (256 * each))
  chunks = [slice(i, i + size) for i in range(0, count, size)]
  progress = progress_lib.Progress(network.metric, count, unit='images')
  with contextlib.closing(
      stream.read_ahead(images.__getitem__, chunks)) as read:
    for chunk, some in zip(chunks, read, strict=True):
      yield chunk, network.outputs(some)
      if len(chunks) > 1:
        progress.update(min(chunk.stop, count))


def spread(rows: np.ndarray, most: int) -> np.ndarray:
  """At most `most` of the rows, at equal distances."""
  few = min(len(rows), most)
  return rows[np.arange(few) * len(rows) // max(few, 1)]
