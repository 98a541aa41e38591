"""Products of packed 4-bit weights on TPUs (Pallas, Mosaic).

Weights stay packed in HBM and are decoded in vector memory to the carrier of
the activations, once for each tile of output channels: the tile's decoded
weights lie in scratch memory while all rows of x pass by. The sums are scaled,
shifted and rounded before they leave it.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from msfp_jax.kernels import carriers
from msfp_jax.kernels import checks
from msfp_jax.kernels import epilogue
from msfp_jax.kernels.epilogue import Columns
from msfp_jax.kernels.epilogue import Rows
from msfp_jax.kernels.mosaic_tpu import blocks as blocks_lib
from msfp_jax.kernels.mosaic_tpu import conv as mosaic_tpu_conv
from msfp_jax.kernels.mosaic_tpu import decode as decode_lib
from msfp_jax.kernels.mosaic_tpu import limits
from msfp_jax.kernels.mosaic_tpu import terms as terms_lib
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qtensor import QTensor

weight_unit, weight_base = decode_lib.weight_unit, decode_lib.weight_base
why_not = limits.why_not
why_not_groups = limits.why_not_groups
why_not_input_groups = limits.why_not_input_groups
why_not_shifts = checks.shifts
LAYOUT = layout_lib.Nibbles
CARRIERS_OF_GROUPS, SCALES_INPUTS = ('bf16',), False


def carriers_of(device_kind: str) -> tuple[str, ...]:
  """Carriers in the order of preference."""
  chip = blocks_lib.KINDS.get(device_kind)
  if chip is None:
    return 'int8', 'bf16'
  return blocks_lib.CHIPS[chip].carriers


def lay_out(weight: QTensor) -> QTensor:
  """Weights as the kernels read them, which is as they are stored."""
  return weight


# One step (j, i, k) of the product: columns j, rows i, part k of K. k runs
# fastest, j slowest.
#
#   HBM                VMEM                                 matrix unit
#   codes [K/2, N] --> [half, columns], while i == 0
#                         | decode low and high nibbles
#                         v
#                      weights[k] [2 half, columns] ----+
#                         kept for all i                v
#   x [M, K] --------> [rows, half] low  ------------> dot --> + --> sums
#            --------> [rows, half] high ------------> dot     ^      |
#                                                              +------+ k > 0
#   y [M, N] <-------- [rows, columns] <-- * scale + shift <-- k == steps - 1
#
# A step's fetches run while the step before multiplies, which takes two buffers
# for everything that is fetched or written.


def matmul(x, codes, scale, shift, *, fmt: FPFormat, out_dtype,
           rows: Rows = epilogue.NO_ROWS,
           columns: Columns = epilogue.NO_COLUMNS,
           groups=None, group: int = 0,
           flags=None, flag_group: int = 0, wide: FPFormat | None = None,
           blocks: tuple[int, int, int] | None = None, interpret=False):
  """(x @ weights) * scale + shift, and what `epilogue.finish` has beside it.

  Args:
    x: `[M, K]`, levels in the carrier: int8, bfloat16 or float8_e4m3fn.
    codes: uint8 `[ceil(K / 2), N]`, from `layout.pack_halves`.
    scale: float32 `[N]`; where the carrier is fp8, divided by `weight_unit`.
    shift: float32 `[N]`.
    fmt: of the weights, of 4 bits.
    out_dtype: float32 or bfloat16.
    rows, columns: of the epilogue, `[M]` and `[N]`.
    groups: float32 `[ceil(K / group), N]`, scales of the weights such that
      bfloat16 holds a level times its scale; or None.
    group: how many along K share one of them; halves of K are whole groups.
    flags: uint8 `[ceil(K / flag_group), N]`, by which levels are shifted to
      the left; or None.
    flag_group: how many along K share one of them.
    wide: with flags, what shifted levels are.
    blocks: rows, columns, and the most packed rows of a step; else those of
      `blocks.MATMUL`.
    interpret: as in `pl.pallas_call`.

  Returns:
    `[M, N]`, summed in int32 (int8) or float32, scaled and shifted in float32.

  Raises:
    ValueError: with the words of `why_not`.
  """
  _check('matmul', x, codes, fmt=fmt, out_dtype=out_dtype, blocks=blocks,
         group=group, flag_group=flag_group, wide=wide, groups=groups,
         flags=flags)
  (m, _), (packed, n) = x.shape, codes.shape
  cut = limits.cut(x, codes, out_dtype, blocks, blocks_lib.generation(),
                   limits.beside(group, flag_group))
  x, codes = decode_lib.pad_halves(x, codes, cut.half * cut.steps)
  height, width, half, steps = cut.rows, cut.columns, cut.half, cut.steps
  # With packed rows k of the low and high nibbles come channels k and k + K/2
  # of x. If a step has all of K, that is x as it is, and one product; else x is
  # passed twice, and its two views are `steps` blocks apart.
  if steps == 1:
    x_specs = [pl.BlockSpec((height, 2 * half), lambda j, i, k: (i, 0))]
  else:
    x_specs = [
        pl.BlockSpec((height, half), lambda j, i, k: (i, k)),
        pl.BlockSpec((height, half), lambda j, i, k: (i, steps + k))]
  more = terms_lib.Terms.of(rows, columns)
  by_group = []
  if flags is not None:
    by_group.append(decode_lib.halves_of_flags(
        flags, flag_group, packed, half * steps))
  if groups is not None:
    by_group.append(decode_lib.halves(groups, half * steps // group))
  # As codes are cut: halves of steps of groups.
  by_group = [part.reshape(2, steps, -1, n) for part in by_group]
  by_group_specs = [pl.BlockSpec(
      (2, 1, part.shape[2], width), lambda j, i, k: (
          0, jnp.where(i == 0, k, steps - 1), 0, j)) for part in by_group]
  by_column = lambda n: pl.BlockSpec((n, width), lambda j, i, k: (0, j))
  carrier = decode_lib.CARRIERS[x.dtype]
  sums = carriers.DTYPES[carrier][1]
  return pl.pallas_call(
      functools.partial(_matmul_kernel, fmt=fmt, carrier=carrier, steps=steps,
                        terms=more, group=group, wide=wide),
      out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
      grid=(pl.cdiv(n, width), pl.cdiv(m, height), steps),
      in_specs=[
          *x_specs,
          # Fetched for the first rows only. Pallas fetches a block when its
          # index differs from the step before; afterwards it stays at the last
          # one, so that codes leave HBM once, however many rows x has.
          pl.BlockSpec((half, width), lambda j, i, k: (
              jnp.where(i == 0, k, steps - 1), j)),
          *by_group_specs, by_column(1), by_column(1),
          *more.specs(lambda n: pl.BlockSpec(
              (height, n), lambda j, i, k: (i, 0)), by_column)],
      out_specs=pl.BlockSpec((height, width), lambda j, i, k: (i, j)),
      scratch_shapes=[
          pltpu.VMEM((steps, 2 * half, width), x.dtype),
          pltpu.VMEM((height, width), sums)],
      compiler_params=pltpu.CompilerParams(
          # Only j may be shared out between cores: rows after the first read
          # what those left in scratch memory, and so do the parts of a sum.
          dimension_semantics=('parallel', 'arbitrary', 'arbitrary'),
          vmem_limit_bytes=blocks_lib.budget(blocks_lib.generation())),
      interpret=interpret, name=f'matmul_{fmt}_{carrier}',
  )(*[x] * len(x_specs), codes, *by_group, scale.reshape(1, -1),
    shift.reshape(1, -1), *more.arrays(rows, columns))


def _matmul_kernel(*refs, fmt, carrier, steps, terms, group, wide):
  x_refs, (codes, *refs) = refs[:min(steps, 2)], refs[min(steps, 2):]
  flags = refs.pop(0) if wide else None
  groups = refs.pop(0) if group else None
  scale, shift, *more, out, weights, sums = refs
  k = pl.program_id(2)

  @pl.when(pl.program_id(1) == 0)
  def _():
    parts = decode_lib.decode(
        codes[...], fmt, carrier, flags[:, 0] if wide else None, wide)
    if group:
      parts = decode_lib.scaled(parts, groups[:, 0], group)
    weights[k] = jnp.concatenate(parts)

  half = codes.shape[0]
  dot = functools.partial(lax.dot, preferred_element_type=sums.dtype)
  if steps == 1:
    total = dot(x_refs[0][...], weights[0])
  else:
    total = (dot(x_refs[0][...], weights[k, :half])
             + dot(x_refs[1][...], weights[k, half:]))
    # Chosen, not multiplied by 0: what was there first may be NaN.
    before = sums[...]
    total += jnp.where(k == 0, jnp.zeros_like(before), before)
    sums[...] = total

  # The index of y's block is the same for all k: it leaves for HBM once.
  @pl.when(k == steps - 1)
  def _():
    out[...] = epilogue.finish(
        total, scale[...], shift[...], *terms.read(*more)).astype(out.dtype)


def conv(x, codes, scale, shift, *, fmt: FPFormat, strides, padding, out_dtype,
         rows: Rows = epilogue.NO_ROWS,
         columns: Columns = epilogue.NO_COLUMNS,
         groups=None, group: int = 0,
         flags=None, flag_group: int = 0, wide: FPFormat | None = None,
         blocks: tuple[int, int] | None = None, interpret=False):
  """A 2-D convolution of x and weights, times scale, plus shift.

  Args:
    x: `[B, H, W, C]`, levels in the carrier: int8, bfloat16 or float8_e4m3fn.
    codes: uint8 `[kh, kw, ceil(C / 2), N]`, from `layout.pack_halves`.
    scale: float32 `[N]`; where the carrier is fp8, divided by `weight_unit`.
    shift: float32 `[N]`, or `[H', W', N]` for every image.
    fmt: of the weights, of 4 bits.
    strides: down and to the right.
    padding: zeros ((above, below), (left, right)).
    out_dtype: float32 or bfloat16.
    rows, columns: of the epilogue, `[B, H', W']` and `[N]`.
    groups: float32 `[kh, kw, ceil(C / group), N]`, or None.
    flags: uint8 `[kh, kw, ceil(C / flag_group), N]`, or None.
    group, flag_group, wide: as for `matmul`.
    blocks: output pixels and channels of a step; else those of `blocks.CONV`.
    interpret: as in `pl.pallas_call`.

  Returns:
    `[B, H', W', N]`, computed as by `matmul`.

  Raises:
    ValueError: with the words of `why_not`.
  """
  strides, padding = tuple(strides), tuple(map(tuple, padding))
  _check('conv', x, codes, fmt=fmt, out_dtype=out_dtype, blocks=blocks,
         strides=strides, padding=padding, group=group, flag_group=flag_group,
         wide=wide, groups=groups, flags=flags)
  # A 1x1 window needs no patches: its pixels are rows of a product, at strides
  # every other one. Only a map of shifts is beyond `matmul`.
  if limits.is_matmul(codes, padding) and shift.ndim == 1:
    x = x[:, ::strides[0], ::strides[1]]
    y = matmul(x.reshape(-1, x.shape[-1]), codes[0, 0], scale, shift, fmt=fmt,
               out_dtype=out_dtype, interpret=interpret, columns=columns,
               groups=None if groups is None else groups[0, 0], group=group,
               flags=None if flags is None else flags[0, 0],
               flag_group=flag_group, wide=wide,
               rows=jax.tree.map(lambda part: part.reshape(-1), rows))
    return y.reshape(*x.shape[:3], -1)
  return mosaic_tpu_conv.conv(
      x, codes, scale, shift, fmt=fmt, strides=strides, padding=padding,
      out_dtype=out_dtype, rows=rows, columns=columns, groups=groups,
      group=group, flags=flags, flag_group=flag_group, wide=wide,
      interpret=interpret, cut=limits.cut_conv(
          x, codes, strides, padding, out_dtype, blocks,
          blocks_lib.generation(), limits.beside(group, flag_group)))


def _check(op, x, codes, *, groups, flags, **settings):
  if reason := checks.together(
      groups, settings['group'], flags, settings['flag_group'],
      settings['wide']) or why_not(op, x, codes, **settings):
    raise ValueError(reason)
