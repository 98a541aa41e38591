"""Smoothing alone: a scale for every channel of an input, a power of two.

Channels of a concatenated shortcut have ranges that differ (Q-Diffusion splits
them, DMQ scales them by powers of two): a channel with small values has few
levels of a scale that all share. With x' = x / s and W' = s W the product is
the same, and by a power of two neither is rounded.
"""

import dataclasses

import numpy as np

from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant.around import Around
from msfp_jax.quant.around import FindAround


@dataclasses.dataclass(frozen=True)
class Smoothing(FindAround):
  """Scales of the least error of a layer's output, or none.

  s_c = max |x_c|^alpha / max |W_c|^beta by channel, as SmoothQuant has them
  with beta = 1 - alpha, or with beta = 0; to the nearest power of two.

  Attributes:
    alphas: exponents to try.
  """

  alphas: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
  needs = (fit_lib.ROWS, fit_lib.CHANNEL_MAXIMA)

  def __call__(self, trial):
    found = {}
    for alpha in self.alphas:
      for beta in {0.0, 1 - alpha}:
        logs = exponents(
            trial.seen.channel_maxima, trial.kernel, alpha, beta)
        # A factor that all channels have in common changes nothing but scales.
        logs = np.round(logs - np.median(logs)).astype(np.float32)
        if logs.any():
          found[logs.tobytes()] = Around(smooth=np.exp2(logs))
    return min([Around(), *found.values()], key=trial.error)


def exponents(channel_maxima: np.ndarray, kernel: np.ndarray, alpha: float,
              beta: float) -> np.ndarray:
  """log2(max |x_c|^alpha / max |W_c|^beta) of every channel, float64 `[I]`.

  From -100 to 100: no power of an extreme channel overflows. Channels of zeros
  count as the least of the others: theirs would be infinite, and the least
  keeps a channel that carries nothing from widening its neighbours' range.

  Args:
    channel_maxima: largest magnitudes of the input's channels `[I]`.
    kernel: `[*window, I, O]`.
    alpha: the exponent of the input's.
    beta: that of the weights'.
  """
  weights = np.abs(kernel).max((*range(kernel.ndim - 2), -1))
  return np.clip(alpha * np.log2(_live(channel_maxima))
                 - beta * np.log2(_live(weights)), -100, 100)


def _live(maxima):
  maxima = np.float64(maxima)
  return np.where(maxima > 0, maxima,
                  min(maxima[maxima > 0], default=1.0))
