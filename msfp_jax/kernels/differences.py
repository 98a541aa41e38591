"""Temporal differences: inputs quantized as what changed since the step before.

With x_s the input of a layer at step s of the sampler, and W its weights,

    d_s    = x_s - x^_{s-1}
    x^_s   = x^_{s-1} + Q(d_s)              x^_0 = 0
    y_s    = y_{s-1} + Q(d_s) W             so that y_s = x^_s W, plus the bias

(modulated quantization with error compensation: MoDiff, ICML 2025, arXiv
2506.22463). From step to step inputs change little, so that Q, whose scale
follows the data, has a small range to cover; and what one step's Q lost is part
of the next one's difference: errors do not add up. The product is that of 4
bits all the same. It costs memory, x^ and y of every layer and image. The first
difference is a whole input, so the first step is taken twice, the second time
with what the first one lost (`diffusion.trajectory`).

In training y_s = x^_s W is computed as a whole, by the weights as they are now,
and x^_{s-1} is a constant to gradients.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from msfp_jax.kernels import apply as apply_lib
from msfp_jax.kernels import door
from msfp_jax.quant import interception
from msfp_jax.quant.around import Around
from msfp_jax.quant.qlayer import Latent
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.quantizers import Full

# What layers keep: x^ as the product sees it (smoothed and rotated), and y.
_INPUT, _OUTPUT = 'input', 'output'


def apply(model: nn.Module, params: Any, layers: Mapping[str, QLayer],
          memory: Any, *inputs: Any, implementation: str | None = None,
          dtype: Any = None, fresh: jax.Array | None = None,
          **options: Any) -> tuple[Any, Any]:
  """model(*inputs), as `kernels.apply`, with inputs quantized as differences.

  Args:
    model: as of `kernels.apply`.
    params: likewise.
    layers: likewise.
    memory: what the step before returned; {} at the first.
    *inputs: as of `kernels.apply`.
    implementation: likewise.
    dtype: likewise.
    fresh: bool `[]`, whether a trajectory begins here: x^ is then x, which is
      what it is next to after a first step that was taken twice. None: never.
    **options: as of `kernels.apply`.

  Returns:
    The model's output, and the memory for the next step.
  """
  run = functools.partial(
      _run, implementation=implementation, dtype=dtype, fresh=fresh)
  call = lambda model, params, visit, *inputs, names: (
      interception.call_remembering(
          model, params, visit, memory, *inputs, names=names))
  return apply_lib.apply(
      model, params, layers, *inputs, run=run, call=call, **options)


def restored(module: nn.Module, x: jax.Array, layer: QLayer,
             quantized: jax.Array) -> jax.Array:
  """x^ of this step, which the layer then keeps.

  Args:
    module: inside of `interception.call_remembering`.
    x: its input, `[..., I]`.
    layer: whose `around` and `input` count.
    quantized: bool `[]`; where it is not, x^ is x.
  """
  difference, now = _step(module, x, layer, None)
  now = jnp.where(quantized, now, layer.around.input(x))
  interception.remember(module, _INPUT, now)
  return now


def bare(layer: QLayer) -> QLayer:
  """A layer's product alone, of what is smoothed and rotated already."""
  return layer.replace(bias=None, around=Around(), adapter=None)


def whole(layer: QLayer, module: nn.Module, now: jax.Array) -> jax.Array:
  """The product of the whole x^, float32: a sum of levels is none itself."""
  return apply_lib.by_geometry(module, now, functools.partial(
      door.run, bare(layer).replace(input=Full())))


def complete(total: jax.Array, module: nn.Module, x: jax.Array, layer: QLayer
             ) -> jax.Array:
  """The product of x^, with what a layer adds to it.

  Bias and branches see the step's own input, and nothing of the one before.

  Args:
    total: the product, `[..., O]`.
    module: that is computed.
    x: its input, `[..., I]`.
    layer: whose bias and branches are added.
  """
  if layer.bias is not None:
    total = total + layer.bias
  if layer.around.down is not None or layer.adapter is not None:
    total = total + apply_lib.by_geometry(
        module, x, functools.partial(door.run_branches, layer))
  return total


def _step(module, x, layer, fresh):
  """d and x^ of this step; the layer keeps x^."""
  seen = jnp.asarray(layer.around.input(x), jnp.float32)
  before = interception.recall(module, _INPUT)
  if before is None:
    before = jnp.zeros_like(seen)
  if fresh is not None:
    before = jnp.where(fresh, seen, before)
  before = jax.lax.stop_gradient(before)
  difference = seen - before
  now = before + layer.input.fake_quant(difference)
  interception.remember(module, _INPUT, now)
  return difference, now


def _run(layer: QLayer, module: nn.Module, x: jax.Array,
         compute: Callable[[jax.Array], jax.Array], *,
         implementation: str | None, dtype: Any, fresh: jax.Array | None
         ) -> jax.Array:
  """Computes a layer, see `kernels.apply.Run`."""
  if layer.input.is_full:
    return apply_lib.run_module(
        layer, module, x, compute, implementation, dtype)
  difference, now = _step(module, x, layer, fresh)
  if layer.weight is None:
    total = compute(now.astype(x.dtype))
  elif isinstance(layer.weight, Latent):
    total = whole(layer, module, now)
  else:
    # In float32, whatever the module returns: what is added up at every step
    # would be rounded at every step.
    change = apply_lib.by_geometry(module, difference, functools.partial(
        door.run, bare(layer), implementation=implementation))
    total = interception.recall(module, _OUTPUT)
    total = change if total is None else total + change
    interception.remember(module, _OUTPUT, total)
  return complete(total, module, x, layer).astype(
      apply_lib.dtype_of(module, x, dtype))
