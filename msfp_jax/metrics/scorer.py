"""Images against a data set, and against the full-precision model's."""

import contextlib
import math

import numpy as np

from msfp_jax import data
from msfp_jax import progress as progress_lib
from msfp_jax.data import stream
from msfp_jax.metrics import digits_checks
from msfp_jax.metrics import features
from msfp_jax.metrics import frechet
from msfp_jax.metrics import similarity

_CHUNK_BYTES = 2**26  # of pixels that pass the feature network at once


class Scorer:
  """Measures images against the data and against the first images it saw."""

  def __init__(self, images: data.Images, feature_name: str):
    """Takes the statistics of the data set `images`, read once in chunks."""
    self._network = features.get(feature_name, images.shape[1:])
    self._data = self._stats(images)
    self._teacher = None

  @property
  def metric(self) -> str:
    """Name of the Frechet distance: fd_<features>."""
    return self._network.metric

  def _stats(self, images: data.Images) -> frechet.GaussianStats:
    stats, count = frechet.GaussianStats(), len(images)
    # Whole batches of the network, and no more than a set needs in memory.
    size = 256 * max(1, _CHUNK_BYTES // (256 * math.prod(images.shape[1:])))
    chunks = [slice(i, i + size) for i in range(0, count, size)]
    progress = progress_lib.Progress(self.metric, count)
    with contextlib.closing(
        stream.read_ahead(images.__getitem__, chunks)) as read:
      for chunk, some in zip(chunks, read, strict=True):
        stats.update(self._network.features(some))
        if len(chunks) > 1:
          progress.update(min(chunk.stop, count))
    return stats

  def score(self, images: np.ndarray) -> dict[str, float]:
    """Metrics of images; the first call's are the reference of the others."""
    stats = self._stats(images)
    found = {self.metric: frechet.frechet_distance(stats, self._data)}
    probabilities = None
    if self._network.num_classes:
      probabilities = self._network.probabilities(images)
      found |= {'confidence': digits_checks.confidence(probabilities),
                'class_balance': digits_checks.class_balance(probabilities)}
    if self._teacher is None:
      self._teacher = (images, stats, probabilities)
      return found
    fp_images, fp_stats, fp_probabilities = self._teacher
    found[f'{self.metric}_to_fp'] = frechet.frechet_distance(stats, fp_stats)
    found['psnr_to_fp'] = similarity.psnr(images, fp_images)
    if probabilities is not None:
      found['label_agreement'] = digits_checks.label_agreement(
          probabilities, fp_probabilities)
    return found
