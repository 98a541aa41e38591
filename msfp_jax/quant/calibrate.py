"""Activations over the whole trajectory -> AAL / NAL -> QuantSpec."""

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

from msfp_jax import diffusion
from msfp_jax.base import progress as progress_lib
from msfp_jax.quant import interception as layers_lib
from msfp_jax.quant import spec as spec_lib

# Minima that SiLU (-0.27846) and GELU (-0.17) never pass, with room for
# rounding.
_SILU_MINIMUM = -0.2786
# "Maximum well above |minimum|".
_ASYMMETRY = 1.5


@dataclasses.dataclass(frozen=True)
class Activations:
  """What was seen of one layer's input.

  Attributes:
    values: a random sample, float32 `[N]`, equally many of every step.
    minimum: over all values, not only the sampled.
    maximum: likewise.
  """

  values: np.ndarray
  minimum: float
  maximum: float


def is_aal(minimum: float, maximum: float) -> bool:
  """Whether an activation with these extremes follows SiLU or the like.

  An anomalous activation layer's input has a negative tail that ends at
  -0.2785 and a positive one that does not (arXiv 2505.21591, section 3).
  """
  return (_SILU_MINIMUM <= minimum <= 0
          and maximum > _ASYMMETRY * abs(minimum))


# Starting noise `[B, H, W, C]`, alone or with what else the model takes.
Batch = jax.Array | tuple[jax.Array, ...]


