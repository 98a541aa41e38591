"""Calibration: finds every layer's quantizers by a recipe -> QuantSpec."""

from collections.abc import Iterable, Mapping
import concurrent.futures
import dataclasses
import functools
import os
from typing import Any

from absl import logging
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl

from msfp_jax import diffusion
from msfp_jax.base import arguments
from msfp_jax.base import progress as progress_lib
from msfp_jax.quant import around as around_lib
from msfp_jax.quant import batches as batches_lib
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import gptq
from msfp_jax.quant import interception
from msfp_jax.quant import observe
from msfp_jax.quant import recipes
from msfp_jax.quant import rounded as rounded_lib
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant import widths as widths_lib
from msfp_jax.quant.fit import Seen
from msfp_jax.quant.quantizers import FULL_BITS

# Minima that SiLU (-0.278465) and GELU (-0.17) never pass, and with room for
# rounding in float32.
_SILU_MINIMUM, _LOWEST = -0.278465, -0.2786
# "Maximum well above |minimum|".
_ASYMMETRY = 1.5


def is_aal(minimum: float, maximum: float, dtype: Any = np.float32) -> bool:
  """Whether an activation with these extremes follows SiLU or the like.

  An anomalous activation layer's input has a negative tail that ends at
  -0.2785 and a positive one that does not (arXiv 2505.21591, section 3).

  Args:
    minimum: of all values.
    maximum: likewise.
    dtype: in which they were computed: SiLU ends at -0.2793 in bfloat16.
  """
  # Sigmoid and product are rounded, by half an eps each.
  room = 1 + float(jnp.finfo(dtype).eps)
  return (min(_LOWEST, _SILU_MINIMUM * room) <= minimum <= 0
          and maximum > _ASYMMETRY * abs(minimum))


