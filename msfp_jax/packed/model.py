"""PackedModel: a quantized model and its sampler, ready to sample."""

from collections.abc import Callable, Iterable
import dataclasses
import functools
import math
from typing import Any

from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax import diffusion
from msfp_jax import kernels
from msfp_jax.base import arguments
from msfp_jax.convert.lora import Lora
from msfp_jax.diffusion import sampling
from msfp_jax.kernels import differences
from msfp_jax.kernels import offload
from msfp_jax.kernels.apply import apply
from msfp_jax.models import prediction
from msfp_jax.packed import loras as loras_lib
from msfp_jax.packed import placing
from msfp_jax.quant import batches
from msfp_jax.quant import interception
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.tune import student as student_lib


@dataclasses.dataclass(frozen=True)
class PackedModel:
  """A quantized model that holds no full-precision copy of its weights.

  Its weights are packed codes; or, before `packed`, float32 levels: the
  simulation, which computes the same.

  Attributes:
    model: the linen model.
    params: what is not in `layers` of its parameters: normalizations,
      embeddings, layers left in full precision.
    layers: {layer: with a first axis of h banks}, for every layer.
    choices: {layer: int32 `[S]`} the bank of every step, where there are
      several.
    plan: the sampler whose steps these are.
    implementation: of `kernels.run`; None picks for every layer.
    differences: whether inputs are quantized as what they differ by from the
      step before, see `kernels.differences`.
    drift: float32 `[S, C]`, subtracted from the prediction of every step, see
      `packed.drift`; or None.
  """

  # Why a simulation is no class of its own: all that it differs in is how
  # `layers[...].weight` is stored. It runs the same product, sampler and count
  # of bytes, so that what a table says of it holds for the file that is made of
  # it.
  #
  #   simulate --> float32 levels --packed()--> codes --save--> file
  #                `eps_fn`                     `eps_fn`
  model: nn.Module
  params: Any
  layers: dict[str, QLayer]
  choices: dict[str, jax.Array]
  plan: diffusion.SamplerPlan
  implementation: str | None = None
  differences: bool = False
  drift: np.ndarray | None = None

  def __post_init__(self):
    if self.drift is not None and (
        np.ndim(self.drift) != 2 or len(self.drift) != self.plan.num_steps):
      raise ValueError(
          f'a drift of shape {np.shape(self.drift)}: it must be [S, C], and '
          f'the plan has {self.plan.num_steps} steps; measure it with this plan'
      )
    spec_lib.check_steps({name: layer.input for name, layer
                          in self.layers.items()}, self.plan.num_steps)
    if self.differences and (several := [
        name for name, layer in self.layers.items() if layer.num_banks > 1]):
      raise ValueError(f'layers {several} have several sets of weights, and '
                       + spec_lib.ONE_BANK)

  @property
  def arrays(self) -> Any:
    """All arrays, as one pytree: the argument of jitted samplers."""
    return self.params, self.layers

  def with_arrays(self, arrays: Any) -> 'PackedModel':
    """The model with other `arrays`."""
    params, layers = arrays
    return dataclasses.replace(self, params=params, layers=layers)

  def with_implementation(self, implementation: str | None) -> 'PackedModel':
    """The model prepared to run by one implementation (see `kernels.door`).

    Raises:
      ValueError: there is no such implementation.
    """
    placing.check_implementation(implementation)
    layers = {name: offload.like(kernels.prepare(layer, implementation), layer)
              for name, layer in self.layers.items()}
    return dataclasses.replace(
        self, layers=layers, implementation=implementation)

  def offloaded(self) -> 'PackedModel':
    """The model with its weights in the host's memory, as `load` can have it.

    Raises:
      ValueError: the device does not read the host's memory.
    """
    memory = offload.host()
    layers = {name: offload.to_host(layer, memory)
              for name, layer in self.layers.items()}
    return dataclasses.replace(
        self, layers=layers, params=jax.device_put(self.params))

  def packed(self) -> 'PackedModel':
    """The model with its weights as codes; a packed one stays as it is.

    Raises:
      ValueError: weights that are NaN; names the layer.
    """
    layers = {}
    for name, layer in self.layers.items():
      layers[name] = as_codes(name, layer)
    host = dataclasses.replace(
        self, layers=layers, params=jax.tree.map(np.asarray, self.params))
    # Codes in hand, an implementation can find out what it needs once a model.
    return host.with_implementation(self.implementation)

  def with_loras(self, loras: Iterable[tuple[Lora, Any]]) -> 'PackedModel':
    """The model with these LoRAs, and no others, beside its weights.

    Weights stay as they are, packed or not: LoRAs come, change and go without
    packing anew, and `with_loras([])` is the model without. Where models differ
    in strengths alone they share what was compiled; one of strength 0 is as if
    it were not there, bit for bit.

    Args:
      loras: (what `load_lora` returned for `model`, its strength), as many as
        wanted. 1 is the strength that a LoRA was trained with; it may be
        negative, and traced.

    Raises:
      ValueError: a LoRA of another model, or a strength that is no number.
      TypeError: other things than LoRAs.
    """
    adapters = loras_lib.adapters(loras, self.layers, self.params)
    if any(isinstance(leaf, jax.Array)
           for leaf in jax.tree.leaves(self.arrays)):
      # Where the model is: else every call of `sample` would bring them.
      adapters = jax.device_put(adapters)
    other = dataclasses.replace(self, layers={
        name: layer.replace(adapter=adapters.get(name))
        for name, layer in self.layers.items()})
    # Past the fields, which are frozen: it is where cached_property looks. All
    # that differs are arrays, which are arguments of the compiled sampler.
    other.__dict__['_draw'] = self._draw
    return other

  def layer_at(self, name: str, index: Any) -> QLayer:
    """A layer at a position of the plan, traced or not: with one bank."""
    return self._at(name, offload.fetch(self.layers[name]), index)

  def _at(self, name, layer, index):
    bank = (jnp.asarray(self.choices[name])[index]
            if name in self.choices else 0)
    # As JAX arrays, for NumPy's cannot be indexed by a traced index.
    return jax.device_put(layer).at(index, bank)

  def eps_fn(self, x: jax.Array, t: jax.Array, index: jax.Array,
             *condition: jax.Array) -> jax.Array:
    """Predicts the noise at a position of the plan; a sampler's NoiseFn.

    Raises:
      ValueError: with `differences`, where a prediction depends on those
        before; see `eps_fn_of`.
    """
    if self.differences:
      raise ValueError('inputs are quantized as what they differ by from the '
                       'step before, which a single prediction does not know: '
                       'take eps_fn_of() and memory()')
    #   position in the plan --> choices[name][index] --> bank
    #            |                                         |
    #            +------> input quantizer at(index)     weight.bank(bank)
    #                                   \               /
    #   x, t, condition --> model with these as its layers --> eps
    #
    # All banks are on the device, and a step picks by index: S steps, one
    # program.
    return self._corrected(
        apply(self.model, self.params, self.layers, x, t, *condition,
              implementation=self.implementation,
              at=lambda name, layer: self._at(name, layer, index)), index)

  def _corrected(self, eps, index):
    if self.drift is None:
      return eps
    # In float32, as it is measured: half precision would lose a small one.
    return eps - jnp.asarray(self.drift)[index]

  def eps_fn_of(self, *condition: jax.Array
                ) -> sampling.NoiseFn | sampling.RememberingFn:
    """What `diffusion.sample` takes, with `memory`, for one condition."""
    if not self.differences:
      return lambda x, t, index: self.eps_fn(x, t, index, *condition)

    def predict(x, t, index, memory):
      eps, memory = differences.apply(
          self.model, self.params, self.layers, memory, x, t, *condition,
          implementation=self.implementation,
          at=lambda name, layer: self._at(name, layer, index))
      return self._corrected(eps, index), memory

    return predict

  def memory(self, noise: jax.Array, *condition: jax.Array) -> Any:
    """What `eps_fn_of` remembers before the first step: zeros.

    Args:
      noise: `[B, H, W, C]`; its shape counts.
      *condition: likewise.

    Returns:
      A pytree of float32 arrays; None without `differences`.
    """
    if not self.differences:
      return None
    return sampling.no_memory(
        lambda x, t, index, memory, *condition: self.eps_fn_of(*condition)(
            x, t, index, memory), noise, *condition)

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
    noise = batches.check_noise(noise)
    batches.check_inputs(self.model, noise, condition)
    return self._draw(self.arrays, noise, condition, key)

  @functools.cached_property
  def _draw(self) -> Callable[..., jax.Array]:
    # Weights are arguments: constants would be folded at compile time.
    def draw(arrays, noise, condition, key):
      model = self.with_arrays(arrays)
      return diffusion.sample(
          model.eps_fn_of(*condition), self.plan, noise, key,
          model.memory(noise, *condition))

    return jax.jit(draw, compiler_options=kernels.compiler_options())

  @property
  def memory_bytes(self) -> int:
    """Bytes of all arrays that the model holds."""
    return sum(leaf.nbytes
               for leaf in jax.tree.leaves((self.arrays, self.drift)))

  @property
  def stored_bytes(self) -> int:
    """Bytes of what a file has to hold, without names: tables' `bytes`.

    A model that is not packed has the size that it would have.
    """
    # Whole bytes once for all layers, not one by one.
    bits = sum(layer.nbits for layer in self.layers.values())
    return math.ceil(bits / 8) + sum(
        leaf.nbytes for leaf in jax.tree.leaves((self.params, self.drift)))


