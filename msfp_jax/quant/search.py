"""Searches the best number format, scale and zero point of a tensor (MSFP).

For sorted data the squared error of a quantizer with K levels needs no pass
over the data: between two neighbouring midpoints of the grid every value goes
to one level, so the error follows from the prefix sums of 1, x and x^2 at
K - 1 places. That makes thousands of candidates as cheap as a few passes, and
exact: everything is float64.

Source: the search-based initialisation of arXiv 2505.21591, whose candidate
lists and ranges are ours (docs/method.md).
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.quant import functional
from msfp_jax.quant import numbers as numbers_lib
from msfp_jax.quant import quantizers

# How the error is had from prefix sums: levels q0 < q1 < .. of a grid, sorted
# data x, and the places where the midpoints (|) cut it,
#
#   x:       . .  .|. ..  . .|  .  . . |.   .
#   levels:    q0      q1        q2      q3
#
#   sum (x - q)^2 = sum over levels of  S2 - 2 q S1 + q^2 S0,
#
# where S0, S1 and S2 are count, sum and sum of squares between two cuts, each a
# difference of two prefix sums. A candidate costs K - 1 binary searches.

# Maximum values tried, as fractions of the largest magnitude.
RANGE_GRID = np.linspace(0.02, 1.2, 111)
# Zero points tried where activations follow SiLU, whose minimum is -0.2785.
SILU_ZERO_POINTS = np.linspace(-0.3, 0.0, 7)
# The best candidate's neighbourhood is searched again this many times, each
# time on a grid this much finer.
_REFINEMENTS = 3
_REFINED_POINTS = 9
_ROWS_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class SearchResult:
  """The best quantizer of a tensor.

  Attributes:
    fmt: one format for the whole tensor.
    scale: float32, scalar, or `[C]` where a channel axis was given.
    zero_point: as scale, or None for formats searched without.
    mse: mean squared error over the whole tensor, float64.
  """

  fmt: numbers_lib.FPFormat
  scale: np.ndarray
  zero_point: np.ndarray | None
  mse: float

  def quantizer(self, rank: int = 0) -> quantizers.Static:
    """The quantizer; per-channel arrays stand on the last of `rank` axes."""
    expand = lambda a: jnp.asarray(a, jnp.float32).reshape(
        (1,) * (rank - 1) + (-1,) if np.ndim(a) else ())
    scale, zero_point = expand(self.scale), None
    if self.zero_point is not None:
      scale = functional.snap_scale(scale)
      zero_point = expand(self.zero_point)
    return quantizers.Static(self.fmt, scale, zero_point)


def search(x: np.ndarray, formats: Sequence[numbers_lib.FPFormat], *,
           channel_axis: int | None = None,
           zero_points: np.ndarray | str | None = None) -> SearchResult:
  """Minimises the mean squared error over formats, scales and zero points.

  The result is the exact minimum over its candidates: every format, with
  every maximum value c of `RANGE_GRID` times the largest magnitude (with zero
  points also times the span above each), every zero point, and the refined
  neighbourhood of each format's best.

  Args:
    x: the tensor, finite, at least one element.
    formats: candidates, of one signedness.
    channel_axis: where given, each slice along it gets its own scale (and
      zero point), and all share the format with the least total error.
    zero_points: None for none; an array of candidates `[Z]`; or 'range' for 7
      from the (channel's) minimum, or 0 if that is less, to 0.

  Raises:
    ValueError: x is empty or holds values that are not finite.
  """
  x = np.asarray(x, np.float64)
  if not x.size:
    raise ValueError(f'nothing to search: the tensor has shape {x.shape}')
  bad = np.count_nonzero(~np.isfinite(x))
  if bad:
    raise ValueError(f'{bad} of {x.size} values are NaN or infinite')
  if channel_axis is None:
    # One search for all: a tensor is a single channel.
    rows = x.reshape(1, -1)
  else:
    rows = np.moveaxis(x, channel_axis, 0).reshape(x.shape[channel_axis], -1)
  table = _level_table(tuple(formats))
  mse, maximum, zero = _search_rows(rows, table, _zero_point_rows(
      zero_points, rows))
  mse, scale, zero = _normal(
      rows, mse, maximum / [fmt.max for fmt in formats], zero)
  # One format for all channels: that of the least total error.
  best = int(np.argmin(mse.sum(axis=0)))
  pick = lambda a: a[:, best] if channel_axis is not None else a[0, best]
  return SearchResult(
      formats[best], pick(scale).astype(np.float32),
      None if zero_points is None else pick(zero).astype(np.float32),
      max(float(mse[:, best].mean()), 0.0))


def _normal(rows, mse, scale, zero):
  """Rows whose scale would be subnormal count as zero: (mse, scale, zero).

  Args:
    rows: `[R, N]`.
    mse: of every row and format, `[R, F]`, as are the others.
    scale: of which a normal float32 is to be made.
    zero: zero points.
  """
  # All levels of these are 0, which is exact at any scale that leaves them so.
  # It cannot be theirs: devices flush it to 0, and 0 / 0 is NaN.
  small = scale < functional.TINY
  zero = np.where(small | (np.abs(zero) < functional.TINY), 0.0, zero)
  squares = np.mean(rows**2, axis=1, keepdims=True)
  return np.where(small, squares, mse), np.where(small, 1.0, scale), zero


def _zero_point_rows(zero_points, rows: np.ndarray) -> np.ndarray:
  """The candidate zero points of every row, float64 `[R, Z]`."""
  if zero_points is None:
    return np.zeros((len(rows), 1))
  if isinstance(zero_points, str):
    if zero_points != 'range':
      raise ValueError(f"zero_points {zero_points!r}: an array or 'range'")
    # From the minimum, where nothing of the range is lost, to 0.
    floor = np.minimum(rows.min(axis=1), 0.0)
    return floor[:, None] * np.linspace(1, 0, 7)
  return np.tile(np.asarray(zero_points, np.float64), (len(rows), 1))


@functools.cache
def _level_table(formats: tuple[numbers_lib.FPFormat, ...]) -> np.ndarray:
  """The levels of all formats, ascending to 1, float64 `[F, K]`."""
  grids = [fmt.levels() / fmt.max for fmt in formats]
  width = max(len(grid) for grid in grids)
  # Formats with fewer levels are filled up by repeats of the top, to which no
  # value goes: one array, and one compilation, for all.
  return np.stack([
      np.pad(grid, (0, width - len(grid)), mode='edge') for grid in grids])


class Sorted(NamedTuple):
  """Rows of a tensor, as the errors of quantizers follow from them.

  Attributes:
    values: ascending `[..., n]`; infinite where there are no more.
    sums: of those before each place, `[..., n + 1]`.
    squares: sums of their squares, likewise.
    largest: magnitude, `[...]`.
  """

  values: np.ndarray
  sums: np.ndarray
  squares: np.ndarray
  largest: np.ndarray


def _search_rows(rows, table, zero_points):
  """Finds the best (mse, maximum, zero point) of rows and formats, `[R, F]`."""
  count, length = rows.shape
  # Few distinct shapes, few compilations: rows go in fixed groups, their
  # length up to a power of four, padded with what sorts last and weighs 0.
  group = 1 if count == 1 else _ROWS_AT_ONCE
  padded = max(4 ** int(np.ceil(np.log2(length) / 2)), 256)
  out = []
  with jax.enable_x64(True), jax.default_device(_host()):
    for start in range(0, count, group):
      chunk = rows[start:start + group]
      fill = group - len(chunk)
      values = np.pad(chunk, ((0, fill), (0, padded - length)),
                      constant_values=np.inf)
      values[len(chunk):, :length] = 0.0  # rows of nothing but zeros
      zeros = np.pad(zero_points[start:start + group], ((0, fill), (0, 0)))
      result = _best_of_rows(
          _sorted(values, length), np.float64(length), table, zeros)
      out.append([np.asarray(r)[:len(chunk)] for r in result])
  return [np.concatenate(parts) for parts in zip(*out, strict=True)]


def _sorted(values, length):
  """`Sorted` of rows `[R, n]`, of which `length` count and others are inf."""
  # By NumPy: several times faster than XLA on a CPU, and nothing to compile.
  values = np.sort(values, axis=1)
  used = np.where(np.arange(values.shape[1]) < length, values, 0.0)
  before = lambda a: np.pad(np.cumsum(a, axis=1), ((0, 0), (1, 0)))
  return Sorted(values, before(used), before(used**2),
                np.abs(used).max(axis=1))


def _host() -> jax.Device | None:
  """The CPU, which has float64; None where JAX was not given one."""
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:
    return None


@jax.jit
def _best_of_rows(rows, length, table, zero_points):
  return jax.lax.map(lambda row: _best_of_row(row[0], length, table, row[1]),
                     (rows, zero_points))


def _best_of_row(row, length, table, zero_points):
  """Does what `_search_rows` does, for one row: each result `[F]`."""
  values, largest = row.values, row.largest
  largest = jnp.where(largest > 0, largest, 1.0)  # all zero: any scale does
  # With a zero point z, the grid reaches from z to z + c: best values of c lie
  # near the largest magnitude or near the span from z to the largest value.
  maxima = [RANGE_GRID * largest]
  spacing = (RANGE_GRID[1] - RANGE_GRID[0]) * largest
  zero_spacing = 0.0
  if len(zero_points) > 1:
    span = values[length.astype(int) - 1] - zero_points
    maxima.append(RANGE_GRID * jnp.maximum(span, largest * 1e-6)[:, None])
    zero_spacing = jnp.max(jnp.abs(jnp.diff(zero_points)))
  maxima = jnp.concatenate([
      jnp.broadcast_to(m, (len(zero_points), len(RANGE_GRID)))
      for m in maxima], axis=1)
  error = _error_function(row, length)

  def best_of(levels, maxima, zero_points):
    """The best of pairs `[Z, G]` of maximum value and zero point `[Z]`."""
    zeros = jnp.broadcast_to(zero_points[:, None], maxima.shape)
    mse = jax.vmap(jax.vmap(functools.partial(error, levels)))(maxima, zeros)
    i = jnp.argmin(mse)
    return mse.ravel()[i], maxima.ravel()[i], zeros.ravel()[i]

  def refine(levels, best, fineness):
    # From one grid point before the best to one behind it, in range and zero
    # point; kept only if better, so that refining never does harm.
    offsets = jnp.linspace(-1.0, 1.0, _REFINED_POINTS) * fineness
    near = best[1] + offsets * spacing
    near = jnp.where(near > 0, near, best[1])
    zeros = best[2][None]
    if len(zero_points) > 1:
      zeros = jnp.minimum(best[2] + offsets * zero_spacing, 0.0)
    found = best_of(levels, jnp.tile(near, (len(zeros), 1)), zeros)
    return jax.tree.map(
        lambda new, old: jnp.where(found[0] < best[0], new, old), found, best)

  def best_of_format(levels):
    best = best_of(levels, maxima, zero_points)
    # 9 points over 2 spacings are 4 times finer: 1, 1/4, 1/16.
    fineness = (2.0 / (_REFINED_POINTS - 1)) ** jnp.arange(_REFINEMENTS)
    return jax.lax.scan(lambda b, f: (refine(levels, b, f), None), best,
                        fineness)[0]

  return jax.lax.map(best_of_format, table)


def _error_function(row, length):
  """Makes (levels `[K]`, maximum value, zero point) -> mean squared error.

  Args:
    row: one.
    length: number of values that count.
  """
  def error(levels, maximum, zero_point):
    # Formats with fewer levels repeat their top, between which nothing lies:
    # there counts and sums are 0.
    points = levels * maximum + zero_point
    places = jnp.searchsorted(row.values, (points[1:] + points[:-1]) / 2)
    ends = jnp.concatenate([places, length.astype(places.dtype)[None]])
    between = lambda a: jnp.diff(a[ends], prepend=0.0)
    counts = jnp.diff(ends, prepend=0)
    return jnp.sum(between(row.squares) - 2 * points * between(row.sums)
                   + points**2 * counts) / length

  return error
