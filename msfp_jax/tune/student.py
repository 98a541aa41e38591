"""The quantized model under training: parameters -> weights -> prediction."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax import kernels as kernels_lib
from msfp_jax.kernels import apply as inference
from msfp_jax.quant import interception as layers_lib
from msfp_jax.quant import quantizers
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.quantize import apply
from msfp_jax.quant.quantize import check_layers
from msfp_jax.tune import talora

FULL_WEIGHTS = 'full'
DEQUANTIZED_WEIGHTS = 'dequantized'


@dataclasses.dataclass(frozen=True)
class Student:
  """A model, its QuantSpec, and what of it is trained.

  Attributes:
    model: the full-precision linen model, model(x, t, *condition).
    params: its parameters.
    spec: the quantizers found by calibration.
    router: chooses among banks; None where there is one bank.
    banked: names of the layers that have banks, in the router's order.
    temperature: of the router's softmax.
    base: what the banks are added to: 'full' is W, 'dequantized' is Q_w(W).
  """

  model: nn.Module
  params: Any
  spec: spec_lib.QuantSpec
  router: talora.Router | None
  banked: tuple[str, ...]
  temperature: float = 1.0
  base: str = FULL_WEIGHTS

  def __post_init__(self):
    if self.base not in (FULL_WEIGHTS, DEQUANTIZED_WEIGHTS):
      raise ValueError(f'base weight {self.base!r}: must be {FULL_WEIGHTS!r} '
                       f'or {DEQUANTIZED_WEIGHTS!r}')

  @property
  def base_kernels(self) -> dict[str, jax.Array]:
    """{layer: the kernel that its banks are added to}."""
    kernels = layers_lib.leaves(self.params, 'kernel')
    if self.base == DEQUANTIZED_WEIGHTS:
      for name in self.banked:
        kernels[name] = self.spec.layers[name].weight.fake_quant(kernels[name])
    return kernels

  def init(self, key: jax.Array, num_banks: int, rank: int,
           learn_act_ranges: bool, learn_weight_scales: bool,
           learn_biases: bool) -> Any:
    """Trainable parameters that leave the calibrated model as it is.

    Returns:
      {'banks', 'router', 'ranges', 'biases'}: see `talora.init_banks`,
      `talora.Router`, `with_ranges`; biases are offsets {layer: `[out]`}.
    """
    kernels = layers_lib.leaves(self.params, 'kernel')
    banks = talora.init_banks(
        jax.random.fold_in(key, 0), {name: kernels[name]
                                     for name in self.banked}, num_banks, rank)
    router = {}
    if self.router is not None:
      router = self.router.init(
          jax.random.fold_in(key, 1), jnp.zeros(()))['params']
    ranges = {'act': {}, 'weight': {}}
    for name, layer in self.spec.layers.items():
      if learn_act_ranges and layer.act is not None:
        ranges['act'][name] = _offsets(layer.act)
      if learn_weight_scales and name in self.banked and layer.weight:
        ranges['weight'][name] = _offsets(layer.weight)
    biases = {}
    if learn_biases:
      biases = jax.tree.map(jnp.zeros_like, layers_lib.leaves(
          self.params, 'bias', self.spec.layers))
    return {'banks': banks, 'router': router, 'ranges': ranges,
            'biases': biases}

  def predict(self, trainable: Any, x: jax.Array, t: jax.Array,
              *condition: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The quantized prediction at one timestep, differentiable.

    Args:
      trainable: what `init` returned, trained.
      x: `[B, H, W, C]`.
      t: scalar, of the whole batch.
      *condition: what else the model takes.

    Returns:
      eps like x, and the chosen banks, int32 `[len(banked)]`.
    """
    if self.router is None:
      gates = jnp.ones((len(self.banked), 1))
    else:
      logits = self.router.apply({'params': trainable['router']}, t)
      gates = talora.select(logits, self.temperature)
    spec = with_ranges(self.spec, trainable['ranges'])
    updates = talora.bank_updates(
        trainable['banks'], dict(zip(self.banked, gates, strict=True)))
    kernels = self.base_kernels
    kernels |= talora.merge(kernels, updates)
    weights = {name: kernel if spec.layers[name].weight is None
               else spec.layers[name].weight.fake_quant(kernel)
               for name, kernel in kernels.items()}
    params = layers_lib.replace(
        self._biased(trainable['biases']), 'kernel', weights)
    eps = apply(self.model, params, spec.act_quantizers, x,
                jnp.full(x.shape[:1], t), *condition)
    return eps, jnp.argmax(gates, axis=-1)

  def deploy(self, trainable: Any, timesteps: np.ndarray) -> 'Deployed':
    """Merges and quantizes every bank and resolves the router's choices.

    Args:
      trainable: what `init` returned, trained.
      timesteps: of the sampler `[S]`.
    """
    spec = with_ranges(self.spec, trainable['ranges'])
    check_layers(spec, layers_lib.leaves(self.params, 'kernel'))
    kernels = self.base_kernels
    sets = talora.merge(kernels, talora.bank_updates(trainable['banks']))
    weights = {}
    for name, layer in spec.layers.items():
      kernel = sets.get(name, kernels[name][None])
      weights[name] = (kernel if layer.weight is None
                       else layer.weight.fake_quant(kernel))
    return Deployed(self.model, self._biased(trainable['biases']), spec,
                    weights, self.choices(trainable, timesteps))

  def choices(self, trainable: Any, timesteps: np.ndarray
              ) -> dict[str, jax.Array]:
    """{layer: the bank of every step, int32 `[S]`} of the layers with banks.

    Args:
      trainable: what `init` returned, trained.
      timesteps: of the sampler `[S]`.
    """
    choices = jnp.zeros((len(timesteps), len(self.banked)), jnp.int32)
    if self.router is not None:
      choices = talora.plan_choices(
          self.router, trainable['router'], timesteps)
    return dict(zip(self.banked, choices.T, strict=True))

  def _biased(self, offsets: Mapping[str, jax.Array]) -> Any:
    """The parameters with offsets added to the biases."""
    biases = layers_lib.leaves(self.params, 'bias', offsets)
    return layers_lib.replace(self.params, 'bias', {
        name: bias + offsets[name] for name, bias in biases.items()})


