"""What quantization costs every layer, by itself: SQNR of its output.

    SQNR = 10 log10(sum of y^2 / sum of (y' - y)^2), in dB

y is a layer's output in full precision, y' that of the quantized layer on the
same input, which full precision made: errors of earlier layers have no part in
it. Sums are over images and steps of the sampler. Where differences between
steps are quantized, the layer knows full precision's input of the step before.
"""

from collections.abc import Mapping
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax import diffusion
from msfp_jax.kernels import apply as apply_lib
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import interception
from msfp_jax.quant.qlayer import QLayer

# What is quantized: all of the layer, its weights alone, its input alone.
OUTPUT, WEIGHT, INPUT = PARTS = ('output', 'weight', 'input')
_STEPS = 5  # of the sampler that are looked at, the first and last among them


class LayerErrors:
  """Measures quantized models against the teacher that they were made of."""

  def __init__(self, model: nn.Module, params: Any,
               plan: diffusion.SamplerPlan, noise: jax.Array,
               *condition: jax.Array, key: jax.Array):
    """Runs the teacher's sampler, once for all models.

    Args:
      model: in full precision.
      params: its parameters.
      plan: the sampler.
      noise: `[B, H, W, C]`; B images are looked at.
      *condition: what else the model takes.
      key: of the sampler's noise.
    """
    params = interception.parameters(params)
    self._params, self._condition = params, condition
    self._own = {kind: interception.leaves(params, kind)
                 for kind in ('kernel', 'bias')}
    self._plan = plan
    self._record = jax.jit(functools.partial(_inputs, model))
    # Modules are no arrays, so a jitted function cannot return them.
    t = jnp.zeros(len(noise))
    self._modules = {}
    jax.eval_shape(lambda *given: self._modules.update(
        {name: call.module.clone(name=None) for name, call
         in interception.record(model, *given)[1].items()}),
                   params, noise, t, *condition)
    self._seen = jax.jit(lambda params, noise: diffusion.trajectory(
        lambda x, t, index: model.apply({'params': params}, x, t, *condition),
        plan, noise, key, lambda x, eps, step: x)[1])(params, noise)

  def sqnr(self, model: packed_lib.PackedModel
           ) -> dict[str, dict[str, float]]:
    """{part of PARTS: {layer: dB}}, to three digits behind the point.

    Layers in full precision are left out, and those without any error.
    """
    steps = np.unique(np.linspace(
        0, self._plan.num_steps - 1, _STEPS).round().astype(int))
    sums = {}
    for step in steps.tolist():
      # One step's inputs in memory at a time, and of the one before. To make
      # them again for every model is cheaper than to keep them.
      inputs = self._inputs(step)
      before = self._inputs(step - 1) if model.differences and step else {}
      for name, seen in inputs.items():
        layer = model.layer_at(name, step)
        if layer.weight is None and layer.input.is_full:
          continue
        own = {kind: leaves[name] for kind, leaves in self._own.items()
               if name in leaves}
        found = np.float64(_squares(
            self._modules[name], own, layer, seen, model.implementation,
            model.differences, before.get(name)))
        sums[name] = sums.get(name, 0) + found
    if odd := sorted(name for name, found in sums.items()
                     if not np.isfinite(found).all()):
      raise ValueError(f'the outputs of layers {odd} are NaN or infinite')
    return {part: {name: round(10 * math.log10(found[0] / found[i]), 3)
                   for name, found in sums.items()
                   if found[0] > 0 and found[i] > 0}
            for i, part in enumerate(PARTS, 1)}

  def _inputs(self, step: int) -> dict[str, jax.Array]:
    """{layer: its input} in full precision at a step."""
    x = self._seen[step]
    return self._record(
        self._params, x, jnp.full(len(x), float(self._plan.timesteps[step])),
        *self._condition)


def summary(sqnr: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
  """Mean and minimum over the layers of the output's SQNR; empty of none."""
  values = list(sqnr[OUTPUT].values())
  if not values:
    return {}
  return {'sqnr_mean': math.fsum(values) / len(values),
          'sqnr_min': min(values)}


def _inputs(model, params, x, t, *condition):
  """{layer: its input} in full precision."""
  return {name: call.input for name, call in interception.record(
      model, params, x, t, *condition)[1].items()}


# A program of its own for every layer: layers of equal shapes and formats
# share one, within a model and between recipes and seeds.
@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _squares(module: nn.Module, own: Mapping[str, jax.Array], layer: QLayer,
             x: jax.Array, implementation: str | None, differences: bool,
             before: jax.Array | None) -> jax.Array:
  """Sums of squares `[4]`: of y, and of the errors of `PARTS`.

  Args:
    module: the nn.Conv or nn.Dense.
    own: its parameters in full precision.
    layer: quantized, with one set of weights.
    x: its input.
    implementation: see `kernels.door`.
    differences: whether it is they that are quantized.
    before: the input of the step before; None at the first, which is taken
      twice.
  """
  y = module.apply({'params': own}, x)
  around = layer.around
  seen = around.input(x)
  kernel = around.residual(own['kernel'])
  rounded = layer.input.fake_quant(seen)
  if differences:
    known = rounded if before is None else around.input(before)
    rounded = known + layer.input.fake_quant(seen - known)
  # A product is linear in both: what one of them alone costs is the product of
  # its own error with the other in full precision. Branch and bias, which are
  # not quantized, cancel out.
  plain = module.clone(use_bias=False)
  product = lambda kernel, x: plain.apply({'params': {'kernel': kernel}}, x)
  of_input, of_weight = product(kernel, rounded - seen), jnp.zeros(())
  if layer.weight is None:
    error = module.apply({'params': own}, rounded) - y
  else:
    weight = layer.weight.dequantize()
    of_weight = product(weight - kernel, seen)
    if differences:
      error = of_weight + product(weight, rounded - seen)
      if layer.bias is not None:  # it may be trained
        error = error + (layer.bias - own['bias'])
    else:
      error = apply_lib.run_layer(module, x, layer, implementation) - y
  return jnp.stack([jnp.sum(jnp.square(part.astype(jnp.float32)))
                    for part in (y, error, of_weight, of_input)])
