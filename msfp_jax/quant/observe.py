"""Running the sampler while keeping what the layers' inputs were."""

from collections.abc import Collection, Iterable
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax import diffusion
from msfp_jax.base import devices
from msfp_jax.base import progress as progress_lib
from msfp_jax.diffusion import sampling
from msfp_jax.quant import batches as batches_lib
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import geometry as geometry_lib
from msfp_jax.quant import interception
from msfp_jax.quant.fit import Seen

# Starting noise `[B, H, W, C]`, alone or with what else the model takes.
Batch = jax.Array | tuple[jax.Array, ...]
# At most as many places of the input, of a step and batch, whose outer
# products are summed.
_GRAM_PLACES = 1024


def collect(model: nn.Module, params: Any, plan: diffusion.SamplerPlan,
            batches: Iterable[Batch], *, samples_per_layer: int = 65_536,
            key: jax.Array,
            needs: Collection[str] = (fit_lib.EXTREMES, fit_lib.VALUES),
            layout: devices.Layout | None = None) -> dict[str, Seen]:
  """Runs the sampler and keeps what is asked for of every layer's input.

  Memory is bounded by `samples_per_layer` values a layer, whatever the number
  of images: every step of every batch contributes equally many. (A Gram matrix
  takes the square of what one output sums over.)

  Args:
    model: predicts the noise, model(x, t, *condition).
    params: its parameters.
    plan: the sampler whose trajectory is followed, all steps of it.
    batches: starting noise, arrays `[B, H, W, C]` of one shape; or tuples of
      noise and condition, such as labels `[B]`.
    samples_per_layer: values kept of each layer.
    key: for the sample's choice and the sampler's noise.
    needs: of `fit.NEEDS`; extremes are always kept. With 'differences' all but
      Gram matrices is of what inputs differ by from the step before.
    layout: where weights and batches lie; None: where they do.

  Raises:
    ValueError: there are no batches, or an activation is NaN or infinite.
  """
  if isinstance(needs, str):
    raise ValueError(f'needs {needs!r}: must be a list of {fit_lib.NEEDS}')
  if unknown := set(needs) - set(fit_lib.NEEDS):
    raise ValueError(f'needs {sorted(unknown)}: must be among {fit_lib.NEEDS}')
  if {fit_lib.BY_STEP, fit_lib.WEIGHTED} & set(needs):
    needs = {*needs, fit_lib.VALUES}
  batches = batches_lib.check_batches(batches)
  # Every step alike: activations drift along the trajectory, and a quantizer
  # that holds for all steps must have seen all.
  count = -(-samples_per_layer // (plan.num_steps * len(batches)))
  for noise, *condition in batches:
    batches_lib.check_inputs(model, noise, condition)
  noise, *condition = batches[0]
  # By shapes alone, in milliseconds: what is refused is refused before XLA
  # compiles a sampler.
  names = interception.list_layers(
      model, params, noise, jnp.zeros(len(noise)), *condition)
  run = functools.partial(watch, model, plan, count, tuple(needs))
  if layout is None or layout.is_single:
    run = jax.jit(run)
  else:
    run = jax.jit(run, out_shardings=layout.whole)
    params = layout.put(params)
    batches = [layout.put(batch, layout.batch) for batch in batches]
  seen, grams = [], {}
  progress = progress_lib.Progress(
      'gather activations, batches', len(batches), unit='batches',
      compiles=True)
  for i, batch in enumerate(batches):
    found = jax.device_get(run(params, batch, jax.random.fold_in(key, i)))
    # Summed at once: of a large UNet those of one batch take gigabytes.
    for name, part in found.items():
      if fit_lib.GRAM in part:
        grams[name] = grams.get(name, 0.0) + np.float64(part.pop(fit_lib.GRAM))
    seen.append(found)
    progress.update(i + 1)
  shares = (plan.eps_factor / np.abs(plan.eps_factor).max())**2
  return {name: _join(name, [part[name] for part in seen], needs,
                      grams.get(name), shares) for name in names}


def watch(model: nn.Module, plan: diffusion.SamplerPlan, count: int,
          needs: Collection[str], params: Any, batch: tuple[jax.Array, ...],
          key: jax.Array) -> dict[str, dict[str, jax.Array]]:
  """Samples, and returns what the layers' inputs were instead of images.

  Returns:
    {layer: {need: of every step `[S, ...]`}}; 'minimum' and 'maximum' over all
    values `[S]`, and 'values' `[S, count]`; the Gram matrix is the sum over
    the steps. With 'differences' that of the first step is 0.
  """
  # One scan over the sampler's steps. What is kept of each is a row of the
  # scan's outputs; Gram matrices are summed in its carry, as S of them would
  # not fit.
  #
  #   carry   x_T --> model --> eps --> advance --> x' --> model --> ...
  #                     |
  #   outputs           +--> every layer's input --> _gather --> row of [S, ...]
  #
  # For differences the carry holds the inputs of the step before, too.
  noise, *condition = batch
  # Steps fold in 0 to S - 1 for their samples, so S is free for the sampler's
  # noise; were they the same key, sampled places would go with the noise.
  sampler_key = jax.random.fold_in(key, plan.num_steps)
  remembers = fit_lib.DIFFERENCES in needs

  def predict(x, t, index, before):
    eps, calls = interception.record(model, params, x, t, *condition)
    step_key = jax.random.fold_in(key, index)
    sizes = jnp.asarray([call.input.size for call in calls.values()])
    # For all layers at once: a generator a layer would take long to compile.
    keys = jax.vmap(lambda number: jax.random.fold_in(step_key, number))(
        jnp.arange(1, len(sizes) + 1))
    places = jax.vmap(lambda layer_key, size: jax.random.randint(
        layer_key, (count,), 0, size))(keys, sizes)
    inputs = {name: call.input for name, call in calls.items()}
    values = inputs
    if before is not None:
      values = {name: jnp.where(index == 0, 0, x - before[name])
                for name, x in inputs.items()}
    found = {name: _gather(call.module, call.input, values[name], places[i],
                           keys[i], needs)
             for i, (name, call) in enumerate(calls.items())}
    return eps, found, inputs if remembers else None

  def body(carry, step):
    position, sums, before = carry
    x = position.x
    eps, found, before = predict(
        x, jnp.full((len(x),), step['t']), step['index'], before)
    grams = {name: part.pop(fit_lib.GRAM) for name, part in found.items()
             if fit_lib.GRAM in part}
    sums = jax.tree.map(jnp.add, sums, grams) if grams else sums
    position = sampling.advance(plan, step, position, eps, sampler_key)
    return (position, sums, before), found

  # A scan's carry needs its shapes beforehand.
  _, shapes, inputs = jax.eval_shape(
      predict, noise, jnp.zeros(len(noise)), 0, None)
  empty = jax.tree.map(
      lambda part: jnp.zeros(part.shape, part.dtype),
      ({name: part[fit_lib.GRAM] for name, part in shapes.items()
        if fit_lib.GRAM in part}, inputs))
  (_, sums, _), found = jax.lax.scan(
      body, (sampling.start(plan, noise), *empty), plan.steps())
  for name, gram in sums.items():
    found[name][fit_lib.GRAM] = gram
  return found


def _gather(module, whole, value, places, key, needs):
  """Takes from one input `[..., I]`, at one step, what `needs` asks for.

  Args:
    module: the layer.
    whole: its input.
    value: likewise, or what it differs by from the step before.
    places: of `value`, to be kept.
    key: of other choices.
    needs: of `fit.NEEDS`.
  """
  flat = value.reshape(-1, value.shape[-1])
  found = {'minimum': value.min(), 'maximum': value.max()}
  if fit_lib.VALUES in needs:
    found[fit_lib.VALUES] = value.ravel()[places]
  if fit_lib.ROWS in needs:
    number = -(-len(places) // value.shape[-1])
    # A key of its own, as values took the layer's; so below.
    found[fit_lib.ROWS] = flat[jax.random.randint(
        jax.random.fold_in(key, 1), (number,), 0, len(flat))]
  if fit_lib.CHANNEL_MAXIMA in needs:
    found[fit_lib.CHANNEL_MAXIMA] = jnp.abs(flat).max(0)
  if fit_lib.GRAM in needs:
    # In float32: a half-precision model's own type would sum 8 digits.
    rows = _windows(module, whole, lambda number: (
        jnp.arange(number) if number <= _GRAM_PLACES  # no sample is better
        else jax.random.randint(
            jax.random.fold_in(key, 2), (_GRAM_PLACES,), 0, number))
                    ).astype(jnp.float32)
    found[fit_lib.GRAM] = jnp.matmul(
        rows.T, rows, precision='highest') / len(rows)
  return found


def _windows(module, value, choose):
  """Vectors `[N, K]` that outputs sum over, in the order of the weights.

  Args:
    module: the layer.
    value: its input.
    choose: the number of outputs, of all images -> which of them, `[N]`.
  """
  if not isinstance(module, nn.Conv):
    flat = value.reshape(-1, value.shape[-1])
    return flat[choose(len(flat))]
  x, geometry, window = geometry_lib.of_module(module, value)
  # Only the patches that are asked for: those of all outputs of a 3x3 window
  # are nine times the input.
  size = (len(x), *geometry.size(x.shape[1:-1], window))
  image, *corner = jnp.unravel_index(choose(int(np.prod(size))), size)
  # lax.pad and not jnp.pad: a padding may be negative.
  x = jax.lax.pad(x, jnp.zeros((), x.dtype), [
      (before, after, 0)
      for before, after in ((0, 0), *geometry.padding, (0, 0))])
  axes = len(window)
  places = [image.reshape(-1, *(1,) * axes)]
  for axis, (first, stride, dilation, taps) in enumerate(zip(
      corner, geometry.strides, geometry.dilation, window, strict=True)):
    tap = (dilation * jnp.arange(taps)).reshape(
        [-1 if i == axis else 1 for i in range(axes)])
    places.append(stride * first.reshape(-1, *(1,) * axes) + tap)
  # [N, *window, C], as a kernel has them.
  return x[tuple(places)].reshape(len(image), -1)


def _join(name, parts, needs, gram, shares):
  """A `Seen` of what all batches brought.

  Args:
    name: of the layer.
    parts: of each batch.
    needs: what was gathered.
    gram: summed over the batches.
    shares: of its values that a step has among the weighted ones, `[S]`.
  """
  both = lambda key: np.concatenate([part[key].ravel() for part in parts])
  # NaN reaches a minimum and infinity one of both: no further look at the data.
  low, high = float(both('minimum').min()), float(both('maximum').max())
  if not np.isfinite([low, high]).all():
    raise ValueError(f'layer {name} got inputs that are NaN or infinite '
                     'while sampling: check the checkpoint')
  seen: dict[str, Any] = {}
  if fit_lib.VALUES in needs:
    seen['values'] = both(fit_lib.VALUES)
  if fit_lib.BY_STEP in needs:
    # Of every batch `[S, count]`.
    seen['by_step'] = np.concatenate(
        [part[fit_lib.VALUES] for part in parts], axis=1)
  if fit_lib.WEIGHTED in needs:
    # Each step's are of random places: the first of them are as good as any.
    seen['weighted'] = np.concatenate([
        values[:max(1, round(share * len(values)))] for part in parts
        for values, share in zip(part[fit_lib.VALUES], shares, strict=True)])
  if fit_lib.ROWS in needs:
    rows = [part[fit_lib.ROWS] for part in parts]
    seen['rows'] = np.concatenate(
        [part.reshape(-1, part.shape[-1]) for part in rows])
  if fit_lib.CHANNEL_MAXIMA in needs:
    seen['channel_maxima'] = np.max(
        [part[fit_lib.CHANNEL_MAXIMA].max(0) for part in parts], axis=0)
  if gram is not None:
    # Sums over steps in float32 on the device, over batches in float64.
    seen['gram'] = gram / (len(parts) * len(parts[0]['minimum']))
  return Seen(minimum=low, maximum=high, dtype=parts[0]['minimum'].dtype,
              differences=fit_lib.DIFFERENCES in needs, **seen)
