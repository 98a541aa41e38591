"""Checks the noise, and batches of it, that samplers start from."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Starting noise `[B, H, W, C]`, alone or with what else the model takes.
Batch = jax.Array | tuple[jax.Array, ...]


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
    # A tuple of arrays may be meant as several batches, or as one with its
    # condition. Noise of one shape tells: labels [B] do not have it.
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
  # NumPy draws float64. Integers or float16 are more likely images, or a
  # mistake.
  if noise.dtype not in (np.float32, np.float64):
    raise ValueError(
        f'{name} is {noise.dtype}: a sampler starts from standard normal '
        'noise in float32, jax.random.normal(key, shape); a half-precision '
        'model rounds for itself, by its dtype')
  if not noise.ndim or not noise.shape[0]:
    raise ValueError(f'{name} has shape {noise.shape}: it must be '
                     '[B, H, W, C], with at least one image')
  return jnp.asarray(noise, jnp.float32)


def check_inputs(model: Any, noise: jax.Array, condition: Sequence[Any]
                 ) -> None:
  """Refuses inputs that a model of this package does not take.

  Of other models nothing is known: JAX says what it does not take.

  Args:
    model: with `sample_shape` and `conditions`, or any other.
    noise: as `check_noise` returned it.
    condition: what else is given to the model.

  Raises:
    ValueError: other axes or channels, or other conditions than the model's:
      their number, shapes, types, or labels that it does not have.
  """
  shape = getattr(model, 'sample_shape', None)
  if shape is None:
    return
  if noise.ndim == len(shape):
    raise ValueError(f'noise has shape {noise.shape}: for one image write '
                     'noise[None]')
  if noise.ndim != len(shape) + 1 or noise.shape[-1] != shape[-1]:
    raise ValueError(
        f'noise has shape {noise.shape}: this model denoises [B, '
        f'{", ".join(map(str, shape))}], of which only B, height and width '
        'may differ')
  names = [part.name for part in model.conditions]
  if len(condition) != len(names):
    raise ValueError(f'{len(condition)} conditions beside the noise: this '
                     f'model takes {names or "none"}')
  for part, value in zip(model.conditions, condition, strict=True):
    _check_condition(part, value, noise.shape[0])


def _check_condition(part, value, batch):
  """Raises ValueError for what a condition of a model is not."""
  want = part.abstract(batch)
  words = (f'{part.name}: the model takes {want.dtype} [{batch}'
           + ''.join(f', {size}' if size > 1 else ', any'
                     for size in want.shape[1:]) + ']')
  if not _is_array(value):
    raise ValueError(f'{words}, not {_kind(value)}')
  is_whole = lambda dtype: jnp.issubdtype(dtype, jnp.integer)
  kind_fits = is_whole(value.dtype) == is_whole(want.dtype) and (
      value.dtype != bool)
  # An axis of 1 stands for any length, but for the first, which is the batch.
  shape_fits = value.ndim == len(want.shape) and all(
      size == found or size == 1 and axis for axis, (size, found)
      in enumerate(zip(want.shape, value.shape, strict=True)))
  if not (kind_fits and shape_fits):
    raise ValueError(f'{words}, not {value.dtype} {list(value.shape)}')
  # Traced, or spread over processes: nobody can look.
  if part.classes is None or isinstance(value, jax.core.Tracer) or not getattr(
      value, 'is_fully_addressable', True):
    return
  found = np.asarray(value)
  if len(found) and not (found.min() >= 0 and found.max() < part.classes):
    raise ValueError(f'{part.name}: labels from {found.min()} to '
                     f'{found.max()}, of which the model has 0 to '
                     f'{part.classes - 1}')


def _is_array(value: Any) -> bool:
  return isinstance(value, np.ndarray | jax.Array)


def _kind(value: Any) -> str:
  return 'None' if value is None else f'a {type(value).__name__}'
