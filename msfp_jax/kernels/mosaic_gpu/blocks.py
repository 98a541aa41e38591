"""Chooses how the Hopper kernel's work is cut into blocks."""

from collections.abc import Iterator
import dataclasses
import math

import jax
import jax.numpy as jnp

# More rows in a block use a decoded weight more often, and fewer blocks fetch
# it; fewer rows give more blocks, where there are multiprocessors to spare. A
# step is deep so that its overhead is small, and shallow so that several stages
# fit.
WARPGROUP_CHANNELS = 64  # what wgmma takes of its left operand
CHANNELS = 2 * WARPGROUP_CHANNELS  # of a block
SHARED_MEMORY = 232_448  # bytes that a block may have
MULTIPROCESSORS = 132  # of an H100 or H200 with NVLink
# What blocks may have: widths of wgmma that int8 takes too, and codes of K.
ROWS = (8, 16, 32, 64, 96, 128, 192, 256)
DEPTHS = (256, 192, 128, 64)
LEAST_DEPTH = DEPTHS[-1]  # to a multiple of which K is padded
SPLITS = (1, 2, 4, 8)
_DEPTH, _FEW_ROWS_DEPTH, _FEW_ROWS = 128, 256, 64
# A step's sums and all before them are both in registers where those are
# scaled by group, and a step is one group, or several. More than these rows
# spill registers (tests/test_aot_gpu.py).
MOST_ROWS_OF_GROUPS, _DEPTH_OF_GROUPS = 128, 64
MOST_ROWS_OF_SMALL_GROUPS, MOST_ROWS_OF_INPUTS = 96, 64
# With 6 stages and FLAGs, blocks of 8 rows spill registers.
_MAX_STAGES, _MAX_STAGES_OF_FLAGS = 6, 5
_BARRIERS = 1024  # bytes, more than they take
# The formula's constants, in the time of one row of 128 channels over 128 codes
# of K: what a step takes without its rows, and adding split sums up in XLA.
_STEP_ROWS = 96
_SPLIT_ROWS = 900
# Up to 64 rows of y pass through shared memory at a time, by bytes a row.
_STORED_BYTES = 128


@dataclasses.dataclass(frozen=True)
class Blocks:
  """One way to cut the work.

  Attributes:
    rows: of y and x in a block, one of ROWS.
    depth: codes of K in a step, one of DEPTHS.
    stages: steps whose tiles are in shared memory at once.
    split: parts of the contraction that are summed apart, for few rows.
  """

  rows: int
  depth: int
  stages: int
  split: int = 1


