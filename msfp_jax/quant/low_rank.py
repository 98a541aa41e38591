"""Low rank: the nearest matrix of few singular vectors, exactly or quickly."""

from collections.abc import Callable

import numpy as np

# [K, O], rank -> factors [K, R] and [R, O], in full precision.
TruncatedSVD = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
# Of `randomized`: more vectors than asked for, and passes over the matrix that
# separate large singular values from small ones.
_MORE, _PASSES = 16, 2


def exact(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
  """The nearest matrix of a rank, by the whole SVD in float64.

  Args:
    matrix: `[K, O]`.
    rank: R, from 1 to min(K, O).

  Returns:
    `[K, R]` and `[R, O]`, float64; their product is the nearest in the sum of
    squares (Eckart and Young). Singular values are divided between them evenly,
    so that both have numbers of like size, as 16-bit types want them.
  """
  return _factors(*np.linalg.svd(np.float64(matrix), full_matrices=False), rank)


def randomized(matrix: np.ndarray, rank: int, seed: int = 0
               ) -> tuple[np.ndarray, np.ndarray]:
  """Almost the nearest one, from random combinations of columns, in float32.

  The range finder of Halko, Martinsson and Tropp, SIAM Review 2011, algorithm
  4.4: of a matrix of weights it takes a fiftieth of the time of `exact`.

  Args:
    matrix: `[K, O]`.
    rank: R, from 1 to min(K, O).
    seed: of the combinations; the same seed gives the same factors.
  """
  matrix = np.asarray(matrix, np.float32)
  number = min(rank + _MORE, *matrix.shape)
  start = np.random.default_rng(seed).standard_normal(
      (matrix.shape[1], number), np.float32)
  # Columns that span nearly what the largest singular vectors do. Orthogonal
  # again after every product: otherwise all would turn to the largest one.
  basis = np.linalg.qr(matrix @ start)[0]
  for _ in range(_PASSES):
    basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
  u, s, v = np.linalg.svd(basis.T @ matrix, full_matrices=False)
  return _factors(basis @ u, s, v, rank)


def _factors(u, s, v, rank):
  root = np.sqrt(s[:rank])
  return u[:, :rank] * root, root[:, None] * v[:rank]
