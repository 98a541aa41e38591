"""What a quantized layer computes, in plain float32: the reference.

With input x, weights W, and levels unit * (v + offset) of both (see
`carriers`), x = s_x level_x + z_x and W = s_w level_w + z_w, a layer is

    y = (sum v_x v_w) * scale + shift
    scale = s_x unit_x s_w unit_w                                   [O]
    shift = bias + (z_x + s_x unit_x offset_x) s_w unit_w sum v_w   [O]

in this order. The sums are of integers: exact in any order where no
magnitude exceeds 2^24, so that every back end whose sums are exact too gives
these numbers bit for bit. Where a convolution pads with zeros, the sum of v_w
goes over the taps inside the image: shift is then `[H', W', O]`.

Weights with a zero point (INT) add, with z_w' = z_w + s_w unit_w offset_w,

    z_w' (s_x unit_x sum v_x + (z_x + s_x unit_x offset_x) K)

where K counts the inputs inside the image.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from msfp_jax.kernels import carriers
from msfp_jax.kernels.layer import PackedLayer

# (x [B, *spatial, I], w [*window, I / groups, O]) -> [B, *spatial', O].
Product = Callable[[jax.Array, jax.Array], jax.Array]


class Geometry(NamedTuple):
  """What of a convolution is not in its weights.

  Attributes:
    strides: per spatial axis.
    padding: (before, after) per spatial axis, of zeros.
    dilation: of the window, per spatial axis.
    groups: of the channels.
  """

  strides: tuple[int, ...]
  padding: tuple[tuple[int, int], ...]
  dilation: tuple[int, ...]
  groups: int = 1

  @property
  def plain(self) -> bool:
    """Neither strides, dilation nor groups."""
    return set(self.strides + self.dilation) == {1} and self.groups == 1

  def conv(self, x: jax.Array, w: jax.Array, groups: int | None = None,
           function: Callable[..., jax.Array] = lax.conv_general_dilated,
           **options: Any) -> jax.Array:
    """x `[B, *spatial, I]` with w `[*window, I / groups, O]`."""
    return function(
        x, w, self.strides, self.padding, lhs_dilation=(1,) * (x.ndim - 2),
        rhs_dilation=self.dilation,
        dimension_numbers=channels_last(x.ndim - 2),
        feature_group_count=self.groups if groups is None else groups,
        **options)


def channels_last(axes: int) -> lax.ConvDimensionNumbers:
  """`[B, *spatial, C]`, `[*window, I, O]`, for any number of axes."""
  data = (0, axes + 1, *range(1, axes + 1))
  return lax.ConvDimensionNumbers(
      data, (axes + 1, axes, *range(axes)), data)


def add(product: jax.Array, term: jax.Array) -> jax.Array:
  """product + term, where the product has been rounded.

  On CPUs a product that is only added becomes a fused multiply-add in some of
  XLA's fusions and not in others. The last bit would depend on what surrounds a
  layer, and where it moves an input of the next one across the border of two
  levels, a deep network amplifies it.
  """
  return product + jnp.where(jnp.isnan(product), product, term)


def epilogue(layer: PackedLayer, carrier: str, geometry: Geometry | None,
             spatial: Sequence[int]) -> tuple[jax.Array, jax.Array]:
  """scale `[O]` and shift `[O]` or `[*spatial', O]`, float32.

  Args:
    layer: with quantized input.
    carrier: in which both are carried.
    geometry: of a convolution; None for a dense layer.
    spatial: size of the input.
  """
  weight = carriers.carry(layer.fmt, carrier)
  act = carriers.carry(layer.act_fmt, carrier)
  scale = (layer.act_scale * (weight.unit * act.unit)) * layer.scale
  shift = jnp.zeros_like(scale) if layer.bias is None else layer.bias
  zero = zero_of_input(layer, carrier)
  if zero is not None:
    per_value = (zero * weight.unit) * layer.scale
    inside = sums_inside(sums_of_weights(layer, carrier), geometry, spatial)
    shift = add(inside * per_value, shift)
  return scale, shift


def zero_of_input(layer: PackedLayer, carrier: str) -> jax.Array | None:
  """z_x + s_x unit_x offset_x; None where it is 0."""
  act = carriers.carry(layer.act_fmt, carrier)
  if not act.offset:
    return layer.act_zero_point
  zero = layer.act_scale * (act.unit * act.offset)
  return zero if layer.act_zero_point is None else add(
      zero, layer.act_zero_point)


def sums_inside(tap_sums: jax.Array, geometry: Geometry | None,
                spatial: Sequence[int]) -> jax.Array:
  """Sum over the taps that lie inside the image, `[O]` or `[*spatial', O]`."""
  window = tuple(range(tap_sums.ndim - 1))
  if geometry is None or not any(map(any, geometry.padding)):
    return tap_sums.sum(window)
  ones = jnp.ones((1, *spatial, 1), jnp.float32)
  return geometry.conv(ones, tap_sums[..., None, :], groups=1,
                       precision=lax.Precision.HIGHEST)[0]


def zero_of_weights(layer: PackedLayer, carrier: str, x: jax.Array,
                    geometry: Geometry | None) -> jax.Array | None:
  """The last term above; None without zero point of the weights.

  Args:
    layer: with quantized input.
    carrier: of x.
    x: v_x, `[B, *spatial, I]` or `[..., I]`.
    geometry: of a convolution; None for a dense layer.
  """
  weight = carriers.carry(layer.fmt, carrier)
  zero = layer.zero_point
  if weight.offset:
    moved = layer.scale * (weight.unit * weight.offset)
    zero = moved if zero is None else add(moved, zero)
  if zero is None:
    return None
  act = carriers.carry(layer.act_fmt, carrier)
  groups = 1 if geometry is None else geometry.groups
  x = x.astype(jnp.float32)
  x = x.reshape(*x.shape[:-1], groups, -1)
  size, x = x.shape[-1], x.sum(-1)
  count = jnp.full((*((1,) * (x.ndim - 1)), 1), size, jnp.float32)
  if geometry is not None:
    shape = layer.weights.shape[:-2]
    box = lambda a, g: geometry.conv(
        a, jnp.ones((*shape, 1, g), jnp.float32), groups=g,
        precision=lax.Precision.HIGHEST)
    count = box(jnp.broadcast_to(count, (1, *x.shape[1:-1], 1)), 1)
    x = box(x, groups)
  total = x * (layer.act_scale * act.unit)
  zero_x = zero_of_input(layer, carrier)
  if zero_x is not None:
    total = add(count * zero_x, total)
  return jnp.repeat(total, zero.shape[0] // groups, axis=-1) * zero


def sums_of_weights(layer: PackedLayer, carrier: str) -> jax.Array:
  """Sums of v_w over the inputs, float32 `[*window, O]`."""
  carried = carriers.carry(layer.fmt, carrier)
  # The layer's own are those of f32, as wide formats have another unit in fp8.
  own = carriers.carry(layer.fmt, 'f32')
  if layer.tap_sums is None or own.offset != carried.offset:
    return layer.values(carrier).astype(jnp.float32).sum(-2)
  return layer.tap_sums * (own.unit / carried.unit)


def run(x: jax.Array, layer: PackedLayer, product: Product, carrier: str,
        geometry: Geometry | None = None) -> jax.Array:
  """The layer by the formula, for any product of v_x and v_w.

  Args:
    x: float `[B, *spatial, I]` or `[..., I]`.
    layer: one set of weights.
    product: of the carrier's values.
    carrier: of both.
    geometry: of a convolution.
  """
  if layer.act_fmt is None:
    out = product(x.astype(jnp.float32), layer.dequantized())
    return (out if layer.bias is None else out + layer.bias).astype(x.dtype)
  act = carriers.carry(layer.act_fmt, carrier)
  v = act.quantize(x, layer.act_scale, layer.act_zero_point)
  w = layer.values(carrier)
  scale, shift = epilogue(layer, carrier, geometry, x.shape[1:-1])
  out = add(product(v, w).astype(jnp.float32) * scale, shift)
  extra = zero_of_weights(layer, carrier, v, geometry)
  return (out if extra is None else add(extra, out)).astype(x.dtype)
