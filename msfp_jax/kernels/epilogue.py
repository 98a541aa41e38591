"""What a chip's kernel does to its sums before it writes them.

A kernel sums v_x times codes' levels. What turns the sums into the layer's
outputs (see `product`) differs by row of the result (a token, a pixel, or all
pixels of an image), by column (an output channel), or by both:

    y = (sums - total_r offset_c) (scale_r scale_c)
        + shift_r shift_c + bias_c
        + zero_r zero_c

Whatever is absent costs nothing: most layers have one scale for the input and
weights without zero points, for which y = sums scale_c + shift_c.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from msfp_jax.kernels import carriers
from msfp_jax.kernels import product
from msfp_jax.kernels.carriers import Operand
from msfp_jax.quant.geometry import Geometry
from msfp_jax.quant.qtensor import QTensor


class Rows(NamedTuple):
  """What differs by row, each float32 `[M]` or None; of images `[B, H', W']`.

  Attributes:
    scale: that of a row's inputs.
    shift: their zero, which multiplies the sums of the weights.
    total: the sum of v_x, an integer: what weights without their offset add.
    zero: the sum of the inputs, which multiplies the zero of the weights.
  """

  scale: jax.Array | None = None
  shift: jax.Array | None = None
  total: jax.Array | None = None
  zero: jax.Array | None = None


class Columns(NamedTuple):
  """What goes with `Rows`, each float32 `[N]`, or None.

  Attributes:
    bias: where `Rows.shift` is.
    offset: where `Rows.total` is, an integer times the unit of the weights.
    zero: where `Rows.zero` is.
  """

  bias: jax.Array | None = None
  offset: jax.Array | None = None
  zero: jax.Array | None = None


NO_ROWS, NO_COLUMNS = Rows(), Columns()


class Epilogue(NamedTuple):
  """All that `finish` takes beside the sums.

  Attributes:
    scale: float32 `[N]`.
    shift: float32 `[N]`, or `[H', W', N]` for every image.
    rows: see `Rows`.
    columns: see `Columns`.
  """

  scale: jax.Array
  shift: jax.Array
  rows: Rows = NO_ROWS
  columns: Columns = NO_COLUMNS


def finish(sums: jax.Array, scale: jax.Array, shift: jax.Array, rows: Rows,
           columns: Columns) -> jax.Array:
  """The outputs, float32; inside of a kernel or not.

  Args:
    sums: int32 or float32, of any shape to which the others broadcast.
    scale, shift, rows, columns: as in `Epilogue`.
  """
  if rows.total is not None:
    # In the type of the sums. Of int8 this is exact: afterwards, in float32,
    # it would be a difference of two large numbers.
    exact = lambda part: part.astype(sums.dtype)
    sums = sums - exact(rows.total) * exact(columns.offset)
  y = sums.astype(jnp.float32) * (
      scale if rows.scale is None else rows.scale * scale)
  y += shift if rows.shift is None else rows.shift * shift + columns.bias
  return y if rows.zero is None else y + rows.zero * columns.zero


def make(x: Operand, w: QTensor, bias: jax.Array | None,
         geometry: Geometry | None, carrier: str,
         tap_sums: jax.Array | None, unit: float, base: int) -> Epilogue:
  """The epilogue of a layer whose scales leave the sum.

  Args:
    x: `[B, *spatial, I]` or `[..., I]`.
    w: `[*window, I, O]`, packed, with a scale for each output channel; scales
      of groups are the kernel's.
    bias: `[O]`, or None.
    geometry: of a convolution; None for a dense layer.
    carrier: of both.
    tap_sums: sums of v_w over I, `[*window, O]`, if they are known.
    unit: what the kernel has for a step of the weights' numbers.
    base: steps that the kernel takes off every level.
  """
  window, outputs = w.window, w.scale.shape[-1]
  carried = carriers.carry(w.numbers, carrier)
  # Scales of groups are inside of the sums; one before them all is not.
  grouped = not product.weights_leave(w)
  own = w.scales() if not grouped else jnp.float32(
      1) if w.outer is None else w.outer
  whole = own * carried.unit
  offset = carried.offset(own, w.zero_point)
  zero = carriers.zero_of(carried, whole, w.zero_point, offset)
  by_output = lambda part: jnp.broadcast_to(
      jnp.reshape(part, -1), (outputs,))
  scale, rows, columns = by_output(whole), Rows(), Columns()
  by_place = lambda part: product.at_outputs(part, geometry, x.v.shape, window)

  # The sums are of w = (level / step - base) unit, those of `product` of
  # v = level / carried.unit - offset = (w / unit + base) ratio - offset.
  ratio = w.numbers.step / carried.unit
  own_scale = scale * (ratio / unit)
  if jnp.size(x.scale) > 1:
    rows = rows._replace(scale=by_place(x.scale))
  else:
    own_scale = jnp.reshape(x.scale, ()) * scale * (ratio / unit)

  shift = jnp.zeros(outputs, jnp.float32) if bias is None else bias
  if x.zero is not None:
    if tap_sums is None:
      v = carriers.operand(w, carrier).v.astype(jnp.float32)
      if grouped:
        v = v * w.spread(jnp.asarray(w.scale, jnp.float32))
      tap_sums = v.sum(-2)
    inside = product.sums_inside(tap_sums, geometry, x.v.shape[1:-1])
    if jnp.size(x.zero) > 1:
      rows = rows._replace(shift=by_place(x.zero))
      columns, shift = columns._replace(bias=shift), inside * scale
    else:
      shift = carriers.add(
          inside * (jnp.reshape(x.zero, ()) * scale), shift)

  # What the kernel's weights have too much, in its unit: nothing for signed
  # formats, which have neither offset nor base.
  beyond = (offset / ratio - base) * unit
  if not isinstance(beyond, float) or beyond or zero is not None:
    total, count = product.totals(x.v, geometry, window)
    rows = rows._replace(total=total[..., 0])
    columns = columns._replace(offset=by_output(jnp.float32(beyond)))
    if zero is not None:
      inputs = total * by_place(x.scale)[..., None]
      if x.zero is not None:
        inputs += count * by_place(x.zero)[..., None]
      rows = rows._replace(zero=inputs[..., 0])
      columns = columns._replace(zero=by_output(zero))
  return Epilogue(own_scale, shift, rows, columns)
