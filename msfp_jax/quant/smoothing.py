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

_LEAST, _MOST = -24, 24  # exponents: no product leaves float32


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
    kernel = trial.kernel
    weights = np.abs(kernel).max((*range(kernel.ndim - 2), -1))
    found = {exponents.tobytes(): Around(smooth=np.exp2(exponents))
             for alpha in self.alphas for beta in {0.0, 1 - alpha}
             if (exponents := _exponents(
                 trial.seen.channel_maxima, weights, alpha, beta)).any()}
    return min([Around(), *found.values()], key=trial.error)


def _exponents(inputs, weights, alpha, beta):
  """log2 of the scales `[I]`, whole numbers in float32, 0 in the middle."""
  # Channels of zeros, in which nothing is to be smoothed, go with the others.
  logs = lambda maxima: np.log2(np.where(
      maxima > 0, maxima, np.median(maxima[maxima > 0]) if maxima.any() else 1))
  exponents = alpha * logs(inputs) - beta * logs(weights)
  # A factor that all channels have in common changes nothing but the scales.
  return np.clip(np.round(exponents - np.median(exponents)), _LEAST, _MOST
                 ).astype(np.float32)
