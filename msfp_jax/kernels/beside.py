"""Branches of low rank beside a quantized product, in full precision."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from msfp_jax.quant.qlayer import QLayer

# (x [B, *spatial, I], w [*window, I, O]) -> [B, *spatial', O].
Plain = Callable[[jax.Array, jax.Array], jax.Array]


def add(out: jax.Array, layer: QLayer, x: jax.Array, seen: jax.Array,
        plain: Plain) -> jax.Array:
  """The layer's product, with the branches added that it has.

  Args:
    out: the product and the bias.
    layer: whose `around` may have a branch, and which may have an `adapter`.
    x: the layer's input, for the adapter.
    seen: x', the input as smoothed and rotated, not quantized, for `around`.
    plain: product of float32 values, with the layer's geometry.
  """
  if layer.around.down is not None:
    # It sees x' before it was quantized: it carries what 4 bits lose.
    out = out + low_rank(seen, layer.around.down, layer.around.up, plain)
  if layer.adapter is not None:
    adapter = layer.adapter
    out = out + low_rank(x, adapter.down, adapter.up, plain, adapter.gain)
  return out


def low_rank(x: jax.Array, down: jax.Array, up: jax.Array, plain: Plain,
             gain: jax.Array | None = None) -> jax.Array:
  """x down, times a gain, times up; float32.

  Args:
    x: the input.
    down: `[*window, I, R]`.
    up: `[R, O]`.
    plain: product of float32 values, with the layer's geometry.
    gain: `[R]`, or None.
  """
  # `down` has the window and its geometry, `up` is pointwise.
  inner = plain(jnp.asarray(x, jnp.float32), jnp.float32(down))
  if gain is not None:
    inner = inner * gain
  # 'highest': TPUs round the factors of a product to bfloat16 by default.
  return jnp.matmul(inner, jnp.float32(up), precision='highest')
