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

from absl import logging
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
    splits: whether batches are split; else every device computes all of one.
  """

  mesh: Mesh
  splits: bool = True

  @property
  def is_single(self) -> bool:
    """Whether there is one device, which needs no placing."""
    return self.mesh.size == 1

  @property
  def num_parts(self) -> int:
    """Parts that a batch can be split into."""
    return self.mesh.shape[DATA]

  @property
  def num_sharing(self) -> int:
    """Devices that share the large weights among them."""
    return self.mesh.shape[MODEL]

  def for_batch(self, name: str, batch_size: int, turns: int = 1) -> 'Layout':
    """The layout for batches of a size, split where they can be.

    Args:
      name: of the field that has the size, for the log.
      batch_size: rows in all.
      turns: in so many turns a batch is computed, each of as many rows.
    """
    if batch_size % (self.num_parts * turns) == 0:
      return self
    logging.warning(
        '%s=%d%s is no multiple of %d, the parts into which the %d devices '
        'could split a batch: each of them computes all of it', name,
        batch_size, f' in {turns} turns' if turns > 1 else '', self.num_parts,
        self.mesh.size)
    return dataclasses.replace(self, splits=False)

  @property
  def batch(self) -> NamedSharding:
    """Of arrays whose first axis is a batch."""
    return NamedSharding(self.mesh, PartitionSpec(*self._data))

  @property
  def batch_second(self) -> NamedSharding:
    """Of arrays whose second axis is a batch, such as those of several steps.
    """
    return NamedSharding(self.mesh, PartitionSpec(None, *self._data))

  @property
  def _data(self) -> tuple[str, ...]:
    return (DATA,) if self.splits else ()

  @property
  def whole(self) -> NamedSharding:
    """Of arrays that every device holds."""
    return NamedSharding(self.mesh, PartitionSpec())

  def of_weights(self, tree: Any) -> Any:
    """Shardings of weights, and of what goes with them.

    Large arrays are split along their last axis, a layer's outputs, where the
    mesh's axis MODEL divides it; so banks, moments of optimizers and codes lie
    as the weights that they belong to. Every device holds the rest.

    Args:
      tree: of arrays or of their shapes.
    """
    return jax.tree.map(self._of_weight, tree)

  def _of_weight(self, leaf) -> NamedSharding:
    parts = self.num_sharing
    shape = np.shape(leaf)
    if (parts == 1 or len(shape) < 2 or np.prod(shape) < _LARGE
        or shape[-1] % parts):
      return self.whole
    return NamedSharding(
        self.mesh, PartitionSpec(*[None] * (len(shape) - 1), MODEL))

  def _spread(self, tree, shardings):
    """What `put` is given, as a tree."""
    if shardings is None:
      return self.of_weights(tree)
    if isinstance(shardings, NamedSharding):
      return jax.tree.map(lambda _: shardings, tree)
    return shardings

  def shapes(self, tree: Any, shardings: Any = None) -> Any:
    """Shapes of arrays with where they are to lie; arguments as of `put`."""
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding), tree,
                        self._spread(tree, shardings))

  def abstract(self, tree: Any, shardings: Any = None) -> Any:
    """Shapes of arrays that `put` would place, for programs not yet run."""
    return tree if self.is_single else self.shapes(tree, shardings)

  def put(self, tree: Any, shardings: Any = None) -> Any:
    """Arrays that every process has, placed on all devices.

    Args:
      tree: of arrays, the same in every process.
      shardings: a tree like it, or one for all; `of_weights` by default.
    """
    if self.is_single:
      return tree
    return jax.tree.map(_put, tree, self._spread(tree, shardings))

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
    if not self.splits:
      return self.put(rows, self.whole)
    return jax.make_array_from_process_local_data(
        self.batch, rows, (batch_size, *rows.shape[1:]))

  def constrain(self, tree: Any, sharding: NamedSharding) -> Any:
    """Inside of a jitted function: where its arrays are to lie."""
    if self.is_single:
      return tree
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, sharding), tree)

  def after_step(self, state: Any, scalars: Any,
                 shardings: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Inside of a jitted step: its state lies as the one before.

    Args:
      state: after the step.
      scalars: which every device gets.
      shardings: a state -> where it lies.
    """
    if self.is_single:
      return state, scalars
    return (jax.lax.with_sharding_constraint(state, shardings(state)),
            self.constrain(scalars, self.whole))

  def check_batch(self, name: str, batch_size: int) -> None:
    """Raises ValueError unless a batch can be split evenly."""
    if batch_size < 1 or batch_size % self.num_parts:
      raise ValueError(
          f'{name}={batch_size}: must be a multiple of {self.num_parts}, the '
          f'parts into which the {self.mesh.size} devices split a batch')


def _put(leaf, sharding):
  if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
    return leaf
  if sharding.is_fully_addressable:
    return jax.device_put(leaf, sharding)
  # Each process its own part: device_put would gather the whole array from all
  # of them, to compare.
  leaf = np.asarray(leaf)
  return jax.make_array_from_callback(
      leaf.shape, sharding, lambda index: leaf[index])


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


def all_say(value: bool) -> bool:
  """Whether all processes say so."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.process_allgather(np.asarray(value)).all())


def least(value: float) -> float:
  """The least that any process says, in all of them; in float32."""
  if jax.process_count() == 1:
    return value
  return float(multihost_utils.process_allgather(np.float32(value)).min())


def agreed_text(text: str) -> str:
  """What the first process says, in all of them."""
  if jax.process_count() == 1:
    return text
  said = np.frombuffer(text.encode(), np.uint8)
  # Of one length in all processes, as arrays that are exchanged must be.
  length = int(agreed(len(said)))
  padded = np.zeros(length, np.uint8)
  if is_first():
    padded[:] = said
  return agreed(padded).tobytes().decode()
