"""Inception score: are images of one class each, and of all classes together?

exp of the mean divergence of an image's class distribution from that of its
split; the mean over the splits counts. Source: Salimans et al., NeurIPS 2016,
arXiv 1606.03498. The class distribution is the softmax of Inception's logits
without their bias, as in the original graph, torch-fidelity and ADM.
"""

from typing import NamedTuple

import numpy as np

# torch-fidelity's splits: 10 of a permutation by RandomState(2020). Others
# give other scores, so that results name them.
SPLITTING = 'shuffled'
NUM_SPLITS = 10
_SEED = 2020


class Score(NamedTuple):
  """An inception score.

  Attributes:
    mean: over the splits; 1 to the number of classes, high is good.
    std: over the splits.
  """
  mean: float
  std: float


class InceptionScore:
  """Accumulates the score; memory does not grow with the number of images."""

  def __init__(self, num_samples: int):
    """Assigns images to splits.

    Args:
      num_samples: how many images will come.

    Raises:
      ValueError: fewer images than splits.
    """
    if num_samples < NUM_SPLITS:
      raise ValueError(f'inception score: {num_samples} images, needs at least '
                       f'{NUM_SPLITS}')
    self._seen = 0
    self._split = _assign(num_samples)
    self._counts = np.bincount(self._split)
    self._entropies = np.zeros(len(self._counts))
    self._sums = None

  def update(self, logits: np.ndarray) -> None:
    """Adds the next images.

    Args:
      logits: without bias, `[N, K]`.

    Raises:
      ValueError: another shape, NaN, or more images than announced.
    """
    x = np.asarray(logits, np.float64)
    if x.ndim != 2 or x.shape[1] < 2:
      raise ValueError(f'inception score: logits must be [N, K], got {x.shape}')
    if bad := int((~np.isfinite(x)).any(axis=1).sum()):
      raise ValueError(f'inception score: the logits of {bad} of {len(x)} '
                       'images hold NaN or infinity; check the samples')
    if self._seen + len(x) > len(self._split):
      raise ValueError(f'inception score: {self._seen + len(x)} images, '
                       f'{len(self._split)} were announced')
    split = self._split[self._seen:self._seen + len(x)]
    self._seen += len(x)
    # The mean divergence of p from the mean q is the mean of sum p log p, less
    # sum q log q: sums of both, by split, are all that is kept.
    log_p = x - x.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    if self._sums is None:
      self._sums = np.zeros((len(self._counts), x.shape[1]))
    for i in np.unique(split):
      self._sums[i] += p[split == i].sum(axis=0)
      self._entropies[i] += (p * log_p)[split == i].sum()

  def result(self) -> Score:
    """The score of all images; ValueError while some are missing."""
    if self._seen != len(self._split):
      raise ValueError(f'inception score: {self._seen} of {len(self._split)} '
                       'images have come')
    q = self._sums / self._counts[:, None]
    # A class that no image shows adds 0, the limit of q log q.
    log_q = np.log(q, out=np.zeros_like(q), where=q > 0)
    scores = np.exp(self._entropies / self._counts - (q * log_q).sum(axis=1))
    return Score(float(scores.mean()), float(scores.std()))


def _assign(count: int) -> np.ndarray:
  """Assigns every image to a split, int64 `[N]`."""
  ends = np.arange(NUM_SPLITS + 1) * count // NUM_SPLITS
  split = np.empty(count, np.int64)
  # The permutation is torch-fidelity's: place i of the shuffled set is image
  # permutation[i], and splits are consecutive places.
  split[np.random.RandomState(_SEED).permutation(count)] = np.repeat(
      np.arange(NUM_SPLITS), np.diff(ends))
  return split