def as_codes(name: str, layer: QLayer) -> QLayer:
  """A layer with its weights as codes, in NumPy; one without stays as it is.

  Raises:
    ValueError: weights that are NaN; names the layer.
  """
  try:
    # In NumPy: on a device, codes would take memory before anything is sampled.
    return layer if layer.weight is None else offload.to_numpy(
        layer.replace(weight=layer.weight.packed()))
  except ValueError as error:
    raise ValueError(f'layer {name}: {error}') from error


def pack(model: nn.Module, params: Any, spec: spec_lib.QuantSpec,
         plan: diffusion.SamplerPlan) -> PackedModel:
  """A calibrated model, its weights as codes; `msfp.save` makes it a file.

  Args:
    model: the full-precision linen model.
    params: its parameters.
    spec: of `calibrate`.
    plan: the sampler.

  Raises:
    ValueError: a spec of another model, parameters that are NaN, or a plan
      beyond the schedule of a model that predicts v or x_0.
  """
  return simulate(model, params, spec, plan).packed()


def simulate(model: nn.Module, params: Any, spec: spec_lib.QuantSpec,
             plan: diffusion.SamplerPlan) -> PackedModel:
  """Simulates what `pack` makes: levels in float32 in place of codes."""
  arguments.check_type('spec', spec, spec_lib.QuantSpec, 'msfp.calibrate(...)')
  diffusion.check_plan(plan)
  params = interception.parameters(params)
  interception.check_finite(interception.leaves(params, 'kernel'))
  interception.check_others(params)
  prediction.check_plan(model, plan)
  return deploy(*student_lib.untrained(model, params, spec), plan)


