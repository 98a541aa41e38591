"""Fake quantizers with straight-through gradients; encode and decode.

Quantization is U(x) = scale * nearest((x - zero_point) / scale) + zero_point,
where `nearest` rounds to the grid of an FPFormat (Kuzmin et al., "FP8
Quantization: The Power of the Exponent", eqs. 3-6, with a scale in place of
their real bias; c = scale * fmt.max is the paper's maximum value). All is done
in float32, by elementwise bit arithmetic that XLA fuses into one pass.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from msfp_jax.quant.numbers import FPFormat

# Fields of a float32; its exponent has bias 127 and starts at bit 23.
_SIGN = np.uint32(0x80000000)
_EXPONENT = np.uint32(0x7F800000)
_bits = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.uint32)
_float = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.float32)
# The least scale there is. Devices differ in whether they flush subnormal
# numbers to 0, by which a tensor may not be divided.
TINY = np.finfo(np.float32).tiny


def nearest_level(x, fmt: FPFormat | str, scale, zero_point=0) -> jax.Array:
  """nearest((x - zero_point) / scale): `fake_quant` before it scales back.

  Float32, of the shape of `x`; no gradient. Takes and raises what `fake_quant`
  does.
  """
  x, fmt = _check(x, fmt)
  return _nearest_level(fmt, x, *_affine(x.shape, scale, zero_point))


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _nearest_level(fmt, x, scale, zero_point=None):
  return _nearest(*_normalize(x, scale, zero_point), fmt)


# Elements that are quantized at once by `nearest_level_in_pieces`.
_PIECE = 2**18


def nearest_level_in_pieces(x, fmt: FPFormat | str, scale, zero_point=None
                            ) -> np.ndarray:
  """`nearest_level` of concrete arrays, compiled once for a format.

  Weights come in as many shapes as there are layers, and each would be
  compiled. In NumPy, of the shape of `x`.
  """
  # In pieces of one size, whatever the layer's: XLA compiles for shapes, and a
  # UNet has weights of dozens. np.resize fills the last piece with repeats,
  # which the last line cuts off.
  x = np.asarray(x)
  pieces = max(-(-x.size // _PIECE), 1)
  flat = lambda array: np.resize(
      np.broadcast_to(np.asarray(array, np.float32), x.shape),
      (pieces, _PIECE))
  # Without a zero point nothing is subtracted, so -0.0 stays what it is:
  # another program than that of a zero point of 0.
  parts = [flat(x), flat(scale)]
  if zero_point is not None:
    parts.append(flat(zero_point))
  levels = [_nearest_level(FPFormat.parse(fmt), *piece)
            for piece in zip(*parts, strict=True)]
  return np.concatenate(levels)[:x.size].reshape(x.shape)


def fake_quant(x, fmt: FPFormat | str, scale, zero_point=0) -> jax.Array:
  """scale * nearest((x - zero_point) / scale) + zero_point.

  Straight-through gradients, with u = (x - zero_point) / scale and
  q = nearest(u), summed to the shapes of scale and zero_point:

      d/dx = 1 inside the range (fmt.lowest <= u <= fmt.max), 0 outside
      d/dscale = q - u inside, the saturated level q outside
      d/dzero_point = 0 inside, 1 outside

  Args:
    x: float array, any shape; inf saturates, NaN stays NaN.
    fmt: the format, whose maximum must be a finite float32.
    scale: a normal number, positive, broadcasts to the shape of `x`.
    zero_point: broadcasts to the shape of `x`. None and the Python number 0
      mean none: then nothing is added, and a signed format keeps -0.0.

  Returns:
    Array of the shape and dtype of `x`, computed in float32.

  Raises:
    TypeError: if `x` is not floating point.
    ValueError: if `fmt` is no format, or one that float32 does not hold; if
      scale or zero_point does not broadcast to `x`; if a Python or NumPy scale
      is not such (the values of JAX arrays are not looked at).
  """
  x, fmt = _check(x, fmt)
  return _fake_quant(fmt, x, *_affine(x.shape, scale, zero_point))


def encode(x, fmt: FPFormat | str, scale, zero_point=0) -> jax.Array:
  """The codes of `fake_quant(x, fmt, scale, zero_point)`, uint8 < 2^fmt.bits.

  No code stands for NaN. Concrete arrays are checked; under jit, where values
  cannot be looked at, NaN gets an unspecified code and the caller must check.

  Raises:
    TypeError, ValueError: as `fake_quant`, and for NaN in a concrete array.
  """
  x, fmt = _check(x, fmt)
  # The count comes out of the same compiled pass: no second look at the data.
  codes, nans = _encode(fmt, x, *_affine(x.shape, scale, zero_point))
  if not isinstance(nans, jax.core.Tracer) and nans:
    raise ValueError(
        f'{nans} of {x.size} values are NaN after (x - zero_point) / scale, '
        f'and {fmt} has no code for NaN; look for where x or scale diverged')
  return codes


def decode(codes, fmt: FPFormat | str, scale, zero_point=0,
           dtype=jnp.float32) -> jax.Array:
  """scale * value(codes) + zero_point, the inverse of `encode`.

  decode(encode(x)) equals fake_quant(x) bit for bit, in any program, where
  there is no zero point or the scale is one that `snap_scale` leaves as it is.
  With others a program may round once where the other rounds twice.

  Args:
    codes: uint8 array, any shape; bits above fmt.bits are ignored.
    fmt: as for `fake_quant`, like scale and zero_point.
    dtype: of the result, which has the shape of `codes`.

  Raises:
    TypeError, ValueError: as `fake_quant`, and if `codes` is not uint8.
  """
  codes, fmt = jnp.asarray(codes), _check_format(fmt)
  if codes.dtype != jnp.uint8:
    raise TypeError(f'codes must be uint8, got {codes.dtype}; see encode')
  scale, zero_point = _affine(codes.shape, scale, zero_point)
  return _decode(fmt, jnp.dtype(dtype), codes, scale, zero_point)


@jax.custom_jvp
def snap_scale(scale) -> jax.Array:
  """Rounds a scale (float, any shape) to 16 significant bits; gradient 1.

  A level has at most 8 significant bits, so that scale * level is then exact in
  float32. XLA contracts scale * level + zero_point to a fused multiply-add in
  some fusions and not in others, which differ by one rounding of the product;
  an exact product leaves nothing to differ, and packed and fake-quantized
  models agree bit for bit in any fusion. The relative change is at most 2^-16.
  """
  return lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=15)


# Rounding is flat almost everywhere, and its own gradient 0.
snap_scale.defjvps(lambda tangent, snapped, scale: tangent)


# A value between its two neighbours, in E2M1 (M = 1):
#
#   u     e   step 2^(e - M)   k = round(u / step)   nearest = k step
#   2.6   1   1                3                     3
#   3.6   1   1                4                     4
#   0.2   0   .5               0                     0    (e has a lowest value)
#
# k = 2^(M+1), as of 3.6, is the first level of the next binade: `_join` need
# not know, and `_encode` lets it carry. An even k is an even mantissa, so
# rounding k to even is the tie rule of IEEE 754.
def _split(u, signed_as, fmt):
  """u float32 -> sign bit, exponent bits, k: |nearest(u)| = k * 2^(e - M).

  `signed_as` is float32 of the sign of u.
  """
  # u is a quotient, which XLA's CPU compiler fuses with what follows only where
  # it is used once: its sign is that of the dividend. Else all of u would be
  # written to memory and read back.
  a = jnp.abs(u)
  if not fmt.signed:
    a = jnp.where(signed_as < 0, 0.0, a)
  # Comparisons and not min / max: they let NaN pass on every backend.
  a = jnp.where(a > fmt.max, np.float32(fmt.max), a)
  lowest = np.uint32((fmt.min_exponent + 127) << 23)
  exponent = jnp.maximum(_bits(a) & _EXPONENT, lowest)
  # 2^(M - e), built from its bits: no rounding, and no division.
  per_step = np.uint32((2 * 127 + fmt.mantissa_bits) << 23) - exponent
  k = lax.round(a * _float(per_step), lax.RoundingMethod.TO_NEAREST_EVEN)
  sign = _bits(signed_as) & _SIGN if fmt.signed else None
  return sign, exponent, k


def _join(sign, exponent, k, fmt):
  """The inverse of `_split`, float32."""
  magnitude = k * _float(exponent - np.uint32(fmt.mantissa_bits << 23))
  return magnitude if sign is None else _float(_bits(magnitude) | sign)


def _nearest(u, signed_as, fmt):
  return _join(*_split(u, signed_as, fmt), fmt)


def divide(x: jax.Array, by: jax.Array) -> jax.Array:
  """x / by, rounded once in every program.

  XLA turns division by a constant or a broadcast operand into multiplication
  by its rounded reciprocal, which moves ties. A divisor that depends on x is
  left alone: NaN where x is NaN, where it makes no difference.
  """
  return x / jnp.where(jnp.isnan(x), x, by)


def _normalize(x, scale, zero_point):
  """u, and what it is a quotient of; float32."""
  x = x.astype(jnp.float32)
  above = x if zero_point is None else x - zero_point
  return divide(above, scale), above


def _denormalize(q, scale, zero_point, dtype):
  y = q * scale if zero_point is None else q * scale + zero_point
  return y.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _straight_through(fmt, x, scale, zero_point):
  # A gradient by hand: that of bit arithmetic is 0 or undefined, and the
  # ranges' need u and q, which the result alone does not give.
  q = _nearest(*_normalize(x, scale, zero_point), fmt)
  return _denormalize(q, scale, zero_point, x.dtype)


def _forward(fmt, x, scale, zero_point):
  return _straight_through(fmt, x, scale, zero_point), (x, scale, zero_point)


def _backward(fmt, residuals, g):
  x, scale, zero_point = residuals
  u, above = _normalize(x, scale, zero_point)
  q = _nearest(u, above, fmt)
  # False for NaN, so that a NaN reaches the gradients too.
  outside = (u < fmt.lowest) | (u > fmt.max)
  # x may be bfloat16; sums over a tensor for one scale need float32.
  g = g.astype(jnp.float32)
  dx = jnp.where(outside, 0.0, g).astype(x.dtype)
  # y = scale q(u) + z, u = (x - z) / scale, and dq/du counts as 1 inside:
  #   dy/dscale = q + scale (dq/du) (du/dscale) = q - u
  # Outside q is constant, which leaves q.
  dscale = _sum_to(g * (q - jnp.where(outside, 0.0, u)), scale.shape)
  if zero_point is None:
    return dx, dscale, None
  # Inside, what the zero point takes off x it adds again: 0.
  return dx, dscale, _sum_to(jnp.where(outside, g, 0.0), zero_point.shape)


_straight_through.defvjp(_forward, _backward)
# Jitted, like _decode, so that eager calls get the arithmetic of compiled ones.
_fake_quant = jax.jit(_straight_through, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _encode(fmt, x, scale, zero_point):
  u, above = _normalize(x, scale, zero_point)
  sign, exponent, k = _split(u, above, fmt)
  # k is m + 2^M [p > 0]: a carry out of the mantissa raises the exponent.
  binade = (exponent >> 23) - np.uint32(fmt.min_exponent + 127)
  code = (binade << fmt.mantissa_bits) + k.astype(jnp.uint32)
  if sign is not None:
    code |= sign >> (32 - fmt.bits)
  return (code & (2**fmt.bits - 1)).astype(jnp.uint8), jnp.isnan(u).sum()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(fmt, dtype, codes, scale, zero_point):
  codes = codes.astype(jnp.uint32)
  m = codes & np.uint32(2**fmt.mantissa_bits - 1)
  p = (codes >> fmt.mantissa_bits) & np.uint32(2**fmt.exponent_bits - 1)
  k = m | (p > 0).astype(jnp.uint32) << fmt.mantissa_bits
  # Subnormals (p = 0) have the exponent of the lowest binade; what they lack is
  # the leading one, which went into k above.
  exponent = jnp.maximum(p, np.uint32(1)) + np.uint32(127 - fmt.bias)
  sign = (codes << (32 - fmt.bits)) & _SIGN if fmt.signed else None
  q = _join(sign, exponent << 23, k.astype(jnp.float32), fmt)
  return _denormalize(q, scale, zero_point, dtype)


def _sum_to(x, shape):
  """Sums `x` to `shape`, the transpose of broadcasting from it."""
  x = x.sum(tuple(range(x.ndim - len(shape))))
  axes = tuple(i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1)
  return x.sum(axes, keepdims=True)


def _check_format(fmt):
  fmt = FPFormat.parse(fmt)
  if not fmt.fits_float32:
    raise ValueError(
        f'{fmt} reaches 2^128, beyond float32, in which quantizers compute; '
        f'choose one of formats_of_width({fmt.bits}, {fmt.signed})')
  return fmt


def _check(x, fmt):
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(
        f'x must be floating point, got {x.dtype}; use x.astype(jnp.float32)')
  return x, _check_format(fmt)


def _affine(shape, scale, zero_point):
  """scale and zero_point (or None) as float32 that broadcasts to `shape`."""
  # A JAX array may be traced or on a device; to look at it would be an error or
  # a wait. Scales of calibration are checked where they are made and loaded.
  if not isinstance(scale, jax.Array) and not np.all(
      (np.asarray(scale) >= TINY) & np.isfinite(scale)):
    raise ValueError(
        f'scale must be positive, got {scale}, and no subnormal number, from '
        f'{TINY:.3g} up, and finite; a tensor of zeros is exact at any scale, '
        'so give it 1')
  if isinstance(zero_point, int | float) and zero_point == 0:
    zero_point = None
  return (_operand('scale', scale, shape),
          _operand('zero_point', zero_point, shape))


def _operand(name, value, shape):
  if value is None:
    return None
  value = jnp.asarray(value, jnp.float32)
  pairs = zip(value.shape[::-1], shape[::-1], strict=False)
  if value.ndim > len(shape) or any(n not in (1, d) for n, d in pairs):
    raise ValueError(
        f'{name} of shape {value.shape} does not broadcast to the shape '
        f'{shape} of the tensor; give it size 1 along the other axes')
  return value
