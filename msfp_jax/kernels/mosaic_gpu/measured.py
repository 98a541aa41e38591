"""What GPUs have measured of this kernel: nothing so far.

Two tables of data, whose rows `python -m benchmarks.gpu` prints as they are to
be written here: the blocks that won among others, and the products that XLA
computes faster. A row counts on the card that it names, for what was measured.
"""

from collections.abc import Iterator
import contextlib
import contextvars
import dataclasses

import jax

from msfp_jax.kernels import slower
from msfp_jax.kernels.mosaic_gpu import blocks as blocks_lib


@dataclasses.dataclass(frozen=True)
class Tuned:
  """Blocks that were measured to be faster than `blocks.ranked` has them.

  Attributes:
    work: what is cut.
    blocks: how.
    device: that measured it, as JAX names its kind; no other is meant.
    versions: of the software there.
    speedup: how many times as long the blocks of `blocks.ranked` take: above 1.

  Raises:
    ValueError: the kernel has no such blocks for this; or with the words of
      `slower.require_measured`.
  """

  work: blocks_lib.Work
  blocks: blocks_lib.Blocks
  device: str
  versions: str
  speedup: float

  def __post_init__(self):
    work = self.work
    if reason := blocks_lib.why_not(
        self.blocks, work.row_length, work.taps, work.out_dtype, work.groups):
      raise ValueError(reason)
    if self.blocks.split > 1 and not work.splittable:
      raise ValueError(f'{self.blocks}: these sums cannot be split')
    slower.require_measured(self, 'speedup')


# Blocks that the formula of blocks.py would not choose.
BLOCKS: tuple[Tuned, ...] = ()
# Products that XLA computes faster, which `choice.pick` leaves to it.
SLOWER: tuple[slower.Slower, ...] = ()


_tried = contextvars.ContextVar('tried', default=())


@contextlib.contextmanager
def trying(*rows: Tuned) -> Iterator[None]:
  """Lets rows count before the table's, for what is traced in this context.

  What was traced before, and what `jax.jit` still has of it, stays as it is.
  """
  token = _tried.set(rows)
  try:
    yield
  finally:
    _tried.reset(token)


def choose(work: blocks_lib.Work) -> blocks_lib.Blocks:
  """The blocks that the default device measured as best; else `ranked`'s."""
  device = jax.devices()[0].device_kind
  for row in (*_tried.get(), *BLOCKS):
    if row.device == device and row.work == work:
      return row.blocks
  return blocks_lib.ranked(work)[0]
