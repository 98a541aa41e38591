"""GPTQ: weights rounded so that the layer's output errs least, not they.

Rounding to nearest makes the error dW of the weights small. What counts is that
of the output, whose mean square over inputs with the Gram matrix G = X^T X / N
is

    tr(dW^T G dW)

GPTQ (Frantar et al., arXiv 2210.17323) rounds one input's weights after
another, and lets those that are still free make up for the error made so far.
Scales and zero points stay as the quantizer has them; only levels differ.
"""

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.quant import functional
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qtensor import QTensor
from msfp_jax.quant.quantizers import Quantizer

# The paper writes its algorithm with the Cholesky factor of G^-1. Here it is
# with that of G itself, which needs no inverse and gives the same levels (Chen
# et al., arXiv 2507.18553: GPTQ is Babai's nearest plane). With G = R R^T, R
# upper triangular, and e = w - q of one output,
#
#   e^T G e = |R^T e|^2 = sum_i (R_ii e_i + sum_{j<i} R_ji e_j)^2
#
# so that, q_0 to q_{i-1} being chosen, the i-th term is least for
#
#   q_i = nearest(w_i + (sum_{j<i} R_ji e_j) / R_ii)
#
# R_ii^2 is what of input i does not follow from those that come after it: the
# last ones can make up for the first.
#
# Added to the diagonal, as a share of its mean, as in the paper: inputs that
# calibration hardly saw would take up any error, with weights of any size.
DAMPING = 0.01
# Rows of which the sums are kept up to date one by one; those below get theirs
# as one matrix product a block.
_BLOCK = 128


def round_weights(kernel: np.ndarray, quantizer: Quantizer, gram: np.ndarray,
                  damping: float = DAMPING) -> QTensor:
  """Weights at the quantizer's own scales, at levels that GPTQ chooses.

  No output's error e^T G e exceeds that of rounding to nearest: an output for
  which GPTQ finds nothing better keeps its nearest levels.

  Args:
    kernel: `[*window, I / groups, O]`, as the product sees it.
    quantizer: of weights; scales, zero points and shifts are those of its
      `quantize`.
    gram: float64 `[K, K]`, K = window x I, in the order of the kernel's rows.
      Of a grouped convolution it has the inputs of all groups.
    damping: added to the Gram matrix's diagonal, as a share of its mean.

  Returns:
    A bank of one, `[1, *window, I / groups, O]`, with levels in NumPy.

  Raises:
    ValueError: a Gram matrix that does not fit the kernel or that no inputs
      have; scales that differ by sign.
  """
  kernel = np.asarray(kernel, np.float32)
  banks = quantizer.quantize_banks(kernel[None])
  tensor = banks.bank(0)
  if tensor.negative is not None:
    raise ValueError(f'{type(quantizer).__name__} has another scale for '
                     'negative weights, of which GPTQ knows nothing: calibrate '
                     "with rounding='nearest'")
  gram = np.asarray(gram, np.float64)
  flat = lambda part: np.broadcast_to(
      np.asarray(part, np.float64), kernel.shape).reshape(-1, kernel.shape[-1])
  # Element by element, as scales of groups differ along the contraction.
  steps, zero = _steps(tensor.replace(data=None))
  scale, w = flat(steps), flat(kernel) - flat(zero)
  start = flat(tensor.data)
  levels = np.empty_like(start)
  for rows, columns in _parts(kernel.shape, gram):
    levels[:, columns] = _better(
        w[:, columns], gram[np.ix_(rows, rows)], scale[:, columns],
        start[:, columns], tensor.fmt, damping)
  return banks.replace(data=np.float32(levels).reshape(np.shape(banks.data)))


def output_error(kernel: np.ndarray, weights: np.ndarray, gram: np.ndarray
                 ) -> float:
  """tr(dW^T G dW) / O: the mean squared error of outputs that weights cause.

  Args:
    kernel: `[*window, I / groups, O]`, as the product sees it.
    weights: what stands for it, likewise.
    gram: as `round_weights` takes it.
  """
  difference = np.float64(kernel) - np.float64(weights)
  outputs = kernel.shape[-1]
  difference = difference.reshape(-1, outputs)
  total = sum(_errors(difference[:, columns], gram[np.ix_(rows, rows)]).sum()
              for rows, columns in _parts(kernel.shape, gram))
  return float(total / outputs)