def calibrate(model: nn.Module, params: Any, *, recipe: str = 'msfp',
              bits: int = 4, act_bits: int | None = None,
              batches: Iterable[observe.Batch] | None = None,
              plan: diffusion.SamplerPlan | None = None,
              exceptions: str | Mapping[str, int] | None = None,
              roles: Mapping[str, str] | None = None,
              activations: Mapping[str, Seen] | None = None,
              key: jax.Array | None = None) -> spec_lib.QuantSpec:
  """Finds a quantizer for every Conv and Dense of a model.

  A recipe whose fits need to see nothing takes no batches, and the model does
  not run. (One that is not of this package is then refused, if it must be,
  when it first runs.)

  Args:
    model: predicts the noise, model(x, t, *condition).
    params: its parameters, finite.
    recipe: a name that `recipes.get` knows, such as 'msfp', 'signed_fp',
      'int', 'msfp+gptq'.
    bits: of the weights; 3 to 8, or 32 for full precision.
    act_bits: of the activations; the weights' by default.
    batches: starting noise, arrays `[B, H, W, C]`; or tuples (see
      `observe.collect`).
    plan: the sampler whose whole trajectory is followed.
    exceptions: roles with other bits than the rest: a name in
      `roles.EXCEPTIONS` or a dict; 'ends-8' by default, none with own `roles`.
      They do not reach what `bits` leaves in full precision.
    roles: {role: pattern of layer names}, for models other than our UNet.
    activations: what `observe.collect` returned, in place of batches, plan and
      key.
    key: of the random sample; key 0 by default.

  Raises:
    ValueError: an unknown name, a layer that no rule covers, NaN in the
      parameters or activations, or activations beside what they stand for.
    TypeError: a model or a plan that is none.
  """
  # The flow; `_look` runs the model for all layers at once, the rest is by
  # layer:
  #
  #   batches --> observe.collect --> seen --> AAL or NAL? --+
  #               (the sampler runs,   |                     | which fit
  #               inputs are noted)    v                     v
  #                                around --> its input --> act quantizer
  #                                  ^  |
  #   kernel ------------------------+  +---> residual --> weight quantizer
  #                                              |                |
  #                          (an option) GPTQ <--+----------------+
  #
  # What can be refused is refused first: the sampler may run for minutes.
  of = recipes.get(recipe)
  act_bits = bits if act_bits is None else act_bits
  widths_of = widths_lib.layer_widths(bits, act_bits, exceptions, roles)
  arguments.check_type('model', model, nn.Module, 'a linen module class')
  if activations is not None and (beside := [
      name for name, value in (('batches', batches), ('plan', plan),
                               ('key', key)) if value is not None]):
    raise ValueError(f'{" and ".join(beside)} beside activations, which are '
                     'what was seen already: pass one or the other')
  if plan is not None:
    diffusion.check_plan(plan)
  params = interception.parameters(params)
  # On the host once, where the searches read them from several threads.
  kernels = jax.device_get(interception.leaves(params, 'kernel'))
  interception.check_finite(kernels)
  interception.check_others(params)
  if activations is None:
    activations = _look(
        model, params, of, (bits, act_bits), batches, plan, kernels, key)
  if odd := set(activations) ^ set(kernels):
    raise ValueError(f'activations do not fit the parameters: {sorted(odd)} '
                     'are in one of them only; collect on this model')
  _check_seen(of, (bits, act_bits), activations)

  def fit_one(name: str) -> spec_lib.LayerSpec:
    role, *widths = widths_of(name)
    try:
      return fit_layer(of, role, activations[name], kernels[name], *widths)
    except ValueError as error:
      raise ValueError(f'layer {name}: {error}') from error

  # One search uses one core; threads also compile side by side. Products in
  # NumPy would take all cores for each of them, and then wait for each other;
  # sums over one core's parts are also the same on any number of cores.
  layers = {}
  progress = progress_lib.Progress(
      f'search {recipe}, layers', len(activations), unit='layers',
      compiles=True)
  with (threadpoolctl.threadpool_limits(1, 'blas'),
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool):
    for name, layer in zip(
        activations, pool.map(fit_one, activations), strict=True):
      layers[name] = layer
      progress.update(len(layers))
  found = spec_lib.QuantSpec(
      recipe, layers, of.differences and act_bits < FULL_BITS)
  logging.info('%s', summary(found))
  return found


def _look(model, params, recipe, widths, batches, plan, kernels, key):
  """{layer: what was seen of its input}; runs the sampler if it must."""
  # Layers are found by their kernels: the model need not run. Where there is
  # something to trace it on, what cannot be quantized is refused by its name;
  # of other models without batches, when they first run.
  if not recipe.needs_at(*widths) and (batches is None or not recipe.needs):
    check_model(model, params, batches)
    return {name: Seen() for name in kernels}
  needs = recipe.gathered(widths[1])
  if batches is None or plan is None:
    raise ValueError(
        f'this recipe looks at {sorted(needs)} of the inputs: '
        'calibrate needs batches and a plan, or activations')
  return observe.collect(
      model, params, plan, batches, needs=needs,
      key=jax.random.key(0) if key is None else key)


def _check_seen(recipe, widths, activations):
  """Raises ValueError for differences in place of inputs, or the reverse."""
  needs = recipe.needs_at(*widths)
  wanted = fit_lib.DIFFERENCES in needs
  # Gram matrices are of inputs either way.
  looks = set(needs) - {fit_lib.GRAM}
  for name, seen in activations.items():
    if looks and seen.minimum is not None and seen.differences != wanted:
      found, asked = (('differences between steps', 'inputs')
                      if seen.differences else
                      ('inputs', 'differences between steps'))
      raise ValueError(
          f'layer {name}: the activations are of {found}, and this recipe '
          f'looks at {asked}: collect with needs=recipe.gathered(act_bits)')


