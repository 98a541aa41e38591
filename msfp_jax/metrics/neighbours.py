"""Precision and recall of generated images by nearest neighbours.

A set's manifold is the union of balls around its vectors, each reaching to the
k-th nearest neighbour. Precision is the share of generated vectors on the
data's manifold, recall that of the data's on the generated one's. Source:
Kynkaanniemi et al., NeurIPS 2019, arXiv 1904.06991; k = 3 as there and in ADM.
"""

from typing import NamedTuple

import numpy as np

from msfp_jax.metrics import vectors

K = 3
_BLOCK = 2048  # rows of a distance matrix, and its columns, held at once


class PrecisionRecall(NamedTuple):
  """Precision and recall, 0 to 1; high is good."""
  precision: float
  recall: float


def precision_recall(generated: np.ndarray, real: np.ndarray, k: int = K
                     ) -> PrecisionRecall:
  """Compares two sets of feature vectors; memory is that of the vectors.

  Both numbers depend on how many vectors there are: compare at equal counts
  (ADM takes 10,000 of the data).

  Args:
    generated: `[N, D]`.
    real: `[M, D]`.
    k: which neighbour a ball reaches to, at least 1.

  Raises:
    ValueError: no more than k vectors in a set, or sets without a manifold,
      see `vectors.checked_pair`.
  """
  if k < 1:
    raise ValueError(f'precision_recall: k={k}, must be at least 1')
  generated, real = vectors.checked_pair(
      'precision_recall', generated, real, k + 1)
  reach_generated, reach_real = _reach(generated, k), _reach(real, k)
  precise = np.zeros(len(generated), bool)
  recalled = np.zeros(len(real), bool)
  #                   real, a block of columns
  #   generated,    +-------------+   any in a row: that image lies in some
  #   a block of    | distances   |   real ball; any in a column: that real
  #   rows          +-------------+   image lies in some generated ball
  #
  # One matrix of distances serves both; only a block of it is ever held.
  for rows in _blocks(len(generated)):
    for columns in _blocks(len(real)):
      distances = _distances(generated[rows], real[columns])
      precise[rows] |= (distances <= reach_real[columns]).any(axis=1)
      recalled[columns] |= (
          distances <= reach_generated[rows, None]).any(axis=0)
  return PrecisionRecall(float(precise.mean()), float(recalled.mean()))


def _reach(x: np.ndarray, k: int) -> np.ndarray:
  """The squared distance `[N]` to the k-th nearest other vector."""
  reach = np.empty(len(x))
  for rows in _blocks(len(x)):
    nearest = np.empty((rows.stop - rows.start, 0))
    for columns in _blocks(len(x)):
      distances = _distances(x[rows], x[columns])
      if rows == columns:
        np.fill_diagonal(distances, np.inf)  # not its own neighbour
      nearest = np.concatenate([nearest, distances], axis=1)
      # The k nearest of what was seen are all that the rest may still change.
      if nearest.shape[1] > k:
        nearest = np.partition(nearest, k - 1, axis=1)[:, :k]
    reach[rows] = nearest.max(axis=1)
  return reach


def _blocks(count: int) -> list[slice]:
  return [slice(i, min(i + _BLOCK, count)) for i in range(0, count, _BLOCK)]


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """The squared distances of all pairs, `[N, M]`."""
  # |a|^2 + |b|^2 - 2 a b, most of it one matrix product; for vectors that are
  # nearly equal, rounding may leave it below 0.
  square = lambda x: np.einsum('nd,nd->n', x, x)
  found = square(a)[:, None] + square(b) - 2 * (a @ b.T)
  return np.maximum(found, 0)
