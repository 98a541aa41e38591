"""Do images show the classes they are to show, and all of them?

All take the class probabilities `[N, K]` of a classifier whose classes these
are, as `collect.Seen.probabilities` holds them.
"""

import numpy as np


def _checked(name: str, probabilities: np.ndarray) -> np.ndarray:
  # Logits have the same shape and give a number too, a wrong one.
  p = np.asarray(probabilities, np.float64)
  if p.ndim != 2 or not p.shape[0] or p.shape[1] < 2:
    raise ValueError(f'{name}: probabilities must be [N, K] with N > 0 and '
                     f'K > 1, got {list(p.shape)}')
  wrong = int((~(np.abs(p.sum(axis=1) - 1) < 1e-3) | (p < 0).any(axis=1)).sum())
  if wrong:
    raise ValueError(f'{name}: {wrong} of {len(p)} rows are no probabilities; '
                     'pass a softmax, not logits')
  return p


def confidence(probabilities: np.ndarray) -> float:
  """The mean of the largest class probability: 1 / K to 1, high is good.

  Raises:
    ValueError: not probabilities `[N, K]`.
  """
  return float(_checked('confidence', probabilities).max(axis=1).mean())


def label_agreement(a: np.ndarray, b: np.ndarray) -> float:
  """The share of images whose predicted class is the same in both sets.

  Args:
    a, b: probabilities `[N, K]` of images made from the same noise, say by
      the quantized and by the full-precision model.

  Raises:
    ValueError: not probabilities, or of different shapes.
  """
  a, b = _checked('label_agreement', a), _checked('label_agreement', b)
  if a.shape != b.shape:
    raise ValueError(f'label_agreement: got {list(a.shape)} and '
                     f'{list(b.shape)}; both sets must come from the same '
                     'noise and network')
  return float(np.mean(a.argmax(axis=1) == b.argmax(axis=1)))


def class_balance(probabilities: np.ndarray) -> float:
  """Entropy of the mean predicted distribution over log K: 0 to 1.

  1 when all classes are equally frequent, 0 when only one is left.

  Raises:
    ValueError: not probabilities `[N, K]`.
  """
  p = _checked('class_balance', probabilities).mean(axis=0)
  # A class that never occurs adds 0, the limit of p log p.
  present = p[p > 0]
  entropy = -(present * np.log(present)).sum()
  return float(np.clip(entropy / np.log(len(p)), 0.0, 1.0))