def stored_rows(rows: int, out_dtype, by_row: bool = False) -> int:
  """The number of rows of y that the epilogue stores at a time.

  Args:
    rows: of a block.
    out_dtype: of y.
    by_row: whether the epilogue has terms by row, which take registers.
  """
  stored = math.gcd(rows, _STORED_BYTES // jnp.dtype(out_dtype).itemsize)
  return max(stored // 2, 8) if by_row else stored


@dataclasses.dataclass(frozen=True)
class Groups:
  """How many neighbours along K share what; 0 where nothing is by group.

  Attributes:
    scaled: a scale, of weights or of x, a multiple of 16.
    flagged: a FLAG, likewise.
    weights, inputs: whether these have scales of groups.
  """

  scaled: int = 0
  flagged: int = 0
  weights: bool = False
  inputs: bool = False

  @property
  def scaled_size(self) -> int:
    """That of a group as a step knows it, of which it has one or more."""
    return math.gcd(self.scaled, _DEPTH_OF_GROUPS)

  @property
  def flagged_size(self) -> int:
    """Neighbours of a step that share a FLAG."""
    return math.gcd(self.flagged, _DEPTH_OF_GROUPS)

  @property
  def most_rows(self) -> int:
    """Of a block, whose registers hold sums, those before, and scales."""
    if not self.scaled:
      return ROWS[-1]
    if self.inputs:
      return MOST_ROWS_OF_INPUTS
    few = self.scaled_size < _DEPTH_OF_GROUPS // 2
    return MOST_ROWS_OF_SMALL_GROUPS if few else MOST_ROWS_OF_GROUPS

  @property
  def most_depth(self) -> int:
    """Of a step, whose registers hold FLAGs as well."""
    if self.scaled:
      return _DEPTH_OF_GROUPS
    return _DEPTH if self.flagged else DEPTHS[0]

  def bytes(self, rows: int) -> int:
    """What 64 codes of K of a block have in shared memory beside them."""
    if self.scaled:
      scales = 4 * (CHANNELS * self.weights + rows * self.inputs) * (
          _DEPTH_OF_GROUPS // self.scaled_size)
    else:
      scales = 0
    return scales + (CHANNELS * _DEPTH_OF_GROUPS // self.flagged_size
                     if self.flagged else 0)


NO_GROUPS = Groups()


def most_stages(rows: int, depth: int, out_dtype, groups: Groups = NO_GROUPS
                ) -> int:
  """The most stages that fit into shared memory beside the epilogue's tiles.

  Args:
    rows, depth: of a block.
    out_dtype: of y.
    groups: of what there is by group.
  """
  # Two slots for each of two warpgroups; then tiles of codes, half a byte each,
  # and of x.
  stored = (4 * stored_rows(rows, out_dtype) * WARPGROUP_CHANNELS
            * jnp.dtype(out_dtype).itemsize)
  free = SHARED_MEMORY - _BARRIERS - stored
  stage = CHANNELS * depth // 2 + rows * depth + (
      groups.bytes(rows) * depth // _DEPTH_OF_GROUPS)
  most = _MAX_STAGES_OF_FLAGS if groups.flagged else _MAX_STAGES
  return min(most, free // stage)


def multiprocessors() -> int:
  """The multiprocessors of the default device; without a GPU, an H100's."""
  return getattr(jax.devices()[0], 'core_count', None) or MULTIPROCESSORS


def why_not(blocks: Blocks, row_length: int, taps: int, out_dtype,
            groups: Groups = NO_GROUPS) -> str | None:
  """Why a product cannot be cut so; None if it can.

  Args:
    blocks: the cut.
    row_length, taps, out_dtype, groups: as of `Work`.
  """
  if groups.scaled and (blocks.depth != _DEPTH_OF_GROUPS or blocks.split > 1):
    return (f'{blocks}: scales of groups ask for a depth of '
            f'{_DEPTH_OF_GROUPS}, and no split')
  if blocks.rows > groups.most_rows or blocks.depth > groups.most_depth:
    return (f'{blocks}: {groups} have registers for at most '
            f'{groups.most_rows} rows and a depth of {groups.most_depth}')
  if blocks.rows not in ROWS or blocks.depth not in DEPTHS:
    return f'{blocks}: rows must be one of {ROWS}, depth of {DEPTHS}'
  if row_length % blocks.depth or (
      taps * row_length // blocks.depth) % blocks.split:
    return (f'{blocks}: rows of {row_length} codes must be whole steps, and '
            f'their number a multiple of the split')
  if blocks.split > 1:
    out_dtype = jnp.float32  # of the plain sums, or int32, which is as wide
  most = most_stages(blocks.rows, blocks.depth, out_dtype, groups)
  if not 1 <= blocks.stages <= most:
    return f'{blocks}: 1 to {most} stages fit into shared memory'
  return None


@dataclasses.dataclass(frozen=True)
class Work:
  """A product, as far as its blocks depend on it.

  Attributes:
    rows: M, of what the kernel is given: a convolution's pixels as they lie in
      x, those between images too.
    channels: N.
    row_length: codes of K in a row of x, a multiple of 64.
    taps: rows of x that go into a row of y.
    out_dtype: of y, its name.
    splittable: whether sums may be split.
    groups: of what there is by group.
  """

  rows: int
  channels: int
  row_length: int
  taps: int = 1
  out_dtype: str = 'bfloat16'
  splittable: bool = True
  groups: Groups = NO_GROUPS

  @property
  def length(self) -> int:
    """K."""
    return self.taps * self.row_length


def candidates(work: Work) -> Iterator[Blocks]:
  """The sensible blocks, one depth for each number of rows and split.

  Sums are split until there is a block for every multiprocessor.
  """
  for tile in ROWS:
    # A tile that is twice as high as y is worse than the one before.
    if tile > ROWS[0] and tile >= 2 * work.rows:
      break
    if tile > work.groups.most_rows:
      break
    most = _FEW_ROWS_DEPTH if tile <= _FEW_ROWS else _DEPTH
    most = min(most, work.groups.most_depth)
    depth = next(
        d for d in DEPTHS if d <= most and work.row_length % d == 0)
    # Splits end where they would make two blocks for every multiprocessor.
    whole = math.ceil(work.rows / tile) * math.ceil(work.channels / CHANNELS)
    for split in SPLITS:
      if split > 1 and (
          not work.splittable or work.groups.scaled
          or whole * split >= 2 * multiprocessors()):
        break
      if work.length // depth % split == 0:
        dtype = jnp.float32 if split > 1 else work.out_dtype
        stages = most_stages(tile, depth, dtype, work.groups)
        yield Blocks(tile, depth, stages, split)


def cost(blocks: Blocks, work: Work, processors: int) -> float:
  """The time by a formula, in that of one row: waves of blocks by their steps.

  Not measured yet: what a device has measured goes before it (measured.py).

  Args:
    blocks: the cut.
    work: what is cut.
    processors: multiprocessors of the device.
  """
  blocks_count = (blocks.split * math.ceil(work.rows / blocks.rows)
                  * math.ceil(work.channels / CHANNELS))
  # 133 blocks on 132 multiprocessors take as long as 264 would.
  waves = math.ceil(blocks_count / processors)
  steps = work.length / _DEPTH / blocks.split
  return (waves * steps * (blocks.rows + _STEP_ROWS)
          + (_SPLIT_ROWS if blocks.split > 1 else 0))


def ranked(work: Work) -> list[Blocks]:
  """The candidates, those of the least `cost` on the default device first."""
  processors = multiprocessors()
  return sorted(candidates(work),
                key=lambda blocks: cost(blocks, work, processors))