def full_precision(model: nn.Module, params: Any, plan: diffusion.SamplerPlan
                   ) -> PackedModel:
  """The model as it is, to sample in the same way."""
  names = interception.leaves(interception.parameters(params), 'kernel')
  # A spec whose every quantizer is Full: no second way to sample.
  nothing = spec_lib.LayerSpec('', '')
  return simulate(model, params, spec_lib.QuantSpec(
      'fp', dict.fromkeys(names, nothing)), plan)


def deploy(student: student_lib.Student, trainable: Any,
           plan: diffusion.SamplerPlan) -> PackedModel:
  """A student as it was trained: banks merged, the router's choices a table.

  Args:
    student: what was trained.
    trainable: what `Student.init` returned, trained.
    plan: the sampler.
  """
  params, layers = student.quantized(trainable)
  own = {name for name, layer in layers.items() if layer.weight is not None}
  # The layers hold kernels and biases; kept here as well, a packed model would
  # hold its full-precision weights.
  rest = {path: value for path, value
          in traverse_util.flatten_dict(params).items()
          if '.'.join(path[:-1]) not in own}
  # The router is asked now, once for every step: it has no part in inference.
  choices = {
      name: np.asarray(banks, np.int32) for name, banks
      in student.choices(trainable, plan.timesteps).items()
      if layers[name].num_banks > 1}
  return PackedModel(student.model, traverse_util.unflatten_dict(rest), layers,
                     choices, plan, differences=student.spec.differences)
