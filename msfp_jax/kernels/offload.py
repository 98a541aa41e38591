"""Weights that wait in the host's memory, and come to be multiplied.

By JAX's memory kinds: an array in pinned memory of the host is an argument of a
compiled program as any other, and a copy inside of the program brings it to the
device, which XLA does while other work goes on.

    host      weights 1    weights 2    weights 3    weights 4
                  |            |            |            |
    device    product 1 -> product 2 -> product 3 -> product 4
                                            ^
              here, weights 4 come, and those of product 1 are forgotten
"""

import collections
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

from msfp_jax.kernels import compiler
from msfp_jax.quant.qlayer import QLayer

# JAX's name of the host's memory that a device reads by itself.
KIND = 'pinned_host'
# Layers whose weights may be on the device beside those that are multiplied.
# Without any a copy would have nothing to hide behind.
_AHEAD = 1


@flax.struct.dataclass
class Waiting:
  """An array on the host, in the place of the one that it will be.

  Attributes:
    flat: `[n]`. With more axes some devices want bytes in tiles that those of
      the host do not have, and XLA fails at the copy.
    shape: of the array.
  """

  flat: jax.Array
  shape: tuple[int, ...] = flax.struct.field(pytree_node=False)

  @property
  def dtype(self) -> np.dtype:
    return self.flat.dtype

  @property
  def ndim(self) -> int:
    return len(self.shape)


def _is_waiting(part: Any) -> bool:
  return isinstance(part, Waiting)


def waits(layer: QLayer) -> bool:
  """Whether arrays of the layer are on the host."""
  return any(map(_is_waiting, jax.tree.leaves(layer, is_leaf=_is_waiting)))


def arrange(layer: QLayer, waiting: Callable[[np.ndarray], Any],
            other: Callable[[Any], Any]) -> QLayer:
  """The layer with its arrays where two functions put them.

  Those of more than one axis wait: codes, scales of groups, shifts, branches
  of low rank. Vectors (scales, biases) are small, and a copy of them takes as
  long to begin as one of codes.

  Args:
    layer: without any that wait.
    waiting: an array that waits, flat -> in its place.
    other: another -> in its place.
  """
  def place(part):
    if sum(size > 1 for size in np.shape(part)) < 2:
      return other(part)
    return Waiting(waiting(np.asarray(part).reshape(-1)), part.shape)

  placed = jax.tree.map(other, layer.replace(weight=None, around=None))
  return placed.replace(weight=jax.tree.map(place, layer.weight),
                        around=jax.tree.map(place, layer.around))


def host() -> jax.sharding.NamedSharding:
  """The host's memory, as the default device reads it.

  Raises:
    ValueError: it does not.
  """
  device, = jax.device_put(np.zeros(())).devices()
  kinds = sorted(memory.kind for memory in device.addressable_memories())
  if KIND not in kinds:
    raise ValueError(
        f'{device.device_kind} has memory of the kinds {kinds}; weights that '
        f'wait in the host\'s take {KIND!r}: load without offload')
  return jax.sharding.NamedSharding(
      jax.sharding.Mesh([device], ('device',)), jax.sharding.PartitionSpec(),
      memory_kind=KIND)


def to_host(layer: QLayer, memory: jax.sharding.NamedSharding) -> QLayer:
  """The layer with its weights in the host's memory, the rest on the device.

  Args:
    layer: wherever its arrays are.
    memory: see `host`.
  """
  return arrange(to_numpy(layer), lambda part: jax.device_put(part, memory),
                 jax.device_put)


def to_numpy(layer: QLayer) -> QLayer:
  """The layer with all of its arrays in NumPy, of the shapes they have."""
  return jax.tree.map(
      lambda part: (np.asarray(part.flat).reshape(part.shape)
                    if _is_waiting(part) else np.asarray(part)),
      layer, is_leaf=_is_waiting)


def like(layer: QLayer, other: QLayer) -> QLayer:
  """The layer with its arrays where another has those of its weights."""
  if waits(other):
    return to_host(layer, host())
  if any(isinstance(part, jax.Array) for part in jax.tree.leaves(other.weight)):
    return jax.device_put(layer)
  return layer


def fetch(layer: QLayer) -> QLayer:
  """The layer with all of its arrays on the device."""
  return _fetch(layer, lambda flat: flat)


def _fetch(layer, before):
  """The same of what `before` returns of the arrays that wait."""
  parts, tree = jax.tree.flatten(layer, is_leaf=_is_waiting)
  places = [i for i, part in enumerate(parts) if _is_waiting(part)]
  if not places:
    return layer
  flat = before([parts[i].flat for i in places])
  for i, part in zip(places, jax.device_put(
      flat, jax.memory.Space.Device), strict=True):
    parts[i] = part.reshape(parts[i].shape)
  return jax.tree.unflatten(tree, parts)


class Queue:
  """Fetches the layers of one call of a model, in the order of its products.

  While a program is traced it is told that no layer's weights come before the
  one before the last has been multiplied. Without that all might come at once:
  what many layers of a transformer multiply, its timestep, is known from the
  start.
  """

  def __init__(self):
    # Beginnings of what was there before: (trace, a number). Weights of a layer
    # wait for the first of them.
    self._known = collections.deque(maxlen=1 + _AHEAD)
    self._waits = False

  def fetch(self, layer: QLayer, x: jax.Array) -> tuple[QLayer, jax.Array]:
    """The layer with its arrays on the device, and x, which it multiplies."""
    self._waits = waits(layer)
    if not self._waits or not isinstance(x, jax.core.Tracer) or not x.size:
      return fetch(layer), x
    # A block that is traced by itself (nn.jit, nn.remat) knows no value of
    # another's: there it begins anew.
    here = core.get_opaque_trace_state()
    if [trace for trace, _ in self._known] != [here] * self._known.maxlen:
      self._known.extend([(here, compiler.first(x))] * self._known.maxlen)
    number = self._known[0][1]

    def after(flat):
      nonlocal number
      *flat, number = jax.lax.optimization_barrier((*flat, number))
      return flat
    layer = _fetch(layer, after)
    # XLA takes out of a barrier what is not used behind it.
    return layer, jnp.where(
        compiler.never(number), jnp.zeros((), x.dtype), x)

  def ran(self, out: jax.Array) -> None:
    """Tells what the layer that was fetched last has become."""
    if self._waits and isinstance(out, jax.core.Tracer) and out.size:
      self._known.append((core.get_opaque_trace_state(), compiler.first(out)))
