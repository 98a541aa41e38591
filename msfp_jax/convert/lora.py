"""LoRAs that others trained: what they add to a model, and merging it.

A LoRA adds scale down up to weights W, two matrices of low rank R, mostly with
scale = alpha / R. `lora_file.load_lora` reads one into our layers' names and
layouts, `merge_loras` adds it to full-precision weights, and a packed model
takes it beside its own (`PackedModel.with_loras`).
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import flax
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.base import arguments
from msfp_jax.convert import restore


class LowRank(NamedTuple):
  """What a LoRA adds to one layer: scale down up.

  Attributes:
    down: `[*window, I, R]`, of the file's type.
    up: `[R, O]`, likewise.
    scale: alpha / R.
  """

  down: np.ndarray
  up: np.ndarray
  scale: float

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the weights that it adds to, `[*window, I, O]`."""
    return (*self.down.shape[:-1], self.up.shape[-1])


@dataclasses.dataclass(frozen=True)
class Lora:
  """A LoRA for one model.

  Attributes:
    source: where it came from, for messages.
    layers: {layer: what is added to it}.
    left_out: {what: how many modules} the file has for other models of a
      pipeline, such as text encoders.
  """

  source: str
  layers: Mapping[str, LowRank] = dataclasses.field(repr=False)
  left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)


def check_loras(loras: Iterable[tuple[Lora, Any]],
                shapes: Mapping[str, tuple[int, ...]] | None = None
                ) -> list[tuple[Lora, Any]]:
  """LoRAs with their strengths, those of strength 0 left out.

  Args:
    loras: (what `load_lora` returned, its strength); strengths may be traced.
    shapes: {layer: shape of its weights} of the model they are for.

  Raises:
    TypeError: other things.
    ValueError: a strength that is no finite number; a LoRA of another model.
  """
  found = []
  for entry in loras:
    if not isinstance(entry, Sequence) or len(entry) != 2:
      raise TypeError(f'loras has {arguments.describe(entry)}: it must be '
                      'pairs, what msfp.load_lora(...) returns and a strength')
    lora, strength = entry
    arguments.check_type('a LoRA', lora, Lora, 'msfp.load_lora(...)')
    if shapes is not None and (odd := sorted(
        name for name, added in lora.layers.items()
        if shapes.get(name) != added.shape)):
      raise ValueError(
          f'{lora.source} belongs to another model: {len(odd)} of its '
          f'{len(lora.layers)} layers are not in this one, or are of other '
          f'shapes, such as {odd[:3]}')
    if isinstance(strength, jax.core.Tracer):
      found.append((lora, strength))
    elif number := _finite(strength, lora):
      found.append((lora, number))
  return found


def _finite(strength, lora):
  try:
    number = math.nan if isinstance(strength, str) else float(strength)
  except (TypeError, ValueError):
    number = math.nan
  if not math.isfinite(number):
    raise ValueError(f'strength {strength!r} of {lora.source}: must be a '
                     'finite number')
  return number


def merge_loras(params: Any, loras: Iterable[tuple[Lora, float]]) -> Any:
  """Full-precision parameters with LoRAs added to their weights.

  W + sum of strength alpha / R down up, in float32, then of the weights' own
  type. Packed models take LoRAs beside their weights: `with_loras`.

  Args:
    params: of the model that the LoRAs are for, as `load_pretrained` returned
      them; they stay as they are.
    loras: (what `load_lora` returned, its strength), as many as wanted.

  Raises:
    ValueError: a LoRA of another model, or weights that are quantized.
  """
  if isinstance(params.get('params'), Mapping):
    return {**params, 'params': merge_loras(params['params'], loras)}
  flat = traverse_util.flatten_dict(flax.core.unfreeze(params))
  paths = {'.'.join(path[:-1]): path for path in flat if path[-1] == 'kernel'}
  shapes = {name: getattr(flat[path], 'shape', None)
            for name, path in paths.items()}
  if odd := [name for name, shape in shapes.items() if shape is None]:
    raise ValueError(f'the weights of {odd[:3]} are quantized: merge LoRAs '
                     'before that, or give them to a packed model, with_loras')
  for name, added in _by_layer(loras, shapes).items():
    kernel = flat[paths[name]]
    flat[paths[name]] = jnp.asarray(_add(kernel, added), kernel.dtype)
  return traverse_util.unflatten_dict(flat)


def merge_places(places: Mapping[tuple[str, ...], restore.Place],
                 loras: Iterable[tuple[Lora, float]]
                 ) -> dict[tuple[str, ...], restore.Place]:
  """As `merge_loras`, of parameters that are still in their file.

  Args:
    places: {path: where the parameter lies}; reading one adds to it.
    loras: (what `load_lora` returned, its strength).
  """
  paths = {'.'.join(path[:-1]): path for path in places if path[-1] == 'kernel'}
  found = dict(places)
  for name, added in _by_layer(loras, {
      name: places[path].shape for name, path in paths.items()}).items():
    found[paths[name]] = _Changed(**vars(places[paths[name]]), added=added)
  return found


@dataclasses.dataclass(frozen=True)
class _Changed(restore.Place):
  """A kernel to which LoRAs are added when it is read."""

  added: Sequence[tuple[LowRank, float]] = ()

  def read(self) -> np.ndarray:
    return _add(super().read(), self.added)


def _by_layer(loras, shapes):
  """{layer: [(what a LoRA adds, its strength), ...]}."""
  found: dict[str, list[tuple[LowRank, float]]] = {}
  for lora, strength in check_loras(loras, shapes):
    for name, added in lora.layers.items():
      found.setdefault(name, []).append((added, strength))
  return found


def _add(kernel, added):
  """W + strength scale down up of each, float32."""
  total = np.asarray(kernel, np.float32)
  for (down, up, scale), strength in added:
    total = total + np.float32(strength * scale) * (
        np.float32(down) @ np.float32(up))
  return total
