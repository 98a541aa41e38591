"""Inception score: are images of one class each, and of all classes together?

exp of the mean divergence of an image's class distribution from that of its
split; the mean over the splits counts. Source: Salimans et al., NeurIPS 2016,
arXiv 1606.03498. The class distribution is the softmax of Inception's logits
without their bias, as in the original graph, torch-fidelity and ADM.
"""

from typing import NamedTuple

import numpy as np

# What the splits are, by the name of the convention.
SPLITTINGS = {
    'shuffled': '10 splits of a permutation by RandomState(2020)',
    'consecutive': 'consecutive splits of 5000',
}
NUM_SPLITS = 10
_SEED, _SPLIT_SIZE = 2020, 5000


class Score(NamedTuple):
  """An inception score.

  Attributes:
    mean: over the splits; 1 to the number of classes, high is good.
    std: over the splits.
    splitting: the convention, a name in SPLITTINGS.
  """
  mean: float
  std: float
  splitting: str


class InceptionScore:
  """Accumulates the score; memory does not grow with the number of images."""

  def __init__(self, num_samples: int, splitting: str = 'shuffled'):
    """Assigns images to splits.

    Args:
      num_samples: how many images will come.
      splitting: 'shuffled' (torch-fidelity) or 'consecutive' (ADM).

    Raises:
      ValueError: another splitting, or fewer images than splits.
    """
    if splitting not in SPLITTINGS:
      raise ValueError(f'inception score: splitting {splitting!r}, must be one '
                       f'of {", ".join(map(repr, SPLITTINGS))}')
    least = NUM_SPLITS if splitting == 'shuffled' else 1
    if num_samples < least:
      raise ValueError(f'inception score: {num_samples} images, needs at least '
                       f'{least}')
    self._splitting, self._seen = splitting, 0
    self._split = _assign(num_samples, splitting)
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
    log_q = np.log(q, out=np.zeros_like(q), where=q > 0)
    scores = np.exp(self._entropies / self._counts - (q * log_q).sum(axis=1))
    return Score(float(scores.mean()), float(scores.std()), self._splitting)


def inception_score(logits: np.ndarray, splitting: str = 'shuffled') -> Score:
  """The score of images whose logits `[N, K]` are all in memory."""
  score = InceptionScore(len(logits), splitting)
  score.update(logits)
  return score.result()


def _assign(count: int, splitting: str) -> np.ndarray:
  """Assigns every image to a split, int64 `[N]`."""
  if splitting == 'consecutive':
    return np.arange(count) // _SPLIT_SIZE
  ends = np.arange(NUM_SPLITS + 1) * count // NUM_SPLITS
  split = np.empty(count, np.int64)
  split[np.random.RandomState(_SEED).permutation(count)] = np.repeat(
      np.arange(NUM_SPLITS), np.diff(ends))
  return split
