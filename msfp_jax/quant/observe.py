"""What the layers of a model see while it samples."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax import diffusion
from msfp_jax.quant import interception

# Starting noise `[B, H, W, C]`, alone or with what else the model takes.
Batch = jax.Array | tuple[jax.Array, ...]
# (position in the plan, {layer: its input `[..., I]`}) -> what to keep of it.
Summarize = Callable[[jax.Array, dict[str, jax.Array]], Any]


def check_batches(batches: Iterable[Batch] | jax.Array
                  ) -> list[tuple[jax.Array, ...]]:
  """Batches as a list of tuples of noise and conditions.

  Args:
    batches: arrays `[B, H, W, C]` of noise, or tuples of noise and conditions;
      an array of four axes alone is one batch.

  Raises:
    ValueError: there is no batch, or one that no sampler starts from.
  """
  if _is_array(batches):
    if batches.ndim != 4:
      raise ValueError(
          f'batches is one array of shape {batches.shape}: write '
          'batches=[noise] for one batch, batches=list(noise) for several')
    batches = [batches]
  if isinstance(batches, Mapping | str) or not isinstance(batches, Iterable):
    raise ValueError('batches must be a list of arrays of noise, or of tuples '
                     f'of noise and conditions, not {_kind(batches)}')
  if isinstance(batches, tuple) and batches and all(map(_is_array, batches)):
    if len({jnp.shape(batch)[1:] for batch in batches}) > 1:
      raise ValueError('batches is one tuple of noise and conditions: write '
                       'batches=[(noise, condition)]')
  found = [batch if isinstance(batch, tuple) else (batch,)
           for batch in batches]
  if not found:
    raise ValueError('nothing to calibrate on: batches is empty; pass at '
                     'least one array of noise')
  return [(check_noise(batch[0] if batch else None, f'batch {i}'), *batch[1:])
          for i, batch in enumerate(found)]


def check_noise(noise: Any, name: str = 'noise') -> jax.Array:
  """Starting noise as an array of float32.

  Args:
    noise: `[B, ...]`, float32 or NumPy's float64.
    name: what to call it in an error.

  Raises:
    ValueError: no array of numbers of these types, or one without images.
  """
  if not _is_array(noise):
    raise ValueError(f'{name} is {_kind(noise)}: it must be an array of noise '
                     '[B, H, W, C]')
  if noise.dtype not in (np.float32, np.float64):
    raise ValueError(
        f'{name} is {noise.dtype}: a sampler starts from standard normal '
        'noise in float32, jax.random.normal(key, shape); a half-precision '
        'model rounds for itself, by its dtype')
  if not noise.ndim or not noise.shape[0]:
    raise ValueError(f'{name} has shape {noise.shape}: it must be '
                     '[B, H, W, C], with at least one image')
  return jnp.asarray(noise, jnp.float32)


def _is_array(value: Any) -> bool:
  return isinstance(value, np.ndarray | jax.Array)


def _kind(value: Any) -> str:
  return 'None' if value is None else f'a {type(value).__name__}'


def watch(model: nn.Module, plan: diffusion.SamplerPlan, summarize: Summarize,
          params: Any, batch: tuple[jax.Array, ...], key: jax.Array) -> Any:
  """Samples, and returns what was kept of the layers' inputs, not images.

  A pure function, to be compiled: of the inputs nothing outlives its step but
  what `summarize` keeps.

  Args:
    model: predicts the noise, model(x, t, *condition).
    plan: the sampler whose whole trajectory is followed.
    summarize: called once, for all layers in order of execution.
    params: the model's parameters.
    batch: starting noise and conditions, see `check_batches`.
    key: for samplers that add noise.

  Returns:
    What `summarize` returned, with a first axis of S steps.

  Raises:
    ValueError: see `interception.record`.
  """
  noise, *condition = batch
  kept = []

  def eps_fn(x, t, index):
    eps, seen = interception.record(model, params, x, t, *condition)
    kept[:] = [summarize(index, seen)]
    return eps

  return diffusion.trajectory(
      eps_fn, plan, noise, key, visit=lambda x, eps, step: kept[0])[1]


def draw(seen: Mapping[str, jax.Array], count: int, key: jax.Array
         ) -> dict[str, jax.Array]:
  """Random values of every layer's input, with repetition.

  Args:
    seen: {layer: its input}, in order of execution.
    count: values of each.
    key: of this step; every layer gets positions of its own.

  Returns:
    {layer: `[count]`}.
  """
  # For all layers at once: a generator a layer would take long to compile.
  sizes = jnp.asarray([value.size for value in seen.values()])
  rows = jax.vmap(lambda number, size: jax.random.randint(
      jax.random.fold_in(key, number), (count,), 0, size))(
          jnp.arange(1, len(sizes) + 1), sizes)
  return {name: value.ravel()[row]
          for (name, value), row in zip(seen.items(), rows, strict=True)}
