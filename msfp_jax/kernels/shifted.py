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
from jax import lax
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
  a, b = _codes(x), _codes(w)
  total = jnp.zeros((*a.shape[:-1], b.shape[-1]), jnp.int32)
  for start in range(0, x.length, size):
    # A product of 4-bit integers: at most size x 15 x 15.
    part = lax.dot_general(
        a[..., start:start + size], b[start:start + size],
        (((a.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    total += part << (_flag(x, start) + _flag(w, start))
  return total


def _codes(tensor):
  """Integers before their shift, int32."""
  bare = tensor.replace(shift=None, wide=None)
  return (bare.levels() * np.float32(1 / tensor.fmt.step)).astype(jnp.int32)


def _flag(tensor, start):
  """FLAGs at one place of the contraction, int32: `[..., 1]` or `[1, O]`."""
  if tensor.shift is None:
    return jnp.int32(0)
  flags = jnp.asarray(tensor.shift, jnp.int32)
  at = start // tensor.shift_group
  return lax.slice_in_dim(flags, at, at + 1, axis=flags.ndim + tensor.axis)
