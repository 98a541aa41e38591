"""Checks feature vectors before anything is computed from them."""

import numpy as np


def checked(features: np.ndarray) -> np.ndarray:
  """Returns the vectors as float64.

  Args:
    features: `[N, D]`, any real dtype.

  Raises:
    ValueError: another shape, NaN or infinity.
  """
  x = np.asarray(features, np.float64)
  if x.ndim != 2 or not x.shape[1]:
    raise ValueError(f'features must be [N, D], got shape {x.shape}; reshape '
                     'them to one vector a sample')
  bad = int((~np.isfinite(x)).any(axis=1).sum())
  if bad:
    raise ValueError(
        f'{bad} of {len(x)} feature vectors hold NaN or infinity; the images '
        'or the feature network are broken, check the samples')
  return x


def checked_pair(name: str, a: np.ndarray, b: np.ndarray, least: int
                 ) -> tuple[np.ndarray, np.ndarray]:
  """Returns two sets of vectors to compare, as float64.

  Args:
    name: of the metric, for messages.
    a, b: `[N, D]` and `[M, D]`.
    least: N and M must be at least this.

  Raises:
    ValueError: too few vectors, different D, all vectors of a set alike, or
      not such vectors.
  """
  a, b = checked(a), checked(b)
  if a.shape[1] != b.shape[1]:
    raise ValueError(f'{name}: features of {a.shape[1]} and {b.shape[1]} '
                     'dimensions; both sides must come from one network')
  if min(len(a), len(b)) < least:
    raise ValueError(f'{name}: needs at least {least} samples on each side, '
                     f'got {len(a)} and {len(b)}')
  for side, x in (('first', a), ('second', b)):
    # Distances between such sets are defined, and mean nothing: a model that
    # makes one image for any noise is broken.
    if (x == x[0]).all():
      raise ValueError(f'{name}: all samples of the {side} set have the same '
                       'features; check that its images differ')
  return a, b