def check_model(model: nn.Module, params: Any,
                batches: Iterable[observe.Batch] | None = None
                ) -> list[str] | None:
  """Refuses what cannot be quantized, by name, if the inputs are known.

  Args:
    model: which is traced; nothing runs.
    params: its parameters, or their shapes.
    batches: as of `calibrate`.

  Returns:
    The layers in the order of their execution; None where the inputs are not
    known.

  Raises:
    ValueError: see `interception.list_layers`.
  """
  inputs = _inputs_of(model, batches)
  if inputs is None:
    return None
  noise, *condition = inputs
  return list(interception.list_layers(
      model, params, noise, jnp.zeros(len(noise)), *condition))


def _inputs_of(model, batches):
  """What to trace a model on; None where nothing is known of its inputs."""
  if batches is not None:
    found = batches_lib.check_batches(batches)
    for noise, *condition in found:
      batches_lib.check_inputs(model, noise, condition)
    return found[0]
  shape = getattr(model, 'sample_shape', None)
  if shape is None:
    return None
  return (jnp.zeros((1, *shape)), *[
      jnp.zeros(part.abstract(1).shape, part.abstract(1).dtype)
      for part in model.conditions])


def fit_layer(recipe: recipes.Recipe, role: str, seen: Seen,
              kernel: np.ndarray, bits: int, act_bits: int,
              measured: bool = True, kind: str = ''
              ) -> spec_lib.LayerSpec:
  """One layer: what stands around its product, weights, input.

  Args:
    recipe: whose fits are asked.
    role: of the layer.
    seen: of its input.
    kernel: `[*window, I, O]`.
    bits: of the weights, 3 to 8 or 32.
    act_bits: of the input, likewise.
    measured: whether `stats` has errors that are work of their own.
    kind: AAL or NAL where that is known; what is seen goes before it.
  """
  # By the layer's own input: smoothing and rotation would hide SiLU's tail.
  stats = {}
  if seen.minimum is not None:
    kind = (spec_lib.AAL if not seen.differences and is_aal(
        seen.minimum, seen.maximum, seen.dtype) else spec_lib.NAL)
    stats |= {'act_min': seen.minimum, 'act_max': seen.maximum}
  given = kernel
  of_input = recipe.aal if (
      kind == spec_lib.AAL and not recipe.differences) else recipe.nal
  around = None
  if (recipe.around is not None and bits < FULL_BITS
      and not _has_groups(seen, kernel)):
    around = _find_around(recipe, of_input, seen, kernel, bits, act_bits)
    # Both fits below see what the product will see.
    kernel = np.asarray(around.residual(kernel))
    seen = around.seen(seen)
  act = fit_lib.fit(of_input, _signed(seen) if recipe.differences else seen,
                    act_bits, axis=-1)
  if recipe.differences and any(act.quantizer.cuts):
    raise ValueError('the quantizer of its input cuts off what is beyond a '
                     'range from calibration, and differences between steps '
                     'have no such range: take one with scales from the data')
  if act_bits < FULL_BITS and act.mse is not None:
    stats |= _input_errors(of_input, act, seen, act_bits)
  weight = fit_lib.fit(
      recipe.weight, Seen.of_weights(kernel), bits, axis=-2, measured=measured)
  if around is not None and weight.quantizer.is_full:
    raise ValueError('the weights stay in full precision, with which nothing '
                     'can stand around the product: leave `around` out')
  if bits < FULL_BITS and weight.mse is not None:
    stats['weight_mse'] = weight.mse
  rounded = None
  if recipe.rounding == recipes.GPTQ and not weight.quantizer.is_full:
    rounded, errors = _rounded(kernel, weight.quantizer, seen.gram, given)
    stats |= errors
  return spec_lib.LayerSpec(
      role, kind, weight.quantizer, act.quantizer, around, stats, rounded)


def _signed(seen):
  """What is seen of differences, which have either sign whatever inputs have.
  """
  if seen.minimum is None:
    return seen
  # Where an input never changes they are what is left of it, and not 0.
  reach = max(-seen.minimum, seen.maximum, float(np.finfo(np.float32).tiny))
  return dataclasses.replace(seen, minimum=-reach, maximum=reach)


