"""The state of fine-tuning: what is saved, and where it lies."""

from typing import Any

from flax import traverse_util
import flax.struct
import jax

from msfp_jax.base import devices
from msfp_jax.tune import parts
from msfp_jax.tune import student as student_lib
from msfp_jax.tune import trajectories as trajectories_lib


@flax.struct.dataclass
class FinetuneState:
  """Between two updates.

  Attributes:
    step: int32, updates done.
    trainable: banks, router, ranges, biases.
    opt_state: of the optimizer.
    position: where the trajectories stand.
    memory: what the student remembers of them; None, and no field.
  """

  step: jax.Array
  trainable: Any
  opt_state: Any
  position: trajectories_lib.Positions
  memory = None

  def remembering(self, memory: Any) -> 'FinetuneState':
    """The state with another memory, of those that have one."""
    del memory
    return self


@flax.struct.dataclass
class RememberingState(FinetuneState):
  """Of a student that quantizes differences.

  A class of its own: a field that others have no use for would keep their
  earlier checkpoints from being read.
  """

  memory: Any

  def remembering(self, memory):
    return self.replace(memory=memory)


def check_parts(student: student_lib.Student, x: jax.Array, memory: Any,
                accumulate: int) -> None:
  """Looks whether a memory can be cut into parts of a batch.

  Args:
    student: whose memory it is.
    x: `[B, H, W, C]`; its shape counts.
    memory: of all of x.
    accumulate: parts.

  Raises:
    parts.IndivisibleError: inputs of a layer have no row for each sample.
  """
  if accumulate == 1:
    return
  part = jax.eval_shape(student.memory, x[:len(x) // accumulate])
  part = traverse_util.flatten_dict(part)
  odd = sorted({
      '.'.join(path[:-1])
      for path, of_all in traverse_util.flatten_dict(memory).items()
      if part[path].shape[0] * accumulate != of_all.shape[0]})
  if odd:
    raise parts.IndivisibleError(
        f'config.finetune.accumulate={accumulate}: the inputs of layers {odd} '
        'have no row for each sample, and what changes in them is not '
        'remembered in parts; set config.finetune.accumulate=1')


def shardings(layout: devices.Layout, state: FinetuneState) -> FinetuneState:
  """Where a state lies: trajectories as batches, the rest as weights."""
  lie = layout.of_weights(state).replace(
      position=trajectories_lib.shardings(layout, state.position))
  rows = trajectories_lib.rows(state.position)
  # But for inputs that are the same for all samples.
  return lie.remembering(jax.tree.map(
      lambda part: layout.whole if part.shape[0] % rows else layout.batch,
      state.memory))
