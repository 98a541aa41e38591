"""Options for XLA, and borders in its programs, for whole samplers."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from msfp_jax.quant.qlayer import QLayer

# XLA's CPU back end runs small products of its YNN library on one core each;
# those of Winograd's algorithm in float32 are faster by Eigen. The value names
# what is left to YNN. The same for all models: other libraries round other sums
# (of attention), and full precision, simulated and packed would differ by it.
_CPU = {'xla_cpu_experimental_ynn_fusion_type':
        'LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION'}


@functools.cache
def options() -> dict[str, str] | None:
  """Options for `jax.jit(compiler_options=)`; None where XLA lacks them."""
  if jax.default_backend() != 'cpu':
    return None
  try:
    jax.jit(lambda x: x + 1, compiler_options=_CPU).lower(0.0).compile()
  except (jax.errors.JaxRuntimeError, ValueError):
    return None
  return dict(_CPU)


def product_of_bytes(x: jax.Array, weights: jax.Array) -> jax.Array:
  """x `[..., c]` with `[c, D]`, both int8, in int32; for CPUs.

  As a convolution, which `options` leave to YNN: Eigen has no int8 for vectors
  and takes seven times as long.
  """
  out = jax.lax.conv_general_dilated(
      x.reshape(1, 1, -1, x.shape[-1]), weights[None, None], (1, 1), 'VALID',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      preferred_element_type=jnp.int32)
  return out.reshape(*x.shape[:-1], -1)


def first(x: jax.Array) -> jax.Array:
  """A number that is known when the array is: its first."""
  return x[(0,) * x.ndim]


def never(number: jax.Array) -> jax.Array:
  """False, which XLA cannot tell before it has the number."""
  return (number < 1) & (number > 1)


def apart(run: Callable[[jax.Array, QLayer], jax.Array], x: jax.Array,
          layer: QLayer) -> jax.Array:
  """run(x, layer), as a part of a program that XLA leaves where it is.

  Else XLA may decode the weights of all layers at once, before the loop over a
  sampler's steps, and keep them. On CPUs it also fuses nothing across either
  end of the layer, so that what is between two layers is rounded alike in any
  program, whatever the layers run by: fused, a normalization differs in its
  last bit, which a deep network amplifies.
  """
  if not isinstance(x, jax.core.Tracer) or not x.size:
    return run(x, layer)
  number = first(x)
  if jax.default_backend() != 'cpu':
    if not layer.weight.is_packed:
      return run(x, layer)
    data, _ = jax.lax.optimization_barrier((layer.weight.data, number))
    return run(x, layer.replace(weight=layer.weight.replace(data=data)))
  # XLA drops optimization barriers on CPUs.
  run = jax.jit(run, inline=True)  # which is traced once for both uses
  out = jax.eval_shape(run, x, layer)
  return jax.lax.cond(
      never(number), lambda *_: jnp.zeros(out.shape, out.dtype), run, x, layer)