def _parts(shape, gram):
  """[(rows of the Gram matrix, outputs)] of every group of a convolution."""
  rows = int(np.prod(shape[:-1]))
  groups = len(gram) // rows
  if gram.shape != (groups * rows,) * 2 or not groups or shape[-1] % groups:
    raise ValueError(f'a Gram matrix of shape {gram.shape} for weights '
                     f'{list(shape)}: must be {rows} x {rows}, or as many '
                     'times that as a convolution has groups')
  if not np.isfinite(gram).all():
    raise ValueError('a Gram matrix with NaN or infinity: the inputs are too '
                     'large for their squares')
  # Of every tap the inputs of a group lie side by side, and so do its outputs.
  inputs = np.arange(len(gram)).reshape(-1, groups, shape[-2])
  outputs = np.arange(shape[-1]).reshape(groups, -1)
  return [(inputs[:, group].ravel(), outputs[group])
          for group in range(groups)]


@jax.jit  # by itself, each of its operations is compiled for every shape
def _steps(tensor):
  """What 1 in a level is worth, and the zero points, of every element."""
  if tensor.zero_point is None:
    return tensor.steps(), 0.0
  return tensor.steps(), tensor.spread(jnp.float32(tensor.zero_point))


def _better(w, gram, scale, start, fmt, damping):
  """Levels by GPTQ, or `start` for those outputs that are better off with it.

  All of w, scale and start are `[K, O]`.
  """
  found = _solve(w, gram, scale, fmt, damping)
  less = (_errors(w - found * scale, gram) < _errors(w - start * scale, gram))
  return np.where(less, found, start)


def _errors(difference, gram):
  """e^T G e of every output, `[O]`."""
  return np.einsum('ko,ko->o', difference, gram @ difference)


def _solve(w, gram, scale, fmt, damping):
  """The levels that GPTQ chooses, `[K, O]`; w is without its zero point."""
  # Inputs of most energy first: theirs are the errors that weigh most, and
  # these have most others to make up for them. Groups need not be whole, as
  # their scales are known.
  order = np.argsort(-np.diag(gram), kind='stable')
  r = _factor(gram[np.ix_(order, order)], damping)
  w, scale = w[order], scale[order]
  # A group of zeros has a scale of 0 and no level but 0.
  divisor = np.where(scale > 0, scale, np.inf)
  levels, bounds = _grid(fmt)
  chosen, errors = np.empty_like(w), np.empty_like(w)
  for begin in range(0, len(w), _BLOCK):
    end = min(begin + _BLOCK, len(w))
    past = r[:begin, begin:end].T @ errors[:begin]
    for i in range(begin, end):
      carried = past[i - begin] + r[begin:i, i] @ errors[begin:i]
      u = (w[i] + carried / r[i, i]) / divisor[i]
      chosen[i] = levels[np.searchsorted(bounds, u, side='right')]
      errors[i] = w[i] - chosen[i] * scale[i]
  back = np.empty_like(chosen)
  back[order] = chosen
  return back


def _factor(gram, damping):
  """R, upper triangular, of the damped Gram matrix R R^T."""
  gram = gram.copy()
  diagonal = np.einsum('ii->i', gram)  # a view
  # An input that was always 0 has no say, and nothing to make up for: with a 1
  # of its own its weights go to their nearest levels.
  dead = diagonal <= 0
  diagonal += damping * diagonal.mean()
  diagonal[dead] = 1.0
  try:
    # NumPy's factor is lower triangular: of the matrix in reverse order.
    return np.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1]
  except np.linalg.LinAlgError as error:
    raise ValueError(
        f'a Gram matrix that is not positive definite, damped by {damping}: '
        'no inputs have it; gather it anew') from error


def _grid(fmt: FPFormat):
  """Levels, ascending, and between each two the least value of the upper."""
  levels = fmt.levels()
  middles = (levels[1:] + levels[:-1]) / 2
  # Ties go where quantizers have them go: asked, not repeated here.
  upper = np.asarray(functional.nearest_level(
      np.float32(middles), fmt, np.float32(1))) > middles
  return levels, np.where(upper, middles, np.nextafter(middles, np.inf))
