"""The Hopper kernel: y = (sum over taps of x @ decode(w)) * scale + shift.

One persistent grid for matrix products and convolutions alike. A block of the
grid takes 128 output channels, 64 for each of its two computing warpgroups, and
`blocks.rows` rows of y. The third warpgroup fetches tiles of packed weights
and of x by TMA. Weights go from shared memory to registers, where they are
decoded (decode.py) and are wgmma's left operand, which makes the sums those of
y^T; the epilogue transposes them on the way out.

Rows and channels beyond the arrays are zeros to TMA, and are not written.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from msfp_jax.kernels import carriers
from msfp_jax.kernels import epilogue
from msfp_jax.kernels.epilogue import Epilogue
from msfp_jax.kernels.mosaic_gpu import blocks as blocks_lib
from msfp_jax.kernels.mosaic_gpu import registers
from msfp_jax.kernels.mosaic_gpu.blocks import Blocks
from msfp_jax.kernels.mosaic_gpu.blocks import CHANNELS
from msfp_jax.kernels.mosaic_gpu.blocks import WARPGROUP_CHANNELS
from msfp_jax.quant.numbers import FPFormat

# One block, from the left to the right; T = blocks.rows, D = blocks.depth. Of
# the tiles in shared memory there are blocks.stages.
#
#   device memory     shared memory       registers              tensor cores
#
#   codes [N, K/2] -> w [128, D/2] --+--> [64, D/2] -> [64, D] -> wgmma -> acc
#                                    |    packed       decoded      ^    [64, T]
#   x [R, K] -------> x [T, D] ------|------------------------------+
#                                    |                              v
#                                    +--> [64, D/2] -> [64, D] -> wgmma -> acc
#
#   y [M, N] <------- y_smem [2, 2, stored, 64] <--- (acc * scale + shift)^T
#
# Warpgroup 0 has the upper row of registers, warpgroup 1 the lower one.
#
# Why weights on the left: wgmma takes its left operand from registers or shared
# memory, its right one from shared memory only. Weights exist only packed
# there, so decoded ones on the right would have to be written back first.
#
# Barriers, which plgpu's pipeline makes, one pair for each stage: "full", on
# which both TMA copies arrive, and "consumed", on which both computing
# warpgroups arrive after a step. The fetching warpgroup waits for "consumed"
# before it overwrites a stage, the others for "full" before they read it.

# The grid goes through the channels for this many tiles of rows at a time, so
# that neighbours share what they read, through the L2 cache.
_BAND = 8
# Of plgpu.load: an argument until 0.10, deprecated since.
_INDEX = ((),) if jax.__version_info__ < (0, 11) else ()


@dataclasses.dataclass(frozen=True)
class Taps:
  """The rows of x that a row of y sums over: row + i * pitch, i < height.

  TMA reads tiles that begin at multiples of 8 rows, and so is the pitch.
  """

  height: int = 1
  pitch: int = 0


def _tiled(width: int, dtype) -> tuple:
  """The transforms of a tile in shared memory, of rows of `width` elements."""
  # wgmma and TMA know tiles of 8 rows of 32, 64 or 128 bytes, whose 16-byte
  # pieces are permuted by row, so that columns do not meet in one memory bank.
  bits = jnp.dtype(dtype).itemsize * 8
  swizzle = plgpu.find_swizzle(width * bits)
  return (plgpu.TilingTransform((8, swizzle * 8 // bits)),
          plgpu.SwizzleTransform(swizzle))


class Grouped(NamedTuple):
  """What there is for every group of neighbours along K, or None.

  Groups are of 16, 32 or 64; those of scales are alike. With scales, blocks
  are of depth 64.

  Attributes:
    scales: of weights, float32 `[K / group, N']`.
    inputs: scales of x, float32 `[C / group, R]`.
    flags: QuaRTZ's, of weights, uint8 `[K / group, N']`.
  """

  scales: jax.Array | None = None
  inputs: jax.Array | None = None
  flags: jax.Array | None = None

  @property
  def scaled(self) -> bool:
    """Whether the sums of a group are."""
    return self.scales is not None or self.inputs is not None


def product(x, codes, end: Epilogue | None, *, grouped: Grouped,
            fmt: FPFormat, carrier: str, rows: int, taps: Taps, out_dtype,
            blocks: Blocks, multiprocessors: int, base: int = 0, interpret=None
            ) -> jax.Array:
  """Runs the kernel.

  Args:
    x: `[R, C]` in the carrier, R a multiple of 8, C one of blocks.depth.
    codes: uint8 `[N, height * C / 2]` of `prepare`, N a multiple of 64.
    end: None for the plain sums. Scale and columns `[N']`, N' the next multiple
      of 128; rows `[M']`, M' the next multiple of blocks.rows; shift `[N']`, or
      `[N', period + blocks.rows]`, which has for row m of y column m modulo the
      period.
    grouped: what differs by group.
    rows: M, the rows of y, a multiple of 8.
    taps: the rows of x that each sums over.
    out_dtype: float32 or bfloat16; the sums' dtype for plain sums.
    multiprocessors: of the device.
    base: as for `decode.shifted`.
    interpret: plgpu's parameters of the interpreter, or None.

  Returns:
    `[M, N]` in out_dtype; plain sums `[split, M, N]`.
  """
  channels = codes.shape[0]
  depth, tile = blocks.depth, blocks.rows
  acc_dtype = carriers.DTYPES[carrier][1]
  # K is walked as (row of the window, part of a row of x); a block that sums a
  # part of K does steps share * steps and on.
  per_tap = x.shape[1] // depth
  steps = taps.height * per_tap // blocks.split
  tiles = pl.cdiv(channels, CHANNELS), pl.cdiv(rows, tile)
  stored = blocks_lib.stored_rows(
      tile, out_dtype, by_row=end is not None and any(
          part is not None for part in end.rows))
  x_tile = _tiled(depth, x.dtype)
  w_tile = _tiled(depth // 2, codes.dtype)
  part = x_tile[0].tiling[1]  # a swizzled tile of x; of depth 256 a half
  if interpret is None:
    decode = registers.decoder(
        (WARPGROUP_CHANNELS, part // 2), fmt, carrier, base)
  else:
    decode = registers.interpreted(fmt, carrier, base)
  # Rows of scales and of FLAGs for a step: as many as of x or of weights.
  count = lambda part, length: (
      None if part is None else part.shape[0] * depth // length)
  per_step = Grouped(count(grouped.scales, 2 * codes.shape[1]),
                     count(grouped.inputs, x.shape[1]),
                     count(grouped.flags, 2 * codes.shape[1]))
  in_groups = jax.tree.structure(grouped)

  def kernel(w_gmem, x_gmem, end_gmem, grouped_gmem, y_gmem, y_smem,
             levels_smem=None):
    warpgroup = lax.axis_index('warpgroup')
    mine = pl.ds(warpgroup * WARPGROUP_CHANNELS, WARPGROUP_CHANNELS)

    def pipeline(body, context, first_channel=0, first_row=0, first_step=0):

      # Row m of y reads rows m + tap * pitch of x: for each row of the window
      # the tile is the same, moved down. At the end of an image it reaches into
      # the next one; what comes of that is cut off (see `ops.conv`).
      def x_block(step):
        tap, column = lax.div(step, per_tap), lax.rem(step, per_tap)
        return first_row + tap * taps.pitch, column

      # Fetching takes few registers; those that its warpgroup gives back go to
      # the two that hold sums and levels.
      return plgpu.emit_pipeline_warp_specialized(
          body, grid=(steps,), memory_registers=40, wg_axis='warpgroup',
          num_compute_wgs=2, max_concurrent_steps=blocks.stages,
          compute_context=context,
          in_specs=[
              plgpu.BlockSpec(
                  (CHANNELS, depth // 2),
                  lambda k: (first_channel, first_step + k),
                  transforms=w_tile, memory_space=plgpu.SMEM),
              plgpu.BlockSpec(
                  (pl.Element(tile), depth), lambda k: x_block(first_step + k),
                  transforms=x_tile, memory_space=plgpu.SMEM),
              *jax.tree.leaves(beside(x_block, first_channel, first_step))])

    def beside(x_block, first_channel, first_step):
      of_weights = lambda count: count and plgpu.BlockSpec(
          (count, CHANNELS), lambda k: (first_step + k, first_channel),
          memory_space=plgpu.SMEM)
      of_inputs = per_step.inputs and plgpu.BlockSpec(
          (per_step.inputs, pl.Element(tile)),
          lambda k: x_block(first_step + k)[::-1], memory_space=plgpu.SMEM)
      return Grouped(of_weights(per_step.scales), of_inputs,
                     of_weights(per_step.flags))

    def multiply(_, w_smem, x_smem, *rest, group=None):
      *grouped_smem, acc = rest
      # In parts, so that one is decoded while another is multiplied.
      packed = w_smem[mine]
      for start in range(0, depth, part):
        flags = ()
        if per_step.flags:
          each = per_step.flags * part // depth
          first = start * each // part
          flags = [
              load(grouped_smem[-1].at[first + i, mine], registers.BY_CHANNEL
                   ).astype(jnp.int32) for i in range(each)]
        levels = decode(
            packed[:, start // 2:(start + part) // 2], flags, group)
        if interpret is not None:
          levels_smem[warpgroup] = levels
          levels = levels_smem.at[warpgroup]
        plgpu.wgmma(acc, levels, x_smem.at[:, pl.ds(start, part)].T)
      # On return the stage counts as consumed and may be overwritten.
      plgpu.wgmma_wait(0)
      return acc

    def multiply_groups(indices, w_smem, x_smem, *rest):
      *grouped_smem, total = rest
      smem = jax.tree.unflatten(in_groups, grouped_smem)
      # The sums of a group are scaled as they leave the tensor cores, and added
      # in float32. These sum no fewer than 64 products: of a smaller group the
      # levels of the others are 0.
      groups = per_step.scales or per_step.inputs
      for i in range(groups):

        def sums(acc, group=(i, depth // groups)):
          multiply(indices, w_smem, x_smem, *grouped_smem, acc,
                   group=group if groups > 1 else None)
          return acc[...]

        values = pl.run_scoped(sums, plgpu.ACC(
            (WARPGROUP_CHANNELS, tile), acc_dtype)).astype(jnp.float32)
        if smem.scales is not None:
          values *= spread(smem.scales, (i, mine), 0, tile)
        if smem.inputs is not None:
          values *= spread(smem.inputs, (i, slice(None)), 1, tile)
        total += values
      return total

    def channels_of(channel):
      return channel * CHANNELS + warpgroup * WARPGROUP_CHANNELS

    load = lambda ref, layout: plgpu.load(
        ref, *_INDEX, layout=layout, optimized=False)

    def spread(ref, places, axis, width=stored):
      """Loads a vector along one axis of y^T, and repeats it along both."""
      vector = load(ref.at[places], plgpu.Layout.WGMMA.reduce(1 - axis))
      return lax.broadcast_in_dim(vector, (WARPGROUP_CHANNELS, width), (axis,))

    def store(acc, channel, row, summed):
      columns = pl.ds(channels_of(channel), WARPGROUP_CHANNELS)
      # acc is y^T: channels are its first axis.

      if end_gmem is not None:
        by_channel = functools.partial(spread, places=columns, axis=0)
        scales = by_channel(end_gmem.scale)
        if len(end_gmem.shift.shape) == 1:
          shifts = by_channel(end_gmem.shift)
        terms = jax.tree.map(by_channel, end_gmem.columns)
      # The block before may still be on its way out of either slot.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      for i in range(tile // stored):
        y = acc[:, i * stored:(i + 1) * stored]
        if end_gmem is not None:
          if len(end_gmem.shift.shape) == 2:
            # The map goes on for a tile beyond its end (see `ops._product`).
            period = end_gmem.shift.shape[1] - tile
            at = lax.rem(row, period) + i * stored
            shifts = load(end_gmem.shift.at[columns, pl.ds(at, stored)],
                          plgpu.Layout.WGMMA)
          by_row = functools.partial(
              spread, places=pl.ds(row + i * stored, stored), axis=1)
          y = epilogue.finish(
              y, scales, shifts, jax.tree.map(by_row, end_gmem.rows), terms)
        y = plgpu.layout_cast(
            y.astype(out_dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        # One copy may be on its way, from the other slot.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        slot = y_smem.at[warpgroup, i % 2]
        slot.T[...] = y
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(slot, y_gmem.at[
            *summed, pl.ds(row + i * stored, stored), columns])

    nothing = lambda *_, **__: None

    # Tiles and barriers are allocated once, for all turns of the loop below;
    # which are needed is asked of a pipeline that does nothing.
    @functools.partial(
        pl.run_scoped, collective_axes='warpgroup',
        allocations=pipeline(nothing, nothing).get_allocations(
            w_gmem, x_gmem, *jax.tree.leaves(grouped_gmem)))
    def _(allocations):

      # Persistent: no more blocks than multiprocessors, each of which computes
      # tile after tile of y.
      @plgpu.nd_loop((blocks.split * tiles[0] * tiles[1],),
                     collective_axes='block')
      def _(loop):
        share, index = (lax.div(loop.index[0], tiles[0] * tiles[1]),
                        lax.rem(loop.index[0], tiles[0] * tiles[1]))
        channel, row = plgpu.planar_snake(index, tiles, 1, _BAND)

        # Sums live in the computing warpgroups alone: 64 x T values are T / 2
        # registers of each of its 128 threads.
        def compute(evaluate):
          if grouped.scaled:
            total = evaluate(plgpu.layout_cast(
                jnp.zeros((WARPGROUP_CHANNELS, tile), jnp.float32),
                plgpu.Layout.WGMMA))
            store(total, channel, row * tile, ())
            return

          @functools.partial(
              pl.run_scoped,
              acc=plgpu.ACC((WARPGROUP_CHANNELS, tile), acc_dtype))
          def _(acc):
            evaluate(acc)
            store(acc[...], channel, row * tile,
                  (share,) if end_gmem is None else ())

        body = multiply_groups if grouped.scaled else multiply
        pipeline(body, compute, channel, row * tile, share * steps)(
            w_gmem, x_gmem, *jax.tree.leaves(grouped_gmem),
            allocations=allocations)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  shape = (rows, channels)
  if end is None:
    shape = (blocks.split, *shape)
  scratch = [plgpu.SMEM(
      (2, 2, stored, WARPGROUP_CHANNELS), out_dtype,
      transforms=_tiled(WARPGROUP_CHANNELS, out_dtype))]
  options = {}
  # The interpreter's wgmma takes both operands from shared memory.
  if interpret is not None:
    scratch.append(plgpu.SMEM(
        (2, WARPGROUP_CHANNELS, part), x.dtype, transforms=x_tile))
    options['interpret'] = interpret
  call = plgpu.kernel(
      kernel, out_type=jax.ShapeDtypeStruct(shape, out_dtype),
      grid=(min(multiprocessors, blocks.split * tiles[0] * tiles[1]),),
      grid_names=('block',), num_threads=3, thread_name='warpgroup',
      compiler_params=plgpu.CompilerParams(
          lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
      scratch_types=scratch, **options)
  return call(codes, x, end, grouped)