@dataclasses.dataclass(frozen=True)
class Deployed:
  """A quantized model ready to sample.

  Attributes:
    model: the linen model.
    params: its parameters; the kernels in them are not used.
    spec: the final quantizers.
    weights: {layer: `[h, ...]`} merged and quantized; h is 1 without banks.
    choices: {layer: int `[S]`} the bank of every step of the plan.
  """

  model: nn.Module
  params: Any
  spec: spec_lib.QuantSpec
  weights: dict[str, jax.Array]
  choices: dict[str, jax.Array]

  @property
  def arrays(self) -> Any:
    """What a jitted sampler takes as an argument."""
    return self.params, self.weights

  def with_arrays(self, arrays: Any) -> 'Deployed':
    """The model with other `arrays`."""
    params, weights = arrays
    return dataclasses.replace(self, params=params, weights=weights)

  def layers(self) -> dict[str, kernels_lib.PackedLayer]:
    """{layer: as kernels take it, not packed, `[h, ...]`} where quantized."""
    biases = layers_lib.leaves(self.params, 'bias')
    return {
        name: kernels_lib.make_layer(
            self.weights[name], layer.weight, layer.act, biases.get(name),
            banked=True)
        for name, layer in self.spec.layers.items() if layer.weight is not None}

  def eps_fn(self, x: jax.Array, t: jax.Array, index: jax.Array,
             *condition: jax.Array) -> jax.Array:
    """Predicts the noise at a position of the plan; a sampler's NoiseFn.

    A simulation in float32, of the products that packed layers make.
    """
    quantized = {
        name: layer.bank(self.choices[name][index] if name in self.choices
                         else 0) for name, layer in self.layers().items()}
    rest = {name: w[0] for name, w in self.weights.items()
            if name not in quantized}
    return inference.apply(
        self.model, layers_lib.replace(self.params, 'kernel', rest), quantized,
        {name: self.spec.layers[name].act for name in rest}, x, t, *condition)


def calibrated(model: nn.Module, params: Any, spec: spec_lib.QuantSpec,
               timesteps: np.ndarray) -> Deployed:
  """A calibrated model as it is, without banks; see `Student.deploy`."""
  return Student(model, params, spec, None, ()).deploy(
      {'banks': {}, 'ranges': {'act': {}, 'weight': {}}, 'biases': {}},
      timesteps)


def _offsets(quantizer: quantizers.Quantizer) -> dict[str, jax.Array]:
  zeros = {'log_scale': jnp.zeros_like(quantizer.scale)}
  if quantizer.zero_point is not None:
    zeros['zero_point'] = jnp.zeros_like(quantizer.zero_point)
  return zeros


def _shifted(quantizer: quantizers.Quantizer,
             offsets: Mapping[str, jax.Array]) -> quantizers.Quantizer:
  """Scale times exp(log_scale); zero point plus offset, in units of scale."""
  scale = quantizer.scale * jnp.exp(offsets['log_scale'])
  zero_point = quantizer.zero_point
  if zero_point is not None:
    scale = quantizers.snap_scale(scale)
    zero_point = zero_point + quantizer.scale * offsets['zero_point']
  return dataclasses.replace(quantizer, scale=scale, zero_point=zero_point)


def with_ranges(spec: spec_lib.QuantSpec, ranges: Any) -> spec_lib.QuantSpec:
  """The spec with its quantizers moved by learned ranges (see Student.init).

  Offsets of zero give the spec's quantizers, bit for bit.
  """
  layers = {}
  for name, layer in spec.layers.items():
    changes = {
        role: _shifted(getattr(layer, role), ranges[role][name])
        for role in ('act', 'weight') if name in ranges[role]}
    layers[name] = dataclasses.replace(layer, **changes)
  return dataclasses.replace(spec, layers=layers)
