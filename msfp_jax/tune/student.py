"""The quantized model under training: parameters -> weights -> prediction."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.diffusion import sampling
from msfp_jax.kernels import differences
from msfp_jax.kernels.apply import apply
from msfp_jax.quant import interception
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.around import Around
from msfp_jax.quant.qlayer import Latent
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.quantize import check_layers
from msfp_jax.quant.quantize import make_layer
from msfp_jax.quant.quantizers import Quantizer
from msfp_jax.tune import talora

# A prediction at timestep t, with W of one layer and its banks A_i B_i:
#
#   t --> router --> scores of h banks --> one-hot r
#                                            |
#   W (or Q_w(W)) + sum_i r_i A_i B_i  <-----+
#        |
#        v
#   Latent(kernel, quantizer) --> kernels.run --> eps --> loss
#        ^
#        ranges: learned offsets of scales and zero points
#
# `quantized` does the same for each bank by itself, and `choices` asks the
# router beforehand: what is deployed computes what was trained.
FULL_WEIGHTS = 'full'
DEQUANTIZED_WEIGHTS = 'dequantized'
BASES = (FULL_WEIGHTS, DEQUANTIZED_WEIGHTS)


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
    dtype: 'float32'; or 'bfloat16', in which accelerators multiply faster:
      what passes from layer to layer and what is multiplied, forward and
      backward. What is trained and quantized is float32 all the same; levels
      are exact in both, and their products summed in float32. Sums on the way
      back, and of layers in full precision, are rounded to bfloat16. Of
      differences, which add up to what is no level, products are in float32.
  """

  model: nn.Module
  params: Any
  spec: spec_lib.QuantSpec
  router: talora.Router | None
  banked: tuple[str, ...]
  temperature: float = 1.0
  base: str = FULL_WEIGHTS
  dtype: str = 'float32'

  def __post_init__(self):
    if self.base not in BASES:
      raise ValueError(f'base weight {self.base!r}: must be {FULL_WEIGHTS!r} '
                       f'or {DEQUANTIZED_WEIGHTS!r}')

  @property
  def arrays(self) -> Any:
    """Its large arrays, as one pytree: an argument of jitted functions."""
    return self.params, {
        name: layer.rounded.weight for name, layer in self.spec.layers.items()
        if layer.rounded is not None}

  def with_arrays(self, arrays: Any) -> 'Student':
    """The student with other `arrays`."""
    params, weights = arrays
    layers = {name: layer if layer.rounded is None else dataclasses.replace(
        layer, rounded=dataclasses.replace(layer.rounded, weight=weights[name]))
              for name, layer in self.spec.layers.items()}
    return dataclasses.replace(
        self, params=params,
        spec=dataclasses.replace(self.spec, layers=layers))

  @property
  def base_kernels(self) -> dict[str, jax.Array]:
    """{layer: the kernel that its banks are added to}, without its branch."""
    kernels = interception.leaves(self.params, 'kernel')
    for name, layer in self.spec.layers.items():
      if layer.around is not None:
        # First: banks and quantizers both work on what the product sees.
        kernels[name] = layer.around.residual(kernels[name])
      if layer.rounded is not None:
        # From the levels that calibration chose: W itself would be rounded to
        # the nearest, whatever `base` says.
        kernels[name] = layer.rounded.dequantize()
      elif name in self.banked and self.base == DEQUANTIZED_WEIGHTS:
        kernels[name] = layer.weight.fake_quant(kernels[name], axis=-2)
    return kernels

  def init(self, key: jax.Array, num_banks: int, rank: int,
           learn_act_ranges: bool, learn_weight_scales: bool,
           learn_biases: bool) -> Any:
    """Trainable parameters that leave the calibrated model as it is.

    Returns:
      {'banks', 'router', 'ranges', 'biases'}: see `talora.init_banks`,
      `talora.Router`, `with_ranges`; biases are offsets {layer: `[out]`}.
    """
    kernels = interception.leaves(self.params, 'kernel')
    # Banks and router from keys of their own: with one bank there is no router,
    # and the banks start all the same.
    banks = talora.init_banks(
        jax.random.fold_in(key, 0), {name: kernels[name]
                                     for name in self.banked}, num_banks, rank)
    router = {}
    if self.router is not None:
      router = self.router.init(
          jax.random.fold_in(key, 1), jnp.zeros(()))['params']
    ranges = {'act': {}, 'weight': {}}
    for name, layer in self.spec.layers.items():
      # Quantizers without offsets (those that follow the data) have nothing to
      # learn.
      if learn_act_ranges and (offsets := layer.act.offsets()):
        ranges['act'][name] = offsets
      # Without banks the weights stand still, at the scales that calibration
      # found for them.
      if learn_weight_scales and name in self.banked and (
          offsets := layer.weight.offsets()):
        ranges['weight'][name] = offsets
    biases = {}
    if learn_biases:
      biases = jax.tree.map(jnp.zeros_like, interception.leaves(
          self.params, 'bias', self.spec.layers))
    return {'banks': banks, 'router': router, 'ranges': ranges,
            'biases': biases}

  def predict(self, trainable: Any, x: jax.Array, t: jax.Array,
              *condition: jax.Array, step: Any = 0
              ) -> tuple[jax.Array, jax.Array]:
    """The quantized prediction at one timestep, differentiable.

    Args:
      trainable: what `init` returned, trained.
      x: `[B, H, W, C]`.
      t: scalar, of the whole batch.
      *condition: what else the model takes.
      step: position in the plan, for quantizers that differ by step.

    Returns:
      eps like x, and the chosen banks, int32 `[len(banked)]`.

    Raises:
      ValueError: a spec of differences, see `predict_next`.
    """
    if self.spec.differences:
      raise ValueError('a prediction depends on those before: predict_next')
    return self.predict_next(trainable, x, t, *condition, step=step)[:2]

  def predict_next(self, trainable: Any, x: jax.Array, t: jax.Array,
                   *condition: jax.Array, step: Any = 0, memory: Any = None,
                   fresh: jax.Array | None = None
                   ) -> tuple[jax.Array, jax.Array, Any]:
    """Likewise along a trajectory, where a step depends on those before.

    Args:
      trainable: as of `predict`.
      x: likewise.
      t: likewise.
      *condition: likewise.
      step: likewise.
      memory: what the step before returned; {} at the first, None of a student
        whose spec knows no differences. No gradient passes it.
      fresh: as of `differences.apply`.

    Returns:
      eps like x, the chosen banks, int32 `[len(banked)]`, and the memory.

    Raises:
      ValueError: a memory, and a spec of no differences, or the reverse.
    """
    if (memory is not None) != self.spec.differences:
      raise ValueError('a memory is for specs of differences, and these need '
                       'one: what memory() returns, or the step before did')
    if self.router is None:
      # One bank, always on: plain LoRA.
      gates = jnp.ones((len(self.banked), 1))
    else:
      logits = self.router.apply({'params': trainable['router']}, t)
      gates = talora.select(logits, self.temperature)
    spec = with_ranges(self.spec, trainable['ranges'])
    updates = talora.bank_updates(
        trainable['banks'], dict(zip(self.banked, gates, strict=True)))
    kernels = self.base_kernels
    # Before quantization, in full precision: at inference there is then no
    # branch to compute, only another set of codes.
    kernels |= talora.merge(kernels, updates)
    params = self._biased(trainable['biases'])
    # Of the layers in float32, to be added to their sums.
    biases = interception.leaves(params, 'bias')
    layers = {}
    for name, layer in spec.layers.items():
      # All layers, those in full precision too: gradients flow by one path.
      latent = Latent(kernels[name], self._quantizer(name, layer))
      made = QLayer(latent, layer.act, biases.get(name),
                    layer.around or Around())
      layers[name] = made.at(step)
    params, x_in, condition = self._cast((params, x, condition))
    inputs = x_in, jnp.full(x.shape[:1], t), *condition
    if memory is None:
      eps = apply(self.model, params, layers, *inputs, dtype=self._other_dtype)
    else:
      eps, memory = differences.apply(
          self.model, params, layers, memory, *inputs, fresh=fresh,
          dtype=self._other_dtype)
    return eps.astype(x.dtype), jnp.argmax(gates, axis=-1), memory

  def memory(self, x: jax.Array) -> Any:
    """What `predict_next` remembers before the first step: zeros.

    Args:
      x: `[B, H, W, C]`; its shape counts.

    Returns:
      A pytree of float32 arrays; None without differences.
    """
    if not self.spec.differences:
      return None
    alone, nothing = untrained(self.model, self.params, self.spec)
    condition = [part.abstract(len(x)) for part in getattr(
        self.model, 'conditions', ())]
    return sampling.no_memory(
        lambda x, t, index, memory, *condition: alone.predict_next(
            nothing, x, t[0], *condition, step=index, memory=memory)[::2],
        x, *condition)

  def teach(self, x: jax.Array, t: jax.Array, *condition: jax.Array
            ) -> jax.Array:
    """What the full-precision model predicts; arguments as of `predict`."""
    params, x_in, condition = self._cast((self.params, x, condition))
    return self.model.apply({'params': params}, x_in, jnp.full(
        x.shape[:1], t), *condition).astype(x.dtype)

  @property
  def _other_dtype(self) -> str | None:
    """Of the computation; None: the model's own."""
    return None if self.dtype == 'float32' else self.dtype

  def _cast(self, tree: Any) -> Any:
    """Numbers in the dtype of the computation; labels as they are."""
    if self._other_dtype is None:
      return tree
    return jax.tree.map(
        lambda v: v.astype(self.dtype)
        if jnp.issubdtype(v.dtype, jnp.floating) else v, tree)

  def quantized(self, trainable: Any) -> tuple[Any, dict[str, QLayer]]:
    """Parameters, and layers with every bank merged and quantized.

    Args:
      trainable: what `init` returned, trained.

    Returns:
      The parameters with trained biases, their kernels as they were; and
      {layer: h sets of weights, one where the layer has no banks}.
    """
    spec = with_ranges(self.spec, trainable['ranges'])
    # Before minutes of quantizing, and with the names in question.
    check_layers(spec, interception.leaves(self.params, 'kernel'))
    kernels = self.base_kernels
    sets = talora.merge(kernels, talora.bank_updates(trainable['banks']))
    params = self._biased(trainable['biases'])
    biases = interception.leaves(params, 'bias')
    layers = {}
    for name, layer in spec.layers.items():
      weight = None
      if name not in sets and layer.rounded is not None:
        weight = jax.tree.map(jnp.asarray, layer.rounded.weight.unpacked())
      elif not layer.weight.is_full:
        weight = self._quantizer(name, layer).quantize_banks(
            sets.get(name, kernels[name][None]))
      layers[name] = make_layer(weight, layer, biases.get(name))
    return params, layers

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

  def _quantizer(self, name: str, layer: spec_lib.LayerSpec) -> Quantizer:
    """A layer's quantizer of weights; `layer` has its ranges as learned."""
    rounded = self.spec.layers[name].rounded
    return layer.weight if rounded is None else rounded.quantizer(layer.weight)

  def _biased(self, offsets: Mapping[str, jax.Array]) -> Any:
    """The parameters with offsets added to the biases."""
    biases = interception.leaves(self.params, 'bias', offsets)
    return interception.replace(self.params, 'bias', {
        name: bias + offsets[name] for name, bias in biases.items()})


def untrained(model: nn.Module, params: Any, spec: spec_lib.QuantSpec
              ) -> tuple[Student, Any]:
  """A student without banks or ranges, and what is trained of it: nothing."""
  return Student(model, params, spec, None, ()), {
      'banks': {}, 'router': {}, 'ranges': {'act': {}, 'weight': {}},
      'biases': {}}


def with_ranges(spec: spec_lib.QuantSpec, ranges: Any) -> spec_lib.QuantSpec:
  """The spec with its quantizers moved by learned ranges (see Student.init).

  Offsets of zero give the spec's quantizers, bit for bit.
  """
  layers = {}
  for name, layer in spec.layers.items():
    changes = {
        side: getattr(layer, side).moved(ranges[side][name])
        for side in ('act', 'weight') if name in ranges[side]}
    if 'weight' in changes:
      # Rounded by the scales of before.
      changes['rounded'] = None
    layers[name] = dataclasses.replace(layer, **changes)
  return dataclasses.replace(spec, layers=layers)
