"""QuaRTZ's product as its paper has it: of 4-bit codes, by group, then shifted.

    y[m, n] = sum over groups g of (sum over k in g of x[m, k] w[k, n])
              << (FLAG of x's group [m, g] + FLAG of w's group [g, n])

(arXiv 2509.26436; a shift to the left: it undoes the one that made the codes.)
It is here to be read and compared with. What runs is `door.run`, which shifts
the codes first and has one product of 8-bit integers, by any hardware that has
these: the same integers, bit for bit.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.quant.qtensor import QTensor


def sums(x: QTensor, w: QTensor) -> jax.Array:
  """The sums of a dense layer before scales, int32 `[..., O]`.

  In steps of both sides' levels, those of an unsigned input counted from its
  zero point.

  Args:
    x: integers `[..., I]`, with FLAGs or without.
    w: integers `[I, O]`, with FLAGs or without.
  """
  # Over the smaller of both groups neither side's FLAG changes; without FLAGs
  # all of the contraction is one group.
  size = math.gcd(*[t.shift_group for t in (x, w) if t.shift is not None]) or (
      x.length)
  a, b = _grouped(_codes(x), -1, size), _grouped(_codes(w), -2, size)
  # Products of 4-bit integers: at most size x 15 x 15.
  parts = jnp.einsum('...gk,gkn->...gn', a, b)
  flags = _flags(x, size)[..., None] + _flags(w, size)
  return (parts << flags).sum(-2)


def _codes(tensor):
  """Integers before their shift, int32."""
  bare = tensor.replace(shift=None, wide=None)
  return (bare.levels() * np.float32(1 / tensor.fmt.step)).astype(jnp.int32)


def _grouped(codes, axis, size):
  """The contraction in groups of `size`; zeros fill up the last."""
  widths = [(0, 0)] * codes.ndim
  widths[axis] = (0, -codes.shape[axis] % size)
  codes, at = jnp.pad(codes, widths), codes.ndim + axis
  return codes.reshape(*codes.shape[:at], -1, size, *codes.shape[at + 1:])


def _flags(tensor, size):
  """FLAGs of groups of `size`, int32: `[..., n]` of inputs, `[n, O]`."""
  if tensor.shift is None:
    return jnp.zeros([1] * -tensor.axis, jnp.int32)
  flags = jnp.asarray(tensor.shift, jnp.int32)
  flags = jnp.repeat(flags, tensor.shift_group // size, tensor.axis)
  return jax.lax.slice_in_dim(flags, 0, -(-tensor.length // size),
                              axis=flags.ndim + tensor.axis)
