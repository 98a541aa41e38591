"""Convolution with packed 4-bit weights on TPUs: implicit GEMM.

A step multiplies the pixels of some rows of an image by one row of the window.
In vector memory the columns of that row of taps lie side by side as channels,
so that a step is one product of depth (taps in a row) x C, and consecutive
steps add up the rows of the window. Only x with its borders, never its patches,
exists in HBM. As in `ops.matmul`, weights are decoded once for each tile
of output channels.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from msfp_jax.kernels import carriers
from msfp_jax.kernels import epilogue
from msfp_jax.kernels.epilogue import Columns
from msfp_jax.kernels.epilogue import Rows
from msfp_jax.kernels.mosaic_tpu import blocks as blocks_lib
from msfp_jax.kernels.mosaic_tpu import decode as decode_lib
from msfp_jax.kernels.mosaic_tpu import terms as terms_lib
from msfp_jax.quant.numbers import FPFormat

# A 3x3 window at stride 1, for the pixels (i, j) of `rows` rows of an image; a,
# b, c are the C channels of three neighbouring pixels, each in lanes of its
# own:
#
#   x, with borders            patches                     weights[t]
#   [rows + 2, width + 2, C]   [pixels, 3 lanes]           [3 lanes, columns]
#
#   . . . . . . .              pixel   tap 0 tap 1 tap 2   tap 0, channel 0..
#   . a b c . . .  row i + t   (i, j)  |  a  |  b  |  c |  tap 1, channel 0..
#   . . . . . . .                                          tap 2, channel 0..
#
# Step t of the grid adds patches of the window's row t times weights[t] to the
# sums. The grid is (tiles of channels, images, rows of an image, t): weights
# are decoded at the first rows of the first image, then stay for all others.


def output_size(size: tuple[int, int], window: tuple[int, int], strides,
                padding) -> tuple[int, int]:
  """The height and width of a convolution's result."""
  return tuple((s + sum(p) - w) // stride + 1 for s, w, stride, p in zip(
      size, window, strides, padding, strict=True))


