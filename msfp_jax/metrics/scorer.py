"""Scores images against a reference, and against the full-precision model's."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from msfp_jax import data
from msfp_jax.metrics import collect
from msfp_jax.metrics import digits_checks
from msfp_jax.metrics import features
from msfp_jax.metrics import frechet
from msfp_jax.metrics import inception_score
from msfp_jax.metrics import kernel_distance
from msfp_jax.metrics import neighbours
from msfp_jax.metrics import similarity
from msfp_jax.metrics import stats_file

_SPLITTING = 'shuffled'  # of inception scores
_SUBSET_SIZE = 1000  # of the kernel distance, where there are more vectors
LEAST_VECTORS = 4  # of a set, for third neighbours


class Scorer:
  """Measures images against a reference and the first images it saw."""

  def __init__(self, network: features.FeatureNetwork,
               reference: stats_file.Reference):
    """Checks that the reference can be compared with.

    Args:
      network: the feature network.
      reference: statistics of the data by that network. Where it has vectors,
        as many of the images are compared with them as well: kernel distance,
        precision and recall.

    Raises:
      ValueError: the reference is another network's.
    """
    # What the reference does not tell, as files of other tools, cannot differ.
    odd = [f'{name}: {reference.provenance[name]!r} there, {value!r} here'
           for name, value in network.provenance.items()
           if reference.provenance.get(name, value) != value]
    if len(reference.pool.mean) != network.dim:
      odd.append(f'{len(reference.pool.mean)} features there, {network.dim} '
                 'here')
    if reference.vectors is not None and len(
        reference.vectors) < LEAST_VECTORS:
      odd.append(f'{len(reference.vectors)} vectors there, {LEAST_VECTORS} '
                 'needed')
    if odd:
      raise ValueError('the reference statistics are of other features, so no '
                       f'distance to them means anything ({"; ".join(odd)}); '
                       'make them anew with eval.py --make_stats')
    self._network, self._reference = network, reference
    self._teacher = None

  @property
  def metric(self) -> str:
    """The name of the Frechet distance: fd_<features>, or fid."""
    return self._network.metric

  @property
  def provenance(self) -> Mapping[str, Any]:
    """The conditions of the metrics: network, reference, splits, vectors."""
    found = {**self._network.provenance, 'reference': {
        name: value for name, value in self._reference.provenance.items()
        if name not in self._network.provenance}}
    if self._reference.vectors is not None:
      found['reference']['vectors'] = len(self._reference.vectors)
    if self._scored:
      found['is_splitting'] = _SPLITTING
    return found

  @property
  def least_samples(self) -> int:
    """The least number of images that the metrics can be taken of."""
    if self._scored:
      return inception_score.NUM_SPLITS
    return 2 if self._reference.vectors is None else LEAST_VECTORS

  @property
  def _scored(self) -> bool:
    """Whether there is an inception score; digits have checks of their own."""
    return self._network.num_classes > 0 and self._network.name != 'digits'

  def score(self, images: data.Images) -> dict[str, float]:
    """The metrics of images; later calls also compare with the first call's.

    Args:
      images: uint8, of the network's shape; the first call's must stay
        readable.
    """
    # Outputs pass once, in chunks: an inception score adds them up, while the
    # checks of digits need the logits of all images, of 10 numbers each.
    logits, score = [], None
    watch = lambda outputs: None
    if self._scored:
      score = inception_score.InceptionScore(len(images), _SPLITTING)
      watch = lambda outputs: score.update(outputs.logits)
    elif self._network.num_classes:
      watch = lambda outputs: logits.append(outputs.logits)
    vectors = self._reference.vectors
    moments = collect.collect(
        images, self._network, watch, 0 if vectors is None else len(vectors))
    found = self._distances(moments, self._reference)
    if vectors is not None:
      found |= self._set_distances(moments.vectors, vectors)
    if score is not None:
      name, result = self._network.named('is'), score.result()
      found |= {name: result.mean, f'{name}_std': result.std}
    probabilities = None
    if logits:
      probabilities = np.asarray(jax.nn.softmax(np.concatenate(logits)))
      found |= {'confidence': digits_checks.confidence(probabilities),
                'class_balance': digits_checks.class_balance(probabilities)}
    # The first call is the full-precision model's: there is nothing to compare
    # it with. Its vectors are as large as a set and are not needed any more.
    if self._teacher is None:
      self._teacher = (images, moments._replace(vectors=None), probabilities)
      return found
    fp_images, fp_moments, fp_probabilities = self._teacher
    found |= {f'{name}_to_fp': value for name, value in
              self._distances(moments, fp_moments).items()}
    found['psnr_to_fp'] = similarity.psnr(images, fp_images)
    if similarity.can_ssim(images.shape):
      found['ssim_to_fp'] = similarity.ssim(images, fp_images)
    if probabilities is not None:
      found['label_agreement'] = digits_checks.label_agreement(
          probabilities, fp_probabilities)
    return found

  def _distances(self, a: collect.Moments,
                 b: collect.Moments | stats_file.Reference
                 ) -> dict[str, float]:
    found = {self.metric: frechet.frechet_distance(a.pool, b.pool)}
    if a.spatial is not None and b.spatial is not None:
      found[self._network.named('fd_spatial')] = frechet.frechet_distance(
          a.spatial, b.spatial)
    return found

  def _set_distances(self, generated: np.ndarray, real: np.ndarray
                     ) -> dict[str, float]:
    """The metrics that need the vectors themselves."""
    name = self._network.named('kd')
    # With few vectors all of them serve, as subsets would be nearly the same.
    if min(len(generated), len(real)) > _SUBSET_SIZE:
      kernel = kernel_distance.subset_distance(
          generated, real, size=_SUBSET_SIZE)
      found = {name: kernel.mean, f'{name}_std': kernel.std}
    else:
      found = {name: kernel_distance.kernel_distance(generated, real)}
    shares = neighbours.precision_recall(generated, real)
    return {**found, self._network.named('precision'): shares.precision,
            self._network.named('recall'): shares.recall}
