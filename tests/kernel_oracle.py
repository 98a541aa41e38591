"""Computes quantized layers in float64 NumPy, from the formats' tables."""

import itertools

import numpy as np


def fake_quant(x, fmt, scale, zero_point=None):
  """Quantizes to scale * nearest level + zero_point; ties to the even code."""
  zero = 0.0 if zero_point is None else np.float64(zero_point)
  u = (np.float64(x) - zero) / np.float64(scale)
  values = fmt.values()
  codes = np.argsort(values, kind='stable')
  # +0 stands for -0 too.
  codes = codes[np.r_[True, np.diff(values[codes]) > 0]]
  grid = values[codes]
  upper = np.clip(np.searchsorted(grid, u), 1, len(grid) - 1)
  lower = upper - 1
  to_upper, to_lower = grid[upper] - u, u - grid[lower]
  # Without mantissa bits a tie between powers of two goes away from 0.
  even = (codes[upper] % 2 == 0) if fmt.mantissa_bits else (
      (grid[lower] > 0) | (grid[upper] == 0))
  up = (to_upper < to_lower) | ((to_upper == to_lower) & even)
  return np.where(up, grid[upper], grid[lower]) * np.float64(scale) + zero


def conv(x, w, strides, padding, dilation, groups=1):
  """Convolves tap by tap; int64 stays int64.

  Args:
    x: `[B, *spatial, I]`.
    w: `[*window, I / groups, O]`.
    strides: per spatial axis, like the others.
    padding: (before, after), of zeros.
    dilation: of the window.
    groups: of the channels.

  Returns:
    `[B, *spatial', O]`.
  """
  x = np.pad(x, ((0, 0), *padding, (0, 0)))
  window = w.shape[:-2]
  size = [(n - (k - 1) * d - 1) // s + 1 for n, k, d, s in zip(
      x.shape[1:-1], window, dilation, strides, strict=True)]
  x = x.reshape(*x.shape[:-1], groups, -1)
  w = w.reshape(*w.shape[:-1], groups, -1)
  y = 0
  for tap in itertools.product(*map(range, window)):
    part = x[(slice(None), *[
        slice(i * d, i * d + (n - 1) * s + 1, s)
        for i, d, n, s in zip(tap, dilation, size, strides, strict=True)])]
    y = y + np.einsum('...gi,igo->...go', part, w[tap])
  return y.reshape(*y.shape[:-2], -1)
