"""Frechet distance between Gaussians, from features that arrive in batches.

    d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^{1/2})

which is FID when the features are Inception's pool3 (Heusel et al., 2017).
All of it is float64 NumPy on the host: JAX's float64 is off by default and
slow on a TPU, and a float32 covariance of 2048 features loses the digits that
the trace term needs.
"""

from typing import NamedTuple
import warnings

import numpy as np

from msfp_jax.metrics import vectors


class FewSamplesWarning(UserWarning):
  """There are too few samples for the covariance to have full rank."""


class Gaussian(NamedTuple):
  """A mean and a covariance, as read from a statistics file.

  Attributes:
    mean: float64 `[D]`.
    cov: float64 `[D, D]`, unbiased.
    num_samples: how many samples they were estimated from; None if the file
      does not tell (those of pytorch-fid, clean-fid, EDM and ADM do not).
  """
  mean: np.ndarray
  cov: np.ndarray
  num_samples: int | None


class GaussianStats:
  """Accumulates the mean and covariance of feature vectors.

  Only sums are kept, so memory does not grow with the number of samples. The
  sums are of differences to the first batch's mean: where the mean is large
  beside the spread, sums of the raw values would cancel.
  """

  def __init__(self):
    self.num_samples = 0
    self._shift = self._sum = self._outer = None

  def update(self, features: np.ndarray) -> None:
    """Adds a batch; one that is refused leaves the statistics as they were.

    Args:
      features: `[N, D]`, any real dtype; N may differ from call to call.

    Raises:
      ValueError: not `[N, D]`, another D than before, NaN or infinity.
    """
    # Checked in full before anything is added: a batch counts wholly or not at
    # all.
    x = vectors.checked(features)
    if not len(x):
      return
    # Any shift gives the same mean and covariance; one near the mean loses the
    # fewest digits.
    if self._shift is None:
      self._shift = x.mean(axis=0)
      self._sum = np.zeros_like(self._shift)
      self._outer = np.zeros((x.shape[1],) * 2)
    self._check_dim(x.shape[1])
    x = x - self._shift
    self.num_samples += len(x)
    self._sum += x.sum(axis=0)
    self._outer += x.T @ x

  @property
  def mean(self) -> np.ndarray:
    """The mean, float64 `[D]`; ValueError before the first sample."""
    self._need(1)
    return self._shift + self._sum / self.num_samples

  @property
  def cov(self) -> np.ndarray:
    """The unbiased covariance, float64 `[D, D]`; ValueError below 2 samples."""
    self._need(2)
    n = self.num_samples
    # sum (x - s)(x - s)^T less n (m - s)(m - s)^T, for the shift s.
    return (self._outer - np.outer(self._sum, self._sum) / n) / (n - 1)

  def _need(self, count: int) -> None:
    if self.num_samples < count:
      raise ValueError(f'Gaussian statistics of {self.num_samples} samples: '
                       f'at least {count} needed; update() adds them')

  def _check_dim(self, dim: int) -> None:
    if dim != len(self._shift):
      raise ValueError(
          f'features have {dim} dimensions, the ones before had '
          f'{len(self._shift)}: use one feature network throughout')


Stats = Gaussian | GaussianStats


def frechet_distance(a: Stats, b: Stats) -> float:
  """The squared Frechet distance d^2, which is what FID reports; >= 0.

  The trace term uses two symmetric eigendecompositions: with R = S1^{1/2},
  S1 S2 has the eigenvalues of the symmetric R S2 R. It is faster than
  `scipy.linalg.sqrtm` and needs no fallback for a singular covariance.

  Args:
    a, b: statistics with the same number of dimensions; order is immaterial.

  Raises:
    ValueError: fewer than 2 samples, different dimensions, or all samples of
      one side alike.

  Warns:
    FewSamplesWarning: no more samples than dimensions on one side.
  """
  mean_a, cov_a = a.mean, a.cov
  mean_b, cov_b = b.mean, b.cov
  if mean_a.shape != mean_b.shape:
    raise ValueError(
        f'Frechet distance between {len(mean_a)} and {len(mean_b)} dimensions: '
        'both sides must come from one feature network')
  for name, stats, mean, cov in (('first', a, mean_a, cov_a),
                                 ('second', b, mean_b, cov_b)):
    # Rounding of float32 features leaves about 1e-14 of the mean's square.
    if np.trace(cov) <= 1e-12 * (mean @ mean):
      raise ValueError(
          f'all samples of the {name} set have the same features: it has no '
          'covariance; check that its images differ')
    n = stats.num_samples
    if n is not None and n <= len(mean):
      warnings.warn(
          f'the {name} set has {n} samples for {len(mean)} dimensions: its '
          'covariance is singular and the distance is biased upwards; compare '
          'it only with distances from as many samples',
          FewSamplesWarning, stacklevel=2)
  # tr (S1 S2)^{1/2} is the sum of the roots of the eigenvalues of S1 S2, which
  # are those of R S2 R. Rounding may leave some of the smallest below 0.
  values, vectors = np.linalg.eigh(cov_a)
  root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
  values = np.linalg.eigvalsh(root @ cov_b @ root)
  trace = np.sqrt(np.clip(values, 0, None)).sum()
  difference = mean_a - mean_b
  distance = (
      difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * trace)
  # Equal sets may come out slightly below 0.
  return max(float(distance), 0.0)
