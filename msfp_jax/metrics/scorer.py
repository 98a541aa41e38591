"""Images against a data set, and against the full-precision model's."""

from collections.abc import Mapping

import jax
import numpy as np

from msfp_jax import data
from msfp_jax.metrics import collect
from msfp_jax.metrics import digits_checks
from msfp_jax.metrics import features
from msfp_jax.metrics import frechet
from msfp_jax.metrics import inception_score
from msfp_jax.metrics import similarity

_SPLITTING = 'shuffled'  # of inception scores


class Scorer:
  """Measures images against the data and against the first images it saw."""

  def __init__(self, images: data.Images, feature_name: str, *,
               inception: str = '', preprocessing: str = 'tf'):
    """Takes the statistics of the data set `images`, read once in chunks.

    Args:
      images: the data set.
      feature_name: of the feature network, see `features.get`.
      inception: file of Inception's weights.
      preprocessing: of Inception's input.
    """
    self._network = features.get(
        feature_name, images.shape[1:], weights=inception,
        preprocessing=preprocessing)
    self._data = collect.collect(images, self._network)
    self._teacher = None

  @property
  def metric(self) -> str:
    """Name of the Frechet distance: fd_<features>, or fid."""
    return self._network.metric

  @property
  def provenance(self) -> Mapping[str, str]:
    """What the metrics hold for: features, preprocessing, weights, splits."""
    splitting = {'is_splitting': _SPLITTING} if self._scored else {}
    return {**self._network.provenance, **splitting}

  @property
  def _scored(self) -> bool:
    """Whether there is an inception score; digits have checks of their own."""
    return self._network.num_classes > 0 and self._network.name != 'digits'

  def score(self, images: np.ndarray) -> dict[str, float]:
    """Metrics of images; the first call's are the reference of the others."""
    logits, score = [], None
    watch = lambda outputs: None
    if self._scored:
      score = inception_score.InceptionScore(len(images), _SPLITTING)
      watch = lambda outputs: score.update(outputs.logits)
    elif self._network.num_classes:
      watch = lambda outputs: logits.append(outputs.logits)
    moments = collect.collect(images, self._network, watch)
    found = self._distances(moments, self._data)
    if score is not None:
      name, result = self._network.named('is'), score.result()
      found |= {name: result.mean, f'{name}_std': result.std}
    probabilities = None
    if logits:
      probabilities = np.asarray(jax.nn.softmax(np.concatenate(logits)))
      found |= {'confidence': digits_checks.confidence(probabilities),
                'class_balance': digits_checks.class_balance(probabilities)}
    if self._teacher is None:
      self._teacher = (images, moments, probabilities)
      return found
    fp_images, fp_moments, fp_probabilities = self._teacher
    found |= {f'{name}_to_fp': value for name, value in
              self._distances(moments, fp_moments).items()}
    found['psnr_to_fp'] = similarity.psnr(images, fp_images)
    if probabilities is not None:
      found['label_agreement'] = digits_checks.label_agreement(
          probabilities, fp_probabilities)
    return found

  def _distances(self, a: collect.Moments, b: collect.Moments
                 ) -> dict[str, float]:
    found = {self.metric: frechet.frechet_distance(a.pool, b.pool)}
    if a.spatial is not None:
      found[self._network.named('fd_spatial')] = frechet.frechet_distance(
          a.spatial, b.spatial)
    return found
