"""Kernel distance: KID, when the features are Inception's.

The squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, by its
unbiased estimator, which may be slightly negative. Unlike the Frechet distance
its expectation does not depend on the number of samples. Source: Binkowski et
al., ICLR 2018, arXiv 1801.01401.
"""

from typing import NamedTuple

import numpy as np

from msfp_jax.metrics import vectors

SUBSET_SIZE = 1000  # vectors in a subset, as everyone takes for KID
_BLOCK = 2048  # rows of a kernel matrix held at once
_SEED = 2020  # torch-fidelity's


class Distance(NamedTuple):
  """A kernel distance.

  Attributes:
    mean: over the subsets, or of all vectors.
    std: over the subsets; None where there were none.
  """
  mean: float
  std: float | None


def distance(a: np.ndarray, b: np.ndarray) -> Distance:
  """Estimates the distance on subsets of SUBSET_SIZE vectors, or on all.

  With few vectors all of them serve, as subsets would be nearly the same.

  Raises:
    ValueError: as `of_all`.
  """
  if min(len(a), len(b)) > SUBSET_SIZE:
    return of_subsets(a, b, size=SUBSET_SIZE)
  return Distance(of_all(a, b), None)


def of_all(a: np.ndarray, b: np.ndarray) -> float:
  """Estimates the distance from all vectors, in blocks of the kernel matrix.

  Args:
    a, b: feature vectors `[N, D]` and `[M, D]`.

  Raises:
    ValueError: fewer than 2 vectors on a side, see `vectors.checked_pair`.
  """
  return _distance(*vectors.checked_pair('kernel distance', a, b, 2))


def of_subsets(a: np.ndarray, b: np.ndarray, subsets: int = 100,
               size: int = SUBSET_SIZE) -> Distance:
  """Estimates the distance on random subsets, as torch-fidelity draws them.

  Args:
    a, b: feature vectors `[N, D]` and `[M, D]`.
    subsets: how many pairs of subsets.
    size: vectors in a subset, at least 2 and at most N and M.

  Raises:
    ValueError: fewer vectors than `size`; pass a smaller one and say so.
  """
  if subsets < 1 or size < 2:
    raise ValueError(f'kernel distance: subsets={subsets} must be at least 1, '
                     f'size={size} at least 2')
  a, b = vectors.checked_pair('kernel distance', a, b, size)
  rng = np.random.RandomState(_SEED)
  found = []
  for _ in range(subsets):
    # The order of these draws is torch-fidelity's; another gives other subsets.
    rows = [rng.choice(len(x), size, replace=False) for x in (a, b)]
    found.append(_distance(a[rows[0]], b[rows[1]]))
  return Distance(float(np.mean(found)), float(np.std(found)))


def _distance(a: np.ndarray, b: np.ndarray) -> float:
  # E k(a, a') + E k(b, b') - 2 E k(a, b), over different a, a' and b, b'.
  return float(_mean_of_others(a) + _mean_of_others(b)
               - 2 * _kernel_sum(a, b) / (len(a) * len(b)))


def _mean_of_others(x: np.ndarray) -> float:
  """The mean kernel value of two different vectors of a set."""
  # The diagonal is left out: with it, the estimate would be biased upwards.
  itself = ((np.einsum('nd,nd->n', x, x) / x.shape[1] + 1) ** 3).sum()
  return (_kernel_sum(x, x) - itself) / (len(x) * (len(x) - 1))


def _kernel_sum(a: np.ndarray, b: np.ndarray) -> float:
  return sum(
      float(((a[i:i + _BLOCK] @ b[j:j + _BLOCK].T / a.shape[1] + 1) ** 3).sum())
      for i in range(0, len(a), _BLOCK) for j in range(0, len(b), _BLOCK))
