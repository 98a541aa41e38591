"""Computes quantized layers in float64 NumPy, from the formats' tables."""

import itertools

import ml_dtypes
import numpy as np

from msfp_jax.kernels import carriers
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantizers import Static


def quantized(x, quantizer, axis):
  """A tensor as its quantizer leaves it, float64; `axis` of the contraction."""
  if isinstance(quantizer, Static):
    return fake_quant(x, quantizer.fmt, quantizer.scale, quantizer.zero_point)
  if isinstance(quantizer, Block):
    return block(x, quantizer, axis)
  return np.float64(x)


def block(x, quantizer, axis):
  """Quantizes by groups: each is cut out and looked at by itself."""
  fmt, shared = quantizer.fmt, quantizer.shared
  whole = {'tensor': tuple(range(x.ndim)), 'image': tuple(range(1, x.ndim)),
           'channel': tuple(range(x.ndim - 1))}.get(shared, (axis,))
  size = quantizer.group or x.shape[axis]
  groups = np.split(x, range(size, x.shape[axis], size), axis)
  low = [group.min(whole, keepdims=True) for group in groups]
  high = [group.max(whole, keepdims=True) for group in groups]
  if fmt.signed:
    reach = [np.maximum(np.abs(a), np.abs(b))
             for a, b in zip(low, high, strict=True)]
    low = [None] * len(groups)
  else:
    if quantizer.zero_point is not None:
      low = [np.full_like(a, quantizer.zero_point) for a in low]
    elif quantizer.scale_type == 'bf16':
      low = [a.astype(ml_dtypes.bfloat16).astype(np.float32) for a in low]
    reach = [np.maximum(b - a, 0) for a, b in zip(low, high, strict=True)]
  scales = block_scales(reach, quantizer, axis)
  return np.concatenate([
      fake_quant(group - (0 if zero is None else zero), fmt, scale) + (
          0 if zero is None else np.float64(zero))
      for group, scale, zero in zip(groups, scales, low, strict=True)], axis)


def block_scales(reach, quantizer, axis):
  """The scale of every group, of its largest magnitude or range, float64."""
  fmt, kept = quantizer.fmt, quantizer.scale_type
  if kept == 'e8m0':
    top = np.floor(np.log2(fmt.max))
    return [np.exp2(np.floor(np.log2(np.float64(r))) - top) for r in reach]
  scales = [np.float64(np.float32(r / np.float32(fmt.max))) for r in reach]
  if kept == 'bf16':
    return [np.float64(s.astype(ml_dtypes.bfloat16)) for s in scales]
  if kept == 'f32':
    return scales if fmt.signed else [snapped(scale) for scale in scales]
  outer = 1.0
  if quantizer.two_level:
    # Of weights one, of inputs one of each image.
    each = [scale.max(tuple(range(axis == -1, scale.ndim)), keepdims=True)
            for scale in scales]
    outer = np.float64(np.float32(np.max(each, axis=0) / 448))
  return [np.float64((scale / outer).astype(np.float32).astype(
      ml_dtypes.float8_e4m3fn)) * outer for scale in scales]


def snapped(scale):
  """Rounds to 16 significant bits."""
  fraction, exponent = np.frexp(scale)
  return np.ldexp(np.rint(fraction * 2**16), exponent - 16)


def fake_quant(x, fmt, scale, zero_point=None):
  """Quantizes to scale * nearest level + zero_point; ties to the even code."""
  zero = 0.0 if zero_point is None else np.float64(zero_point)
  # A scale of 0 is that of a group without any reach.
  u = (np.float64(x) - zero) / np.where(scale == 0, 1.0, np.float64(scale))
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


def epilogue(sums, scale, shift, rows, columns):
  """Scales sums `[..., N]` by row and column, float64.

  Args:
    sums: of the kernel.
    scale, shift: `[N]`, or what broadcasts to the sums.
    rows: scale, shift, total and zero, `[...]`.
    columns: bias, offset and zero, `[N]`.
  """
  by_row = [np.float64(part)[..., None] for part in rows]
  bias, offset, zero = map(np.float64, columns)
  return ((sums - by_row[2] * offset) * (by_row[0] * scale)
          + by_row[1] * shift + bias + by_row[3] * zero)


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


def is_exact(weight: FPFormat, act: FPFormat, length: int,
             carrier: str) -> bool:
  """Whether sums of `length` products are exact in any order.

  Args:
    weight: format of the weights.
    act: of the inputs.
    length: of the contraction.
    carrier: a key of DTYPES; fp8 is summed with fewer bits by Hopper's tensor
      cores and never counts as exact.
  """
  if carrier == 'fp8':
    return False
  bound = carriers.EXACT_INT32 if carrier == 'int8' else carriers.EXACT_FLOAT32
  return length * carriers.magnitude(weight) * carriers.magnitude(act) <= bound


def integers(codes, flags, group, signed=True):
  """What QuaRTZ's codes and FLAGs stand for, by the definition, int64."""
  codes = np.int64(codes)
  if signed:
    codes = np.where(codes & 8, -1, 1) * (codes & 7)
  each = np.int64(flags).repeat(group, -2)[..., :codes.shape[-2], :]
  return codes << each
