"""Products of packed 4-bit weights on Hopper GPUs (Pallas, Mosaic GPU).

Weights stay packed in device memory, in a layout of their own (`prepare`), and
are decoded in registers to int8 or float8_e4m3fn. A convolution is a matrix
product whose K runs over the window: XLA lays the columns of the window side by
side, as channels, and the kernel walks down its rows. With strides XLA lays
out the whole window. QuaRTZ's FLAGs shift levels in registers; scales of groups
multiply a group's sums.

The kernel is kernel.py, the layout of the weights decode.py, how they are
decoded in registers registers.py; what is not taken limits.py says.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from msfp_jax.kernels import carriers
from msfp_jax.kernels import checks
from msfp_jax.kernels import epilogue
from msfp_jax.kernels.epilogue import Columns
from msfp_jax.kernels.epilogue import Epilogue
from msfp_jax.kernels.epilogue import Rows
from msfp_jax.kernels.mosaic_gpu import blocks as blocks_lib
from msfp_jax.kernels.mosaic_gpu import decode as decode_lib
from msfp_jax.kernels.mosaic_gpu import kernel as kernel_lib
from msfp_jax.kernels.mosaic_gpu import layout as layout_lib
from msfp_jax.kernels.mosaic_gpu import limits
from msfp_jax.kernels.mosaic_gpu import measured
from msfp_jax.quant.numbers import FPFormat

# TMA reads tiles of 8 rows, and rows of multiples of 16 bytes.
_ROWS, _TMA_BYTES = 8, 16

prepare, weight_base = decode_lib.prepare, decode_lib.weight_base
lay_out = layout_lib.lay_out
why_not, why_not_groups = limits.why_not, limits.why_not_groups
why_not_input_groups = limits.why_not_input_groups
why_not_shifts = limits.why_not_shifts
LAYOUT = layout_lib.Hopper
# Inputs with scales of groups are levels, and the kernel scales their sums.
CARRIERS_OF_GROUPS, SCALES_INPUTS = ('int8', 'fp8'), True


def carriers_of(device_kind: str) -> tuple[str, ...]:
  """Carriers in the order of preference; the same for all of the kind."""
  del device_kind
  return 'int8', 'bf16'


def weight_unit(fmt: FPFormat, carrier: str) -> float:
  """The unit of the kernels' weights: what they have for level step(fmt).

  1 for all formats of 4 bits but UE4M0 in int8 and in fp8.
  """
  return carriers.step(fmt) / carriers.carry(fmt, carrier).unit


def matmul(x, codes, scale, shift, *, fmt: FPFormat, out_dtype,
           rows: Rows = epilogue.NO_ROWS,
           columns: Columns = epilogue.NO_COLUMNS,
           groups=None, group: int = 0, inputs=None, input_group: int = 0,
           flags=None, flag_group: int = 0, wide: FPFormat | None = None,
           blocks: blocks_lib.Blocks | None = None, interpret=False):
  """(x @ weights) * scale + shift, and what `epilogue.finish` has beside it.

  Args:
    x: `[M, K]`, levels in the carrier: int8 or float8_e4m3fn.
    codes: uint8 `[N', K' / 2]`, from `prepare`.
    scale: float32 `[N]`.
    shift: float32 `[N]`.
    fmt: of the weights, of 4 bits.
    out_dtype: float32 or bfloat16.
    rows, columns: of the epilogue, `[M]` and `[N]`.
    groups: float32 `[ceil(K / group), N]`, scales of the weights; or None.
    group: how many along K share one of them, a multiple of 16.
    inputs: float32 `[M, ceil(K / input_group)]`, scales of x; or None.
    input_group: as `group`, of x.
    flags: uint8 `[ceil(K / flag_group), N]`, of QuaRTZ's weights, which are
      shifted by them, 0 to 4; or None.
    flag_group: how many along K share one of them, a multiple of 16.
    wide: the integers that shifted weights are, of at most 8 bits.
    blocks: how to cut the work; else as `measured.choose` says.
    interpret: run on any device, slowly, in Pallas's interpreter of GPUs. That
      has no register operands: decoding is the same bit expression in JAX.
      Needs jax 0.11.

  Returns:
    `[M, N]`, summed in int32 (int8, exact) or float32, then scaled and shifted
    in float32. As in XLA, a compiler may round product and sum as one.

  Raises:
    ValueError: with the words of `why_not`.
  """
  _check('matmul', x, codes, fmt=fmt, out_dtype=out_dtype, blocks=blocks,
         group=group, input_group=input_group, flag_group=flag_group,
         wide=wide, interpret=interpret, groups=groups, flags=flags)
  # Rows to a multiple of 8; K to that of the codes, which `prepare` padded by
  # level 0.
  length, row_length = x.shape[0], 2 * codes.shape[1]
  x = jnp.pad(x, ((0, -length % _ROWS), (0, row_length - x.shape[1])))
  sizes = limits.groups_of(group, input_group, flag_group)
  if inputs is not None:
    inputs = _along(inputs, -1, input_group, sizes.scaled_size, row_length)
    inputs = jnp.pad(inputs, ((0, -length % _ROWS), (0, 0))).T
  y = _product(x, codes, Epilogue(scale, shift, rows, columns), x.shape[0],
               kernel_lib.Taps(), fmt, wide, out_dtype, blocks, interpret,
               _grouped(groups, group, inputs, flags, flag_group, row_length,
                        sizes), sizes)
  return y[:length]


def conv(x, codes, scale, shift, *, fmt: FPFormat, strides, padding, out_dtype,
         rows: Rows = epilogue.NO_ROWS,
         columns: Columns = epilogue.NO_COLUMNS,
         groups=None, group: int = 0, inputs=None, input_group: int = 0,
         flags=None, flag_group: int = 0, wide: FPFormat | None = None,
         blocks: blocks_lib.Blocks | None = None, interpret=False):
  """A 2-D convolution of x and weights, times scale, plus shift.

  Args:
    x: `[B, H, W, C]`, levels in the carrier: int8 or float8_e4m3fn.
    codes: uint8 `[N', kh, kw, C' / 2]`, from `prepare`.
    scale: float32 `[N]`.
    shift: float32 `[N]`, or `[H', W', N]` for every image.
    fmt: of the weights, of 4 bits.
    strides: down and to the right.
    padding: zeros ((above, below), (left, right)).
    rows, columns: of the epilogue, `[B, H', W']` and `[N]`.
    groups: float32 `[kh, kw, ceil(C / group), N]`, or None.
    inputs: float32 `[B, H, W, ceil(C / input_group)]`, or None.
    flags: uint8 `[kh, kw, ceil(C / flag_group), N]`, or None.
    group, input_group, flag_group, wide: as for `matmul`.
    out_dtype, blocks, interpret: as for `matmul`.

  Returns:
    `[B, H', W', N]`, computed as by `matmul`.

  Raises:
    ValueError: with the words of `why_not`.
  """
  strides, padding = tuple(strides), tuple(map(tuple, padding))
  _check('conv', x, codes, fmt=fmt, out_dtype=out_dtype, strides=strides,
         padding=padding, blocks=blocks, group=group,
         input_group=input_group, flag_group=flag_group, wide=wide,
         interpret=interpret, groups=groups, flags=flags)
  window, row_length = codes.shape[1:3], 2 * codes.shape[3]
  size = limits.output_size(x.shape[1:3], window, strides, padding)
  x = jnp.pad(x, ((0, 0),) * 3 + ((0, row_length - x.shape[3]),))
  sizes = limits.groups_of(group, input_group, flag_group)
  if inputs is not None:
    # As x itself, with groups for channels.
    inputs = _along(inputs, -1, input_group, sizes.scaled_size, row_length)
    inputs = _lay_out(inputs, window, strides, padding, size)[0]
    inputs = inputs.reshape(-1, inputs.shape[3])
    inputs = jnp.pad(inputs, ((0, -len(inputs) % _ROWS), (0, 0))).T
  # From here on a convolution is a product of rows of pixels: all images below
  # each other, `image` rows of `pitch` pixels each, with the window's columns
  # as channels. A row of y sums over `height` rows of x, each `pitch` further.
  x, height = _lay_out(x, window, strides, padding, size)
  batch, image, pitch, _ = x.shape
  x = x.reshape(-1, x.shape[3])
  length = x.shape[0]
  x = jnp.pad(x, ((0, -length % _ROWS), (0, 0)))
  # All by as many rows of y as an image of x has, those that are cut off too.
  around = (0, image - size[0]), (0, pitch - size[1])
  if shift.ndim == 3:
    # The same map for every image.
    shift = jnp.pad(shift, (*around, (0, 0))).reshape(image * pitch, -1)
  rows = jax.tree.map(
      lambda part: jnp.pad(part, ((0, 0), *around)).reshape(-1), rows)
  y = _product(x, codes.reshape(codes.shape[0], -1),
               Epilogue(scale, shift, rows, columns), x.shape[0],
               kernel_lib.Taps(height, pitch), fmt, wide, out_dtype, blocks,
               interpret,
               _grouped(groups, group, inputs, flags, flag_group, row_length,
                        sizes), sizes)
  # Below and beside each image lie pixels whose windows left it.
  y = y[:length].reshape(batch, image, pitch, -1)
  return y[:, :size[0], :size[1]]


def _lay_out(x, window, strides, padding, size):
  """Lays a window's columns side by side as channels, with strides all of it.

  Args:
    x: `[B, H, W, C]`.
    window, strides, padding: of the convolution.
    size: (H', W').

  Returns:
    `[B, H + padding, W', kw * C]`, which ends in rows of zeros for the next
    image to begin with, and kh; with strides `[B, H', W', kh * kw * C]` and 1.
    W' is rounded up to a multiple of 8.
  """
  (above, below), (left, right) = padding
  # Two images of 2 rows, padded by 1, to the kernel (o: zeros, x: pixels):
  #
  #   rows   0  o o o o   above image 0
  #          1  x x x x
  #          2  x x x x
  #          3  o o o o   below image 0 and above image 1
  #          4  x x x x
  #          5  x x x x
  #   beyond    o o o o   the array has ended, which TMA reads as zeros
  #
  # Rows 0 and 1 of y are image 0's. Row 2 mixes images and is cut off.
  single = strides == (1, 1)
  if single and min(above, below) < window[0]:
    # The zeros above the next image are also those below this one. With more
    # padding than a window y has more rows than would be left for it here.
    below = max(below - above, 0)
  x = jnp.pad(x, ((0, 0), (above, below), (left, right), (0, 0)))
  take = lambda x, axis, start: jax.lax.slice_in_dim(
      x, start, start + (size[axis - 1] - 1) * strides[axis - 1] + 1,
      strides[axis - 1], axis)
  # [B, H, W, C] -> [B, H, W', kw C]: kw copies in device memory, not kh kw.
  x = jnp.concatenate([take(x, 2, j) for j in range(window[1])], axis=-1)
  x = jnp.pad(x, ((0, 0), (0, 0), (0, -size[1] % _ROWS), (0, 0)))
  if single:
    return x, window[0]
  # With strides the rows of a window are no longer one pitch apart.
  x = jnp.concatenate([take(x, 1, i) for i in range(window[0])], axis=-1)
  return x, 1


def _grouped(groups, group, inputs, flags, flag_group, row_length, sizes):
  """What differs by group, as the kernel reads it; `inputs` already is.

  FLAGs of a contraction that needs no padding are what they are in a file.
  """

  def of_weights(part, group, size):
    if part is None:
      return None
    part = _along(part, -2, group, size, row_length)
    part = part.reshape(-1, part.shape[-1])
    return _lengthened(part, 1, -part.shape[1] % _TMA_BYTES)

  return kernel_lib.Grouped(
      of_weights(groups, group, sizes.scaled_size), inputs,
      of_weights(flags, flag_group, sizes.flagged_size))


def _along(part, axis, group, size, row_length):
  """An entry for each `group` along K -> one for each `size`, for all of K."""
  if group != size:
    part = jnp.repeat(part, group // size, axis=axis)
  count, axis = row_length // size, part.ndim + axis
  if part.shape[axis] > count:
    part = jax.lax.slice_in_dim(part, 0, count, axis=axis)
  return _lengthened(part, axis, count - part.shape[axis])


def _lengthened(part, axis, missing):
  """Zeros behind an axis; the array itself where none are missing."""
  if not missing:
    return part
  widths = [(0, 0)] * part.ndim
  widths[axis] = (0, missing)
  return jnp.pad(part, widths)


def _product(x, codes, end, length, taps, fmt, wide, out_dtype, blocks,
             interpret, grouped, sizes):
  """Runs the kernel on rows of pixels `[R, C]`, with what is left to XLA."""
  channels = end.scale.shape[0]
  carrier = limits.CARRIERS[np.dtype(x.dtype)]
  if blocks is None:
    blocks = measured.choose(blocks_lib.Work(
        length, channels, x.shape[1], taps.height, jnp.dtype(out_dtype).name,
        end.shift.ndim == 1, sizes))
  call = functools.partial(
      kernel_lib.product, x, codes, fmt=fmt, carrier=carrier, rows=length,
      taps=taps, blocks=blocks, grouped=grouped,
      base=weight_base(wide, carrier) if wide else 0,
      multiprocessors=blocks_lib.multiprocessors(),
      interpret=plgpu.InterpretGPUParams() if interpret else None)
  if blocks.split > 1:
    # Exact in int32, whatever the order, so that nothing depends on the split.
    sums = call(None, out_dtype=carriers.DTYPES[carrier][1]).sum(0)
    by_row = jax.tree.map(lambda part: jnp.pad(
        part, (0, length - part.shape[0]))[:, None], end.rows)
    y = epilogue.finish(sums[:, :channels], *end[:2], by_row, end.columns)
    return y.astype(out_dtype)
  y = call(_whole_blocks(end, length, blocks.rows, carrier,
                         grouped.scaled), out_dtype=out_dtype)
  return y[:, :channels]


def _whole_blocks(end, length, tile, carrier, grouped):
  """The epilogue for whole blocks: loads do not end where an array does."""
  beyond = (0, -end.scale.shape[0] % blocks_lib.CHANNELS)
  shift = end.shift
  if shift.ndim == 2:
    # Tiles of rows run on from the end of the map to its beginning.
    period = shift.shape[0]
    shift = shift[np.arange(period + tile) % period].T
  whole = lambda part: jnp.pad(part, [beyond] + [(0, 0)] * (part.ndim - 1))
  rows, columns = end.rows, jax.tree.map(whole, end.columns)
  rows = jax.tree.map(lambda part: jnp.pad(
      part, (0, -(-length // tile) * tile - part.shape[0])), rows)
  if rows.total is not None:
    # In the type of the sums, that the kernel has nothing to convert.
    exact = jnp.float32 if grouped else carriers.DTYPES[carrier][1]
    rows = rows._replace(total=rows.total.astype(exact))
    columns = columns._replace(offset=columns.offset.astype(exact))
  return Epilogue(whole(end.scale), whole(shift), rows, columns)


def _check(op, x, codes, *, groups, flags, **settings):
  if reason := checks.together(
      groups, settings['group'], flags, settings['flag_group'],
      settings['wide']) or limits.why_not(op, x, codes, **settings):
    raise ValueError(reason)
