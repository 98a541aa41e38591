"""Fits: from what was seen of a tensor to its quantizer.

A fit says what it needs to see (`needs`), and calibration gathers that and no
more; one that needs nothing asks for no run of the model.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.quant import numbers
from msfp_jax.quant import quantizers
from msfp_jax.quant import search
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import FULL_BITS
from msfp_jax.quant.quantizers import Quantizer

# What it costs to gather, beside a run of the sampler: extremes and values next
# to nothing, rows whole vectors, a Gram matrix K x K numbers a layer, which for
# a 3x3 convolution of 512 channels are 21 million.
#
# What calibration can gather of a layer's input; `Seen` has a field of each.
EXTREMES = 'extremes'  # minimum and maximum
VALUES = 'values'
ROWS = 'rows'
CHANNEL_MAXIMA = 'channel_maxima'
GRAM = 'gram'
# Not one more thing to gather, but of what: not of the inputs but of what they
# differ by from the step before. (Gram matrices are the inputs' all the same,
# as these are what weights are multiplied with in the end.)
DIFFERENCES = 'differences'
# Values once more: those of every step of the sampler apart; and more of steps
# whose denoising factor is large.
BY_STEP = 'by_step'
WEIGHTED = 'weighted'
NEEDS = (EXTREMES, VALUES, ROWS, CHANNEL_MAXIMA, GRAM, DIFFERENCES, BY_STEP,
         WEIGHTED)


@dataclasses.dataclass(frozen=True)
class Seen:
  """Observations of a tensor that fits work from; None where nobody asked.

  Attributes:
    values: a random sample of an input's values, float32 `[N]`, equally many
      of every step; of weights all of them, `[*window, I, O]`.
    minimum: over all values, not only the sampled.
    maximum: likewise.
    rows: a random sample of the input's vectors along its channels, `[N, I]`.
    channel_maxima: largest magnitude of every channel, `[I]`.
    gram: mean of the outer products of what a layer multiplies with its
      weights, float64 `[K, K]`, K = window x I: X^T X / N.
    dtype: in which the model computed the input.
    differences: whether all but `gram` is of differences between steps.
    by_step: `values` of an input, those of every step in a row, `[S, N / S]`.
    weighted: of `values`, of every step as large a share as the square of its
      denoising factor is of the largest one's, `[M]`.
  """

  values: np.ndarray | None = None
  minimum: float | None = None
  maximum: float | None = None
  rows: np.ndarray | None = None
  channel_maxima: np.ndarray | None = None
  gram: np.ndarray | None = None
  dtype: Any = np.dtype(np.float32)
  differences: bool = False
  by_step: np.ndarray | None = None
  weighted: np.ndarray | None = None

  @classmethod
  def of_weights(cls, kernel: np.ndarray) -> 'Seen':
    """Weights, which are there as a whole."""
    return cls(kernel, float(kernel.min()), float(kernel.max()))


class Fitted(NamedTuple):
  """A quantizer, and what is known of its error.

  Attributes:
    quantizer: the one that was found.
    mse: its mean squared error on what was seen; None if not known.
    tried: {candidates: the least error among them}, where there was a search.
  """

  quantizer: Quantizer
  mse: float | None
  tried: Mapping['Candidates', float] = MappingProxyType({})


class Fit:
  """Finds a quantizer; subclasses define `__call__`, and `needs` if any.

  One whose quantizers have a scale from calibration is `static`.
  """

  needs: Collection[str] = ()
  static: bool = False

  def __call__(self, seen: Seen, bits: int, axis: int) -> Fitted:
    """The quantizer of a tensor.

    Args:
      seen: at least what `needs` names.
      bits: of an element, 3 to 8.
      axis: of the contraction: -1 of inputs, -2 of weights.
    """
    raise NotImplementedError

  def quantizer(self, seen: Seen, bits: int, axis: int) -> Quantizer:
    """Likewise without its error, where that would be work of its own."""
    return self(seen, bits, axis).quantizer


@dataclasses.dataclass(frozen=True)
class Candidates:
  """Static quantizers to search: formats, and zero points or none.

  Attributes:
    signed: whether the formats have a sign bit.
    zero_points: None, 'silu' or 'range' (see `search.search`).
    integer: only the uniform grid.
  """

  signed: bool
  zero_points: str | None = None
  integer: bool = False

  def search(self, x: np.ndarray, bits: int,
             channel_axis: int | None = None) -> search.SearchResult:
    """The best of these for a tensor; see `search.search`."""
    formats = numbers.formats_of_width(bits, self.signed)
    if self.integer:
      formats = (numbers.int_format(bits),)
    zero_points = self.zero_points
    if zero_points == 'silu':
      zero_points = search.SILU_ZERO_POINTS
    return search.search(x, formats, channel_axis=channel_axis,
                         zero_points=zero_points)


SIGNED = Candidates(signed=True)
UNSIGNED = Candidates(signed=False, zero_points='silu')
UNSIGNED_RANGE = Candidates(signed=False, zero_points='range')
INTEGER = Candidates(signed=False, zero_points='range', integer=True)


@dataclasses.dataclass(frozen=True)
class Searched(Fit):
  """The static quantizer of least mean squared error.

  One scale for an input, and one for every output channel of weights.
  """

  candidates: tuple[Candidates, ...]
  needs = (VALUES,)
  static = True

  def __call__(self, seen, bits, axis):
    # An input's channels cannot have a scale each: it would not leave the sum
    # over them. (Smoothing does that, see `around`.) A weight's outputs can.
    values, channel_axis, rank = self._searched(seen, axis)
    found = {c: c.search(values, bits, channel_axis) for c in self.candidates}
    best = min(found.values(), key=lambda result: result.mse)
    return Fitted(best.quantizer(rank), best.mse,
                  {c: result.mse for c, result in found.items()})

  def _searched(self, seen, axis):
    """Values, the axis of those with a scale each, and axes of the scales."""
    if axis == -2:
      return seen.values, -1, seen.values.ndim
    return seen.values, None, 0


@dataclasses.dataclass(frozen=True)
class SearchedWeighted(Searched):
  """The same, where an error counts as much as the step makes of it.

  An error of the model's output moves the sample by the sampler's denoising
  factor times as much (DFA, arXiv 2505.21591): what layers get at steps of
  large factors is to be quantized better.
  """

  needs = (VALUES, WEIGHTED)

  def _searched(self, seen, axis):
    if axis == -1:
      return seen.weighted, None, 0
    return super()._searched(seen, axis)


@dataclasses.dataclass(frozen=True)
class SearchedByStep(Searched):
  """Of an input, with a scale and a zero point for every step of the sampler.

  Steps share the format: products are compiled for one. It is the one of least
  error over all steps, each with the best scale that it can have in it.
  (EfficientDM, ICLR 2024, and others have ranges by step, of integers.)
  """

  needs = (VALUES, BY_STEP)

  def __call__(self, seen, bits, axis):
    if axis != -1:
      raise ValueError('a quantizer by step is for inputs: weights are the '
                       'same at every step')
    found = super().__call__(seen, bits, axis)
    return found._replace(quantizer=found.quantizer.replace(by_step=True))

  def _searched(self, seen, axis):
    # To a search steps are what channels are: rows with a scale each.
    return seen.by_step, 0, 1


@dataclasses.dataclass(frozen=True)
class Dynamic(Fit):
  """A quantizer that follows the data: nothing to find, nothing to see.

  Attributes:
    make: bits -> the quantizer.
  """

  make: Callable[[int], Quantizer]

  def quantizer(self, seen, bits, axis):
    return self.make(bits)

  def __call__(self, seen, bits, axis):
    quantizer, mse = self.make(bits), None
    # Of an input only single values were seen, out of their groups: no error of
    # a block of neighbours follows from these.
    if axis == -2 and seen.values is not None and not quantizer.is_full:
      mse = error_of(quantizer, seen.values, axis)
    return Fitted(quantizer, mse)


@dataclasses.dataclass(frozen=True)
class BestOf(Fit):
  """Of quantizers that follow the data that of least mean squared error.

  Attributes:
    make: (bits, what was seen) -> the quantizers to try.
  """

  make: Callable[[int, Seen], Sequence[Quantizer]]
  needs = (ROWS,)

  def __call__(self, seen, bits, axis):
    # Rows stand for one image, so that a scale of an image is that of a whole
    # sample, as long as a row is a token of it.
    x = seen.values if axis == -2 else seen.rows[None]
    found = [Fitted(quantizer, error_of(quantizer, x, axis))
             for quantizer in self.make(bits, seen)]
    return min(found, key=lambda fitted: fitted.mse)


def error_of(quantizer: Quantizer, x: np.ndarray, axis: int) -> float:
  """Mean squared error of a quantized tensor, in float64."""
  # In NumPy: squares and sums in float32 would be good for 7 digits, and an
  # error is compared with others that differ little.
  back = jax.device_get(restored(quantizer, x, axis))
  return float(np.mean((np.float64(back) - np.float64(x))**2))


def restored(quantizer: Quantizer, x: jax.Array, axis: int) -> jax.Array:
  """dequantize(quantize(x)); no gradient."""
  return _dequantize(quantizers.quantize(quantizer, x, axis))


_dequantize = jax.jit(lambda tensor: tensor.dequantize())


def fit(of: Fit, seen: Seen, bits: int, axis: int, measured: bool = True
        ) -> Fitted:
  """The quantizer of a tensor; `Full` at 32 bits.

  Args:
    of: what finds it.
    seen: of the tensor.
    bits: of an element.
    axis: of the contraction.
    measured: whether its error is wanted where that is work of its own.

  Raises:
    ValueError: what the fit needs to see is not there; it found a quantizer
      that no tensor can have.
  """
  if bits == FULL_BITS:
    return Fitted(Full(), 0.0)
  absent = sorted(
      need for need in of.needs
      if getattr(seen, 'minimum' if need == EXTREMES else need) is None)
  # Of weights only the values are there to see.
  if absent and axis == -1:
    raise ValueError(
        f'{type(of).__name__} needs to see {absent} of the input, which was '
        f'not gathered, or is not known of it as smoothed and rotated: with '
        f'{ROWS!r} among the needs of `around` it is')
  found = (of(seen, bits, axis) if measured else
           Fitted(of.quantizer(seen, bits, axis), None))
  quantizer = as_arrays(found.quantizer)
  if flaws := quantizers.flaws_of(quantizer):
    raise ValueError(f'{type(of).__name__} found a quantizer with '
                     + ', '.join(flaws))
  return found._replace(quantizer=quantizer)


def as_arrays(tree: Any) -> Any:
  """A pytree whose leaves are arrays of JAX's types, as files hold them.

  Fits compute in NumPy: their scales may be Python numbers, or float64.
  """
  return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), tree)