def conv(x, codes, scale, shift, *, fmt: FPFormat, strides, padding, out_dtype,
         rows: Rows, columns: Columns, groups, group: int, flags,
         flag_group: int, wide: FPFormat | None, cut: blocks_lib.Conv,
         interpret):
  """`mosaic_tpu.ops.conv`, without its checks, cut as `cut` says."""
  batch, channels = x.shape[0], codes.shape[3]
  window = codes.shape[:2]
  out_size = output_size(x.shape[1:3], window, strides, padding)
  packed = codes.shape[2]
  # Halves of whole registers, so that decoded halves join without shifting.
  x, codes = decode_lib.pad_halves(x, codes, decode_lib.ROWS)
  carrier = decode_lib.CARRIERS[x.dtype]
  height = pl.cdiv(out_size[0], cut.rows) * cut.rows
  x = _phases(x, window, strides, padding, (height, cut.width))
  shift = _map_rows(shift, (height, cut.width))
  pixels, depth = cut.rows * cut.width, x.shape[-1]
  read = cut.rows + (window[0] - 1) // strides[0]
  terms = terms_lib.Terms.of(rows, columns)
  rows = jax.tree.map(lambda part: _fill(part[..., None], (
      height, cut.width)).reshape(batch, -1), rows)
  by_column = lambda n: pl.BlockSpec(
      (n, cut.columns), lambda j, b, r, t: (0, j))
  by_group = []
  if flags is not None:
    by_group.append(decode_lib.halves_of_flags(
        flags, flag_group, packed, depth // 2))
  if groups is not None:
    by_group.append(decode_lib.halves(groups, depth // 2 // group))
  by_group_specs = [pl.BlockSpec(
      (1, window[1], 2, part.shape[3], cut.columns),
      lambda j, b, r, t: (jnp.where(
          (b == 0) & (r == 0), t, window[0] - 1), 0, 0, 0, j))
                    for part in by_group]
  shift_rows = pixels if shift.shape[0] > 1 else 1
  taps = window[1] * cut.lanes
  element = pl.Element
  kernel = functools.partial(
      _kernel, fmt=fmt, carrier=carrier, strides=strides, width=cut.width,
      terms=terms, group=group, wide=wide)
  y = pl.pallas_call(
      kernel,
      out_shape=jax.ShapeDtypeStruct(
          (batch, height * cut.width, channels), out_dtype),
      grid=(pl.cdiv(channels, cut.columns), batch, height // cut.rows,
            window[0]),
      in_specs=[
          # Element: an index counts rows, not blocks, as the rows of x that
          # neighbouring blocks of y read overlap. It does not depend on t, so
          # that x is fetched once for all rows of the window.
          pl.BlockSpec(
              tuple(map(element, (1, *strides, read, x.shape[4], depth))),
              lambda j, b, r, t: (b, 0, 0, r * cut.rows, 0, 0)),
          # Fetched for the first pixels only; then the index stands still at
          # the last row of the window, and nothing is fetched any more.
          pl.BlockSpec(
              (1, window[1], depth // 2, cut.columns),
              lambda j, b, r, t: (jnp.where(
                  (b == 0) & (r == 0), t, window[0] - 1), 0, 0, j)),
          *by_group_specs, by_column(1),
          pl.BlockSpec((shift_rows, cut.columns), lambda j, b, r, t: (
              r if shift_rows > 1 else 0, j)),
          *terms.specs(lambda n: pl.BlockSpec(
              (1, pixels, n), lambda j, b, r, t: (b, r, 0)), by_column)],
      out_specs=pl.BlockSpec(
          (1, pixels, cut.columns), lambda j, b, r, t: (b, r, j)),
      scratch_shapes=[
          pltpu.VMEM((window[0], taps, cut.columns), x.dtype),
          pltpu.VMEM((cut.patch_rows(window, strides) * cut.width, taps),
                     x.dtype),
          pltpu.VMEM((pixels, cut.columns), carriers.DTYPES[carrier][1])],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', *['arbitrary'] * 3),
          vmem_limit_bytes=blocks_lib.budget(blocks_lib.generation())),
      interpret=interpret, name=f'conv_{fmt}_{carrier}',
  )(x, codes, *by_group, scale.reshape(1, -1), shift,
    *terms.arrays(rows, columns))
  y = y.reshape(batch, height, cut.width, channels)
  return y[:, :out_size[0], :out_size[1]]


def _phases(x, window, strides, padding, size):
  """Pads x and takes it apart by strides, `[B, sh, sw, rows, columns, C]`.

  Pixel (i * sh + p, j * sw + q) stands at [p, q, i, j], so that a step of the
  window is a step by one at any stride. There are as many rows and columns as
  `size` pixels of the result read.
  """
  (sh, sw), pads = strides, []
  for length, w, stride, (low, _), out in zip(
      x.shape[1:3], window, strides, padding, size, strict=True):
    # The last of `out` pixels reaches (w - 1) // stride rows of a phase beyond
    # its own; times stride, a whole number of each phase.
    needed = (out + (w - 1) // stride) * stride
    pads.append((low, needed - low - length, 0))
  # Negative padding crops what no window reaches.
  x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
  batch, height, width, depth = x.shape
  x = x.reshape(batch, height // sh, sh, width // sw, sw, depth)
  return x.transpose(0, 2, 4, 1, 3, 5)


def _map_rows(shift, size):
  """Lays a shift `[N]` or `[H', W', N]` out as `[1 or height * width, N]`."""
  if shift.ndim == 1:
    return shift.reshape(1, -1)
  return _fill(shift, size).reshape(-1, shift.shape[-1])


def _fill(maps, size):
  """Maps `[..., H', W', C]` with zeros up to a size."""
  # For the rows and columns that are computed in vain and cut off.
  extra = [(0, s - n) for s, n in zip(size, maps.shape[-3:-1], strict=True)]
  return jnp.pad(maps, [*[(0, 0)] * (maps.ndim - 3), *extra, (0, 0)])


def _kernel(x, codes, *refs, fmt, carrier, strides, width, terms, group, wide):
  refs = list(refs)
  flags = refs.pop(0) if wide else None
  groups = refs.pop(0) if group else None
  scale, shift, *more, out, weights, patches, sums = refs
  first = (pl.program_id(1) == 0) & (pl.program_id(2) == 0)
  t, last = pl.program_id(3), weights.shape[0] - 1

  @pl.when(first)
  def _():
    _place_weights(
        codes, weights, t, fmt, carrier, groups, group, flags, wide)

  columns, pixels = codes.shape[1], sums.shape[0]
  place = functools.partial(
      _place_patches, x, patches, columns=columns, strides=strides, width=width)
  if patches.shape[0] > pixels:
    # At stride 1 row t of the window of row i is row 0 of that of row i + t:
    # patches of a few more rows serve all t, from `width` pixels further on
    # each time. `patch_rows` sees to it that this begins at a whole register.
    pl.when(t == 0)(lambda: place(0))
    start = pl.multiple_of(t * width, width)
    pixels_x_taps = patches[pl.ds(start, pixels)]
  else:
    place(t)
    pixels_x_taps = patches[...]
  product = lax.dot(
      pixels_x_taps, weights[t], preferred_element_type=sums.dtype)
  # Chosen, not multiplied by 0: what was there first may be NaN.
  before = sums[...]
  total = product + jnp.where(t == 0, jnp.zeros_like(before), before)
  sums[...] = total

  @pl.when(t == last)
  def _():
    out[0] = epilogue.finish(
        total, scale[...], shift[...], *terms.read(*more)).astype(out.dtype)


def _place_weights(codes, weights, t, fmt, carrier, groups, group, flags, wide):
  """Decodes row t of the window; a tap's channels fill whole registers."""
  _, columns, half, n = codes.shape
  lanes = weights.shape[1] // columns
  for j in range(columns):
    parts = decode_lib.decode(
        codes[0, j], fmt, carrier, flags[0, j] if wide else None, wide)
    if group:
      parts = decode_lib.scaled(parts, groups[0, j], group)
    for i, part in enumerate(parts):
      weights[t, pl.ds(j * lanes + i * half, half)] = part
    # The patches have zeros there, but times a NaN that lay here they are NaN.
    if lanes > 2 * half:
      weights[t, pl.ds(j * lanes + 2 * half, lanes - 2 * half)] = jnp.zeros(
          (lanes - 2 * half, n), weights.dtype)


def _place_patches(x, patches, t, columns, strides, width):
  """Places row t of every pixel's window in `patches`, its taps side by side.

  Where `patches` has rows beyond the result's, t is 0, and its later rows are
  what rows 1, 2, ... of the window read.
  """
  (sh, sw), depth = strides, x.shape[-1]
  pixels, lanes = patches.shape[0], patches.shape[1] // columns
  # lax and not % and //, whose signs the lowering asks a device about.
  phase, first = lax.rem(jnp.int32(t), jnp.int32(sh)), lax.div(
      jnp.int32(t), jnp.int32(sh))
  # Tap j of all pixels is one slice of x: column j // sw of phase j % sw on.
  for j in range(columns):
    taps = x[0, phase, j % sw, pl.ds(first, pixels // width),
             pl.ds(j // sw, width)]
    patches[:, pl.ds(j * lanes, depth)] = taps.reshape(pixels, depth)
    if lanes > depth:
      patches[:, pl.ds(j * lanes + depth, lanes - depth)] = jnp.zeros(
          (pixels, lanes - depth), x.dtype)

