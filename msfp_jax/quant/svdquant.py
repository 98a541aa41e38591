"""SVDQuant: smoothing by search, a branch of low rank, what is left quantized.

Li et al., "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit
Diffusion Models", ICLR 2025, arXiv 2411.05007, and its code, deepcompressor.
Smoothing moves outliers of the input into the weights, and the largest singular
vectors of these take them on, in 16 bits. What is left has few outliers:

    lambda --> x' = x / lambda ------------------> Q(x')
               W' = lambda W --> A B, of rank R     |
                       |          |                 v
                       +--- minus + --> Q(W' - A B) product, + x' A B
"""

from collections.abc import Iterator
import dataclasses
import itertools
import math

import ml_dtypes
import numpy as np

from msfp_jax.quant import block_formats
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import low_rank
from msfp_jax.quant import numbers
from msfp_jax.quant import smoothing
from msfp_jax.quant.around import Around
from msfp_jax.quant.around import FindAround
from msfp_jax.quant.around import Trial
from msfp_jax.quant.block import Block

# Layers of more bits lose too little to pay for a branch; deepcompressor leaves
# those that we keep at 8 bits in 16.
MOST_BITS = 7
_STEP = 0.05  # of exponents of the smoothing
# Rows by which the smoothing is chosen: what is searched are 39 candidates, and
# with more rows hardly another one wins.
_SEARCH_ROWS = 512
_DTYPES = {'bfloat16': np.dtype(ml_dtypes.bfloat16),
           'float16': np.dtype(np.float16)}


@dataclasses.dataclass(frozen=True)
class SVDQuant(FindAround):
  """Smoothing and branch of the least error of a layer's output.

  Attributes:
    rank: of the branch, R; less where the layer is small, see `rank_of`.
    share: the branch's bits over those of the layer's codes, at most.
    iterations: how often, at most, the branch is found again for what the
      quantizer did to the one before.
    svd: 'randomized', or 'exact', which takes long. The smoothing is always
      searched with the former.
    dtype: of the branch, 'bfloat16' or 'float16'. Neither loses anything, as
      the residual holds what rounding leaves out; the former overflows
      nowhere.
  """

  rank: int = 32
  share: float = 0.5
  iterations: int = 100
  svd: str = 'randomized'
  dtype: str = 'bfloat16'
  needs = (fit_lib.ROWS, fit_lib.CHANNEL_MAXIMA)

  def __post_init__(self):
    for name in ('rank', 'iterations'):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ValueError(f'SVDQuant of {name}={value!r}: must be a whole '
                         'number of 1 or more')
    if not self.share > 0:
      raise ValueError(f'SVDQuant of share={self.share!r}: must be above 0')
    if self.svd not in ('randomized', 'exact'):
      raise ValueError(f"SVDQuant of svd={self.svd!r}: must be 'randomized' "
                       "or 'exact'")
    if self.dtype not in _DTYPES:
      raise ValueError(f'SVDQuant of dtype={self.dtype!r}: must be one of '
                       f'{sorted(_DTYPES)}')

  def __call__(self, trial):
    if trial.bits > MOST_BITS:
      return Around()
    rank = self.rank_of(trial.kernel.shape, trial.bits)
    smoothed = self.search(trial, rank)
    found = [Around(), smoothed]
    if rank:
      found.append(min(
          self.branches(trial, smoothed, rank), key=lambda one: one[0])[1])
    # No branch and no smoothing are options too: not by one's own measure is a
    # layer made worse.
    return min(found, key=trial.error)

  def rank_of(self, shape: tuple[int, ...], bits: int) -> int:
    """R of a layer's branch, 0 for none, so that it costs no more than `share`.

    Weights `[K, O]` have K O codes of `bits` bits, a branch R (K + O) numbers
    of 16. For 4 bits and a square layer that is 8 R / K of the layer: rank 32
    adds 8 % to the 3,072 channels of FLUX.1 and 40 % to the 640 of SDXL, but
    as much again as the layer itself to 256, where it would be no 4-bit layer
    any more.
    """
    inner, outer = math.prod(shape[:-1]), shape[-1]
    layer, vector = bits * inner * outer, 16 * (inner + outer)
    return min(self.rank, inner, outer, int(self.share * layer / vector))

  def search(self, trial: Trial, rank: int) -> Around:
    """The smoothing of least error, with a first branch in the loop."""
    quick = dataclasses.replace(self, svd='randomized')
    rows = trial.seen.rows
    # Evenly, as rows come in the order of the sampler's steps.
    some = np.linspace(0, len(rows) - 1, min(len(rows), _SEARCH_ROWS))
    trial = dataclasses.replace(trial, seen=dataclasses.replace(
        trial.seen, rows=rows[some.astype(int)]))

    def error(around):
      if not rank:
        return trial.error(around)
      return next(quick._each(trial, around, rank))[0]
    return min(map(_smoothed, factors(
        trial.seen.channel_maxima, trial.kernel)), key=error)

  def branches(self, trial: Trial, around: Around, rank: int
               ) -> Iterator[tuple[float, Around]]:
    """Yields the iterations' branches and errors, while these fall."""
    last = math.inf
    for error, found in itertools.islice(
        self._each(trial, around, rank), self.iterations):
      if error >= last:
        return
      yield error, found
      last = error

  def _each(self, trial, around, rank):
    """Yields (error, around) for ever: each for what the last one left."""
    error_of = trial.errors(around)
    moved = np.asarray(around.moved(trial.kernel), np.float32)
    dtype, find = _DTYPES[self.dtype], getattr(low_rank, self.svd)
    target = moved
    while True:
      down, up = (factor.astype(dtype) for factor in find(
          target.reshape(-1, target.shape[-1]), rank))
      # By the factors as they are stored: what their rounding leaves out, the
      # residual has.
      product = np.float32(down) @ np.float32(up)
      error, quantized = error_of(moved - product.reshape(moved.shape))
      yield error, around.replace(
          down=down.reshape(*moved.shape[:-1], rank), up=up)
      # Of W' = A B + R the quantizer makes A B + Q(R); the next branch takes
      # off what would make that exact: W' - Q(R), again as good as its rank
      # lets it.
      target = moved - quantized


def factors(channel_maxima: np.ndarray, kernel: np.ndarray
            ) -> Iterator[np.ndarray | None]:
  """Yields the smoothing factors to try, float32 `[I]`; None for none.

  lambda_c = max |x_c|^alpha / max |W_c|^beta by channel; beta is 0 or
  1 - alpha.

  Args:
    channel_maxima: largest magnitudes of the input's channels `[I]`.
    kernel: `[*window, I, O]`.
  """
  yield None
  for step in range(1, round(1 / _STEP)):
    alpha = step * _STEP
    for beta in (0.0, 1 - alpha):
      yield np.exp2(smoothing.exponents(
          channel_maxima, kernel, alpha, beta)).astype(np.float32)


def _smoothed(smooth):
  return Around(smooth=smooth)


@dataclasses.dataclass(frozen=True)
class IntegersBySign(fit_lib.Fit):
  """Integers with scales from groups; unsigned where nothing is negative.

  Attributes:
    group: neighbours that share a scale.
  """

  group: int = 64
  needs = (fit_lib.EXTREMES,)

  def __call__(self, seen, bits, axis):
    if seen.minimum < 0:
      return fit_lib.Fitted(block_formats.int_group(bits, self.group), None)
    return fit_lib.Fitted(
        Block(numbers.int_format(bits), 'group', self.group, 'bf16',
              zero_point=0.0), None)
