"""A fine-tuned model on packed weights, ready to sample."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax import diffusion
from msfp_jax import kernels
from msfp_jax.kernels import apply as inference
from msfp_jax.quant import quantizers
from msfp_jax.tune import student as student_lib


@dataclasses.dataclass(frozen=True)
class PackedModel:
  """A quantized model that holds no full-precision copy of packed weights.

  Attributes:
    model: the linen model.
    params: what is not packed of its parameters: normalizations, embeddings,
      layers left in full precision.
    layers: {layer: packed, with a first axis of h banks}.
    act_quantizers: of the layers that are not packed; None for full precision.
    choices: {layer: int32 `[S]`} the bank of every step, where there are
      several.
    plan: the sampler whose steps these are.
    implementation: of `kernels`; None picks for every layer.
  """

  model: nn.Module
  params: Any
  layers: dict[str, kernels.PackedLayer]
  act_quantizers: dict[str, quantizers.Quantizer | None]
  choices: dict[str, jax.Array]
  plan: diffusion.SamplerPlan
  implementation: str | None = None

  @property
  def arrays(self) -> Any:
    """What a jitted sampler takes as an argument."""
    return self.params, self.layers

  def with_arrays(self, arrays: Any) -> 'PackedModel':
    """The model with other `arrays`."""
    params, layers = arrays
    return dataclasses.replace(self, params=params, layers=layers)

  def with_implementation(self, implementation: str | None) -> 'PackedModel':
    """The model prepared to run by one implementation (see `kernels.ops`).

    Raises:
      ValueError: there is no such implementation.
    """
    known = (None, *kernels.IMPLEMENTATIONS)
    if implementation not in known:
      raise ValueError(
          f'implementation {implementation!r}: must be one of {known}')
    layers = {name: kernels.prepare(layer, implementation)
              for name, layer in self.layers.items()}
    return dataclasses.replace(
        self, layers=layers, implementation=implementation)

  def eps_fn(self, x: jax.Array, t: jax.Array, index: jax.Array,
             *condition: jax.Array) -> jax.Array:
    """Predicts the noise at a position of the plan; a sampler's NoiseFn."""
    layers = {
        name: jax.tree.map(jnp.asarray, layer).bank(
            jnp.asarray(self.choices[name])[index] if name in self.choices
            else 0) for name, layer in self.layers.items()}
    return inference.apply(
        self.model, self.params, layers, self.act_quantizers, x, t, *condition,
        implementation=self.implementation)

  def sample(self, noise: jax.Array, *condition: jax.Array,
             key: jax.Array | None = None) -> jax.Array:
    """Samples by the model's plan; compiled at the first call for a shape.

    Args:
      noise: `[B, H, W, C]`.
      *condition: what else the model takes, such as labels `[B]`.
      key: for samplers that add noise.

    Returns:
      Samples like noise, nominally in [-1, 1].
    """
    return self._draw(self.arrays, noise, condition, key)

  @functools.cached_property
  def _draw(self) -> Callable[..., jax.Array]:
    # Weights are arguments: constants would be folded at compile time.
    return jax.jit(lambda arrays, noise, condition, key: diffusion.sample(
        lambda x, t, index: self.with_arrays(arrays).eps_fn(
            x, t, index, *condition), self.plan, noise, key),
                   compiler_options=kernels.compiler_options())

  @property
  def memory_bytes(self) -> int:
    """Bytes of all arrays that the model holds."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self.arrays))

  @property
  def stored_bytes(self) -> int:
    """Bytes of what a file has to hold, without names."""
    bare = {name: layer.replace(tap_sums=None)
            for name, layer in self.layers.items()}
    return sum(leaf.nbytes for leaf in jax.tree.leaves((self.params, bare)))


def pack(deployed: student_lib.Deployed, plan: diffusion.SamplerPlan
         ) -> PackedModel:
  """The model with its weights as codes.

  Args:
    deployed: what `Student.deploy` or `rows.untuned` returned.
    plan: the sampler that it was deployed for.

  Raises:
    ValueError: weights that are NaN, or scales that kernels do not take; names
      the layer.
  """
  layers = {}
  for name, layer in deployed.layers().items():
    try:
      layers[name] = kernels.pack(layer)
    except ValueError as error:
      raise ValueError(f'layer {name}: {error}') from error
  rest = {name: w[0] for name, w in deployed.weights.items()
          if name not in layers}
  params = {
      path: np.asarray(rest.get('.'.join(path[:-1]), value)
                       if path[-1] == 'kernel' else value)
      for path, value in traverse_util.flatten_dict(deployed.params).items()
      if '.'.join(path[:-1]) not in layers}
  choices = {name: np.asarray(banks, np.int32)
             for name, banks in deployed.choices.items()
             if len(deployed.weights[name]) > 1}
  return PackedModel(
      deployed.model, traverse_util.unflatten_dict(params), layers,
      {name: deployed.spec.layers[name].act for name in rest}, choices, plan
  ).with_implementation(None)