def _find_around(recipe, of_input, seen, kernel, bits, act_bits):
  """What stands around a layer's product; ValueError for what cannot."""
  around = fit_lib.as_arrays(recipe.around(around_lib.Trial(
      seen, kernel, functools.partial(_quantized, recipe.weight, bits),
      functools.partial(_quantized_rows, of_input, act_bits), bits)))
  if flaws := around.flaws(kernel.shape[-2]):
    raise ValueError('around the product, ' + ', '.join(flaws))
  return around


def _input_errors(of_input, act, seen, bits):
  """What is known of an input's error, for `stats`.

  Args:
    of_input: its fit.
    act: what that found.
    seen: of the input.
    bits: of an element.
  """
  errors = {'act_mse': act.mse}
  # For the report, which tells what the class of a layer gained: the best
  # signed quantizer, searched already or not.
  signed = fit_lib.SIGNED
  if signed in act.tried:
    errors['act_signed_mse'] = act.tried[signed]
  elif isinstance(of_input, fit_lib.Searched):
    # By the same values, and with as many scales.
    errors['act_signed_mse'] = dataclasses.replace(
        of_input, candidates=(signed,))(seen, bits, -1).mse
  elif seen.values is not None:
    errors['act_signed_mse'] = signed.search(seen.values, bits).mse
  return errors


def _has_groups(seen, kernel):
  """Whether it is a grouped convolution, of which only a part sees a channel.

  Nothing stands around these: what finds it takes all channels for all outputs.
  """
  parts = [part.shape[-1] for part in (seen.rows, seen.channel_maxima)
           if part is not None]
  return any(channels != kernel.shape[-2] for channels in parts)


def _rounded(kernel, quantizer, gram, given):
  """The weights by GPTQ, and what of their errors is known, for `stats`.

  Args:
    kernel: as the product sees it.
    quantizer: of the weights.
    gram: of the input that the product sees.
    given: the kernel that the layer has.
  """
  if gram is None:
    raise ValueError(
        f'rounding={recipes.GPTQ!r} needs to see {fit_lib.GRAM!r} of the '
        'input, which was not gathered: collect with '
        'needs=recipe.gathered(act_bits)')
  tensor = gptq.round_weights(kernel, quantizer, gram)
  nearest = np.asarray(fit_lib.restored(quantizer, kernel, -2))
  found = rounded_lib.Rounded.of(tensor, given)
  weights = np.asarray(found.dequantize())
  return found, {
      'weight_mse': float(np.mean((np.float64(weights) - kernel)**2)),
      'output_mse': gptq.output_error(kernel, weights, gram),
      'nearest_output_mse': gptq.output_error(kernel, nearest, gram)}


def _quantized(of, bits, kernel):
  """A kernel after its own fit: what a search for what is around looks at."""
  quantizer = of.quantizer(Seen.of_weights(kernel), bits, -2)
  return (kernel if quantizer.is_full else
          np.asarray(fit_lib.restored(quantizer, kernel, -2)))


def _quantized_rows(of, bits, seen):
  """Rows of an input after its fit, like `_quantized`."""
  quantizer = fit_lib.fit(of, seen, bits, axis=-1).quantizer
  return np.asarray(seen.rows if quantizer.is_full else
                    fit_lib.restored(quantizer, seen.rows, -1))


def summary(spec: spec_lib.QuantSpec) -> str:
  """One line: how many layers of each class, and what was chosen."""
  kinds = [layer.kind for layer in spec.layers.values()]
  chosen = [layer.act.describe()['format'] for layer in spec.layers.values()
            if not layer.act.is_full]
  counts = ', '.join(f'{chosen.count(fmt)} {fmt}'
                     for fmt in sorted(set(chosen)))
  looked = (f'{kinds.count("AAL")} AALs, {kinds.count("NAL")} NALs; '
            if any(kinds) else '')
  return (f'{spec.recipe}: {looked}activations '
          f'{counts or "in full precision"}')
