"""Where arrays lie: one mesh over all devices of all processes.

    devices of 2 processes, model=2          axis `model`
                                             -->
      process 0:  [d0 d1]   rows of the mesh: a batch is split over them
      process 1:  [d2 d3]   columns: large weights are split over them
                 | axis `data`
                 v

One device has the same mesh, of 1 x 1; arrays are then left where JAX puts
them, so that programs are those of a run that knows of no mesh.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

DATA, MODEL = 'data', 'model'
# Elements of an array below which every device holds all of it: to gather it
# would take longer than it saves.
_LARGE = 2**16


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where arrays lie.

  Attributes:
    mesh: of all devices, with the axes DATA and MODEL.
  """

  mesh: Mesh

  @property
  def is_single(self) -> bool:
    """Whether there is one device, which needs no placing."""
    return self.mesh.size == 1

  @property
  def data(self) -> int:
    """Parts that a batch is split into."""
    return self.mesh.shape[DATA]

  @property
  def batch(self) -> NamedSharding:
    """Of arrays whose first axis is a batch."""
    return NamedSharding(self.mesh, PartitionSpec(DATA))

  @property
  def second(self) -> NamedSharding:
    """Of arrays whose second axis is a batch, such as those of several steps.
    """
    return NamedSharding(self.mesh, PartitionSpec(None, DATA))

  @property
  def whole(self) -> NamedSharding:
    """Of arrays that every device holds."""
    return NamedSharding(self.mesh, PartitionSpec())

  def weights(self, tree: Any) -> Any:
    """Shardings of weights, and of what goes with them.

    Large arrays are split along their last axis, a layer's outputs, where the
    mesh's axis MODEL divides it; so banks, moments of optimizers and codes lie
    as the weights that they belong to. Every device holds the rest.

    Args:
      tree: of arrays or of their shapes.
    """
    return jax.tree.map(self._of_weight, tree)

  def _of_weight(self, leaf) -> NamedSharding:
    parts = self.mesh.shape[MODEL]
    shape = np.shape(leaf)
    if (parts == 1 or len(shape) < 2 or np.prod(shape) < _LARGE
        or shape[-1] % parts):
      return self.whole
    return NamedSharding(
        self.mesh, PartitionSpec(*[None] * (len(shape) - 1), MODEL))

  def put(self, tree: Any, shardings: Any = None) -> Any:
    """Arrays that every process has, placed on all devices.

    Args:
      tree: of arrays, the same in every process.
      shardings: a tree like it, or one for all; those of `weights` by default.
    """
    if self.is_single:
      return tree
    if shardings is None:
      shardings = self.weights(tree)
    if isinstance(shardings, NamedSharding):
      shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(_put, tree, shardings)

  def rows(self, batch_size: int) -> slice:
    """The rows of a batch that lie on this process's devices."""
    parts = self.batch.addressable_devices_indices_map((batch_size,)).values()
    bounds = [part.indices(batch_size) for part, in parts]
    return slice(min(start for start, *_ in bounds),
                 max(stop for _, stop, _ in bounds))

  def put_rows(self, rows: Any, batch_size: int) -> Any:
    """A batch of which every process has its own `rows`."""
    if self.is_single:
      return rows
    return jax.make_array_from_process_local_data(
        self.batch, rows, (batch_size, *rows.shape[1:]))

  def constrain(self, tree: Any, sharding: NamedSharding) -> Any:
    """Inside of a jitted function: where its arrays are to lie."""
    if self.is_single:
      return tree
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, sharding), tree)

  def check_batch(self, name: str, batch_size: int) -> None:
    """Raises ValueError unless a batch can be split evenly."""
    if batch_size < 1 or batch_size % self.data:
      raise ValueError(
          f'{name}={batch_size}: must be a multiple of {self.data}, the parts '
          f'into which the {self.mesh.size} devices split a batch')


def _put(leaf, sharding):
  # From the host: what lies on a device of this process alone cannot go to
  # those of others.
  if not sharding.is_fully_addressable:
    leaf = np.asarray(leaf)
  return jax.device_put(leaf, sharding)


@functools.cache
def layout(model: int = 1) -> Layout:
  """The layout of all devices.

  Args:
    model: devices that share the large weights among them; divides the number
      of devices.

  Raises:
    ValueError: it does not.
  """
  found = jax.devices()
  if model < 1 or len(found) % model:
    raise ValueError(f'config.mesh.model={model}: must divide the number of '
                     f'devices, {len(found)}')
  # By process: devices that share weights are those of one host, if they can.
  return Layout(Mesh(np.asarray(found).reshape(-1, model), (DATA, MODEL)))


def fetch(tree: Any) -> Any:
  """Arrays on the host, whole, in every process; one leaf at a time."""
  return jax.tree.map(_fetch, tree)


def _fetch(leaf):
  if isinstance(leaf, jax.Array) and not (
      leaf.is_fully_addressable or leaf.is_fully_replicated):
    return multihost_utils.process_allgather(leaf, tiled=True)
  return jax.device_get(leaf)


def is_first() -> bool:
  """Whether this process is the one that writes."""
  return jax.process_index() == 0


def wait(name: str) -> None:
  """Returns when all processes have come here.

  What the first one has written before is there for the others to read.

  Args:
    name: of the place, the same in all of them.
  """
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def by_first(work: Callable[[], Any], name: str) -> None:
  """Has the first process do something, for which the others wait.

  Args:
    work: such as writing a file.
    name: as of `wait`.
  """
  if is_first():
    work()
  wait(name)


def agreed(value: Any) -> np.ndarray:
  """What the first process says, in all of them: numbers of one shape."""
  if jax.process_count() == 1:
    return np.asarray(value)
  return multihost_utils.broadcast_one_to_all(np.asarray(value))
