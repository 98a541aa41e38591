"""Options for XLA, and borders in its programs, for whole samplers."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from msfp_jax.kernels import cpu
from msfp_jax.quant.qlayer import QLayer


@functools.cache
def options(quantized: bool = True) -> dict[str, str] | None:
  """Options for `jax.jit(compiler_options=)`; None where XLA lacks them.

  Args:
    quantized: whether the program has quantized layers. Packed and simulated
      ones get the same, so that what is between layers is rounded alike; full
      precision gets those that are fastest for float32.
  """
  if jax.default_backend() != 'cpu':
    return None
  found = cpu.OPTIONS[cpu.carrier() if quantized else 'f32']
  try:
    jax.jit(lambda x: x + 1, compiler_options=found).lower(0.0).compile()
  except (jax.errors.JaxRuntimeError, ValueError):
    return None
  return dict(found)


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
  first = x[(0,) * x.ndim]
  if jax.default_backend() != 'cpu':
    if not layer.weight.is_packed:
      return run(x, layer)
    data, _ = jax.lax.optimization_barrier((layer.weight.data, first))
    return run(x, layer.replace(weight=layer.weight.replace(data=data)))
  # XLA drops optimization barriers on CPUs. What never holds, it cannot tell.
  never = (first < 1) & (first > 1)
  run = jax.jit(run, inline=True)  # which is traced once for both uses
  out = jax.eval_shape(run, x, layer)
  return jax.lax.cond(
      never, lambda *_: jnp.zeros(out.shape, out.dtype), run, x, layer)
