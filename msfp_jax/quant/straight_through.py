"""The gradient of quantizers whose values come out of a QTensor.

`functional.fake_quant` has its own, for one scale from calibration.
"""

import functools

import jax
import jax.numpy as jnp

from msfp_jax.quant import functional


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def with_gradient(ends: tuple[float, float], cuts: tuple[bool, bool],
                  x: jax.Array, back: jax.Array, levels: jax.Array,
                  scale: jax.Array, zero: jax.Array) -> jax.Array:
  """back, with the gradient that `Quantizer.fake_quant` tells.

  Args:
    ends: the least and the largest level.
    cuts: whether x beyond each of them gets no gradient.
    x: what was quantized, `[...]`.
    back: what came back, float32 `[...]`.
    levels: of every element, float32 `[...]`.
    scale: float32, broadcasts to x.
    zero: likewise, the zero point, or 0.
  """
  del ends, cuts, x, levels, scale, zero
  return back


# A rule of its own, as x + stop_gradient(back - x) would round the value.
@with_gradient.defjvp
def _tangent(ends, cuts, primals, tangents):
  x, back, levels, scale, zero = primals
  dx, _, _, dscale, dzero = tangents
  # A scale of 0 is that of a group of zeros, whose levels are 0 as well.
  u = (jnp.asarray(x, jnp.float32) - zero) / jnp.where(
      scale >= functional.TINY, scale, 1.0)
  beyond = u < ends[0], u > ends[1]
  outside = beyond[0] | beyond[1]
  by_scale = levels - jnp.where(outside, 0.0, u)
  moved = by_scale * dscale + jnp.where(outside, 1.0, 0.0) * dzero
  dx = jnp.asarray(dx, jnp.float32)
  for cut, there in zip(cuts, beyond, strict=True):
    dx = jnp.where(there, 0.0, dx) if cut else dx
  return back, (dx + moved).astype(back.dtype)