def collect(model: nn.Module, params: Any, plan: diffusion.SamplerPlan,
            batches: Iterable[Batch], *, samples_per_layer: int = 65_536,
            key: jax.Array) -> dict[str, Activations]:
  """Runs the sampler and keeps a sample of every layer's input.

  Memory is bounded by `samples_per_layer` values a layer, whatever the number
  of images: every step of every batch contributes equally many.

  Args:
    model: predicts the noise, model(x, t, *condition).
    params: its parameters.
    plan: the sampler whose trajectory is followed, all steps of it.
    batches: starting noise, arrays `[B, H, W, C]` of one shape; or tuples of
      noise and condition, such as labels `[B]`.
    samples_per_layer: values kept of each layer.
    key: for the sample's choice and the sampler's noise.

  Raises:
    ValueError: there are no batches, or an activation is NaN or infinite.
  """
  batches = [batch if isinstance(batch, tuple) else (batch,)
             for batch in batches]
  if not batches:
    raise ValueError('nothing to calibrate on: batches is empty; pass at '
                     'least one array of noise')
  count = -(-samples_per_layer // (plan.num_steps * len(batches)))
  noise, *condition = batches[0]
  names = layers_lib.list_layers(
      model, params, noise, jnp.zeros(len(noise)), *condition)
  run = jax.jit(functools.partial(watch, model, plan, count))
  seen = []
  progress = progress_lib.Progress('gather activations, batches', len(batches))
  for i, batch in enumerate(batches):
    seen.append(jax.device_get(run(params, batch, jax.random.fold_in(key, i))))
    progress.update(i + 1)
  found = {}
  for name in names:
    values, low, high = (np.concatenate([part[name][i].ravel()
                                         for part in seen]) for i in range(3))
    found[name] = Activations(values, float(low.min()), float(high.max()))
    if not np.isfinite([found[name].minimum, found[name].maximum]).all():
      raise ValueError(f'layer {name} got inputs that are NaN or infinite '
                       'while sampling: check the checkpoint')
  return found


def watch(model: nn.Module, plan: diffusion.SamplerPlan, count: int,
          params: Any, batch: tuple[jax.Array, ...], key: jax.Array
          ) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
  """Samples, and returns what the layers' inputs were instead of images.

  Returns:
    {layer: (`count` values of every step `[S, count]`, minimum and maximum
    over all values of every step `[S]`)}.
  """
  step_seen = {}
  noise, *condition = batch
  sizes = jnp.asarray(_input_sizes(model, params, batch))

  def eps_fn(x, t, index):
    step_seen.clear()
    # For all layers at once: a generator a layer would take long to compile.
    step_key = jax.random.fold_in(key, index)
    rows = jax.vmap(lambda number, size: jax.random.randint(
        jax.random.fold_in(step_key, number), (count,), 0, size))(
            jnp.arange(1, len(sizes) + 1), sizes)

    def visit(name, value):
      chosen = value.ravel()[rows[len(step_seen)]]
      step_seen[name] = (chosen, value.min(), value.max())
      return value

    with layers_lib.intercept_inputs(visit):
      return model.apply({'params': params}, x, t, *condition)

  return diffusion.trajectory(
      eps_fn, plan, noise, jax.random.fold_in(key, plan.num_steps),
      visit=lambda x, eps, step: dict(step_seen))[1]


def _input_sizes(model, params, batch) -> list[int]:
  """Values in every layer's input, in order of execution."""
  sizes = []

  def visit(unused_name, value):
    sizes.append(value.size)
    return value

  noise, *condition = batch
  with layers_lib.intercept_inputs(visit):
    jax.eval_shape(model.apply, {'params': params}, noise,
                   jnp.zeros(len(noise)), *condition)
  return sizes


def calibrate(model: nn.Module, params: Any, *, recipe: str = 'msfp',
              bits: int = 4, act_bits: int | None = None,
              batches: Iterable[Batch] | None = None,
              plan: diffusion.SamplerPlan | None = None,
              exceptions: str | Mapping[str, int] | None = None,
              roles: Mapping[str, str] | None = None,
              activations: Mapping[str, Activations] | None = None,
              key: jax.Array | None = None) -> spec_lib.QuantSpec:
  """Searches a quantizer for every Conv and Dense of a model.

  Args:
    model: predicts the noise, model(x, t, *condition).
    params: its parameters, finite.
    recipe: a name in `spec.RECIPES`: 'msfp', 'signed_fp' or 'int'.
    bits: of the weights; 3 to 8, or 32 for full precision.
    act_bits: of the activations; the weights' by default.
    batches: starting noise, arrays `[B, H, W, C]`; or tuples (see `collect`).
    plan: the sampler whose whole trajectory is followed.
    exceptions: roles with other bits than the rest: a name in
      `spec.EXCEPTIONS` or a dict; 'all-4' by default, none with own `roles`.
      They do not reach what `bits` leaves in full precision.
    roles: {role: pattern of layer names}, for models other than our UNet.
    activations: what `collect` returned, in place of batches and plan.
    key: of the random sample; key 0 by default.

  Raises:
    ValueError: an unknown name, a layer that no rule covers, NaN in the
      weights or activations.
  """
  table = spec_lib.recipe(recipe)
  if exceptions is None:
    exceptions = 'all-4' if roles is None else {}
  if isinstance(exceptions, str):
    if exceptions not in spec_lib.EXCEPTIONS:
      raise ValueError(f'exceptions {exceptions!r}: must be a dict or one of '
                       f'{sorted(spec_lib.EXCEPTIONS)}')
    exceptions = spec_lib.EXCEPTIONS[exceptions]
  known = spec_lib.ROLES if roles is None else roles
  if unknown := set(exceptions) - set(known):
    raise ValueError(f'exceptions for roles {sorted(unknown)}, which are not '
                     f'among {sorted(known)}')
  kernels = jax.device_get(layers_lib.leaves(params, 'kernel'))
  layers_lib.check_finite(kernels)
  if activations is None:
    if batches is None or plan is None:
      raise ValueError('calibrate needs batches and a plan, or activations')
    activations = collect(
        model, params, plan, batches,
        key=jax.random.key(0) if key is None else key)
  if odd := set(activations) ^ set(kernels):
    raise ValueError(f'activations do not fit the parameters: {sorted(odd)} '
                     'are in one of them only; collect on this model')

  def search_layer(name: str) -> spec_lib.LayerSpec:
    role = spec_lib.role_of(name, roles)
    widths = [width if width == spec_lib.FULL_PRECISION
              else exceptions.get(role, width)
              for width in (bits, bits if act_bits is None else act_bits)]
    try:
      return _layer_spec(
          table, role, activations[name], kernels[name], *widths)
    except ValueError as error:
      raise ValueError(f'layer {name}: {error}') from error

  # One search uses one core; threads also compile side by side.
  layers = {}
  progress = progress_lib.Progress(f'search {recipe}, layers', len(activations))
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for name, layer in zip(
        activations, pool.map(search_layer, activations), strict=True):
      layers[name] = layer
      progress.update(len(layers))
  found = spec_lib.QuantSpec(recipe, layers)
  logging.info('%s', summary(found))
  return found


def _layer_spec(table: spec_lib.Recipe, role: str, seen: Activations,
                kernel: np.ndarray, bits: int, act_bits: int
                ) -> spec_lib.LayerSpec:
  kind = 'AAL' if is_aal(seen.minimum, seen.maximum) else 'NAL'
  stats = {'act_min': seen.minimum, 'act_max': seen.maximum}
  act = weight = None
  if act_bits < spec_lib.FULL_PRECISION:
    signed = spec_lib.SIGNED.search(seen.values, act_bits)
    candidates = table.aal if kind == 'AAL' else table.nal
    best = min((signed if c is spec_lib.SIGNED
                else c.search(seen.values, act_bits) for c in candidates),
               key=lambda result: result.mse)
    act = best.quantizer()
    stats |= {'act_mse': best.mse, 'act_signed_mse': signed.mse}
  if bits < spec_lib.FULL_PRECISION:
    best = min((c.search(kernel, bits, channel_axis=-1)
                for c in table.weights), key=lambda result: result.mse)
    weight = best.quantizer(kernel.ndim)
    stats |= {'weight_mse': best.mse}
  return spec_lib.LayerSpec(role, kind, weight, act, stats)


def summary(spec: spec_lib.QuantSpec) -> str:
  """One line: how many layers of each class, and what was chosen."""
  kinds = [layer.kind for layer in spec.layers.values()]
  chosen = [str(layer.act.fmt) for layer in spec.layers.values() if layer.act]
  counts = ', '.join(f'{chosen.count(fmt)} {fmt}'
                     for fmt in sorted(set(chosen)))
  return (f'{spec.recipe}: {kinds.count("AAL")} AALs, {kinds.count("NAL")} '
          f'NALs; activations {counts or "in full precision"}')
