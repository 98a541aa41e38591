"""The arithmetic of a quantized layer: sums of exact numbers, then scales.

With x = s_x v_x + z_x and W = s_w v_w + z_w (see `carriers.Operand`), where all
v are integers or other exact numbers, an output is

    y = sum v_x v_w  s_x s_w  +  sum v_w  z_x s_w
        + sum v_x  s_x z_w  +  K  z_x z_w  +  bias

The sums go over the contraction (K of them: the inputs of all taps of the
window that lie inside the image) and are exact in any order where no magnitude
exceeds 2^24, so that every back end whose sums are exact gives the same
numbers, bit for bit.

- `separable`: scales and zero points do not change along the contraction, and
  leave the sum. An input may have one for the tensor or an image, in dense and
  pointwise layers also one a pixel or token.
- `grouped`: they do, by group of channels or by pixel under a larger window.
  Then a sum goes over one group and one tap; the groups' are scaled and added.
"""

from collections.abc import Callable, Sequence
import itertools
import math

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from msfp_jax.kernels import carriers
from msfp_jax.kernels.carriers import add
from msfp_jax.kernels.carriers import Operand
from msfp_jax.quant.geometry import Geometry
from msfp_jax.quant.qtensor import QTensor

# What a product costs, for R = B x spatial' outputs of O channels, a window of
# T taps and n groups of channels:
#
#   separable     1 product                 memory  R O
#   grouped       T x n products, batched   memory  n R O  for a tap's sums
#   dequantized   1 product                 memory  R O, and x and w in float32
#
# All do the same multiplications; `grouped` writes and reads n T times as many
# sums.
#
# (v_x [B, *spatial, I], v_w [*window, I / groups, O]) -> [B, *spatial', O].
Product = Callable[[jax.Array, jax.Array], jax.Array]


def is_separable(x: QTensor, w: QTensor, geometry: Geometry | None) -> bool:
  """Whether all scales and zero points leave the sum; see above.

  Args:
    x: `[B, *spatial, I]` or `[..., I]`; only shapes are looked at.
    w: `[*window, I, O]`, one set.
    geometry: of a convolution; None for a dense layer.
  """
  return input_leaves(x, w.window, geometry) and weights_leave(w)


def input_leaves(x: QTensor, window: Sequence[int], geometry: Geometry | None
                 ) -> bool:
  """Whether the input's scales and zero points leave the sum."""
  inner = slice(-1, None)  # the axes that must be of size 1
  if geometry is not None and not geometry.is_pointwise(window):
    inner = slice(1, None)
  return all(_flat(part, inner) for part in (x.scale, x.zero_point))


def weights_leave(w: QTensor) -> bool:
  """Whether the weights' scales and zero points leave the sum."""
  return all(_flat(part, slice(None, -1)) for part in (w.scale, w.zero_point))


def _flat(part, axes):
  return part is None or set(jnp.shape(part)[axes]) <= {1}


def separable(x: Operand, w: Operand, bias: jax.Array | None,
              geometry: Geometry | None, product: Product,
              tap_sums: jax.Array | None = None) -> jax.Array:
  """The layer where scales leave the sum, float32.

  Args:
    x: `[B, *spatial, I]` or `[..., I]`.
    w: `[*window, I, O]`, with scale and zero of `[O]` or `[]`.
    bias: `[O]`, or None.
    geometry: of a convolution; None for a dense layer.
    product: sums of v_x v_w.
    tap_sums: sums of v_w over I, `[*window, O]`, if they are known.
  """
  scale, shift = epilogue(x, w, bias, geometry, tap_sums)
  out = add(product(x.v, w.v).astype(jnp.float32) * scale, shift)
  if w.zero is None:
    return out
  return add(zero_of_weights(x, w, geometry), out)


def operands(x: QTensor, w: QTensor, geometry: Geometry | None, carrier: str
             ) -> tuple[Operand, Operand]:
  """Both sides in a carrier, for `separable`: scales of the outputs' shape."""
  strides = () if geometry is None else geometry.strides
  x, w = carriers.operand(x, carrier), carriers.operand(w, carrier)
  return (x._replace(scale=_at_strides(x.scale, strides),
                     zero=_at_strides(x.zero, strides)),
          w._replace(scale=_by_output(w.scale), zero=_by_output(w.zero)))


def _at_strides(part, strides):
  """A scale of an input where a pointwise window stops."""
  if part is None or jnp.ndim(part) < 2 or not strides:
    return part
  steps = [slice(None, None, stride) for stride in strides]
  sizes = part.shape[1:-1]
  return part[(slice(None), *[
      step if size > 1 else slice(None)
      for step, size in zip(steps, sizes, strict=True)])]


def at_outputs(part: jax.Array, geometry: Geometry | None,
               shape: Sequence[int], window: Sequence[int]) -> jax.Array:
  """A scale of an input `[]` or `[..., 1]` by output, `[B, *spatial']`.

  Args:
    part: of a token, a pixel (if the window is pointwise) or an image.
    geometry: of a convolution; None for a dense layer.
    shape: of the input.
    window: of the weights.
  """
  size = shape[:-1]
  if geometry is not None:
    part = _at_strides(part, geometry.strides)
    size = (shape[0], *geometry.size(shape[1:-1], window))
  return jnp.broadcast_to(part[..., 0] if jnp.ndim(part) else part, size)


def _by_output(part):
  """A scale of weights as `[O]` or `[]`."""
  return part if part is None or not jnp.ndim(part) else part.reshape(-1)


def epilogue(x: Operand, w: Operand, bias: jax.Array | None,
             geometry: Geometry | None, tap_sums: jax.Array | None = None
             ) -> tuple[jax.Array, jax.Array]:
  """scale and shift: y = sums * scale + shift, but for zeros of weights.

  Scale is `[O]` where the input has one scale, and shift `[O]`, or
  `[*spatial', O]` where a convolution pads an input that has a zero: taps
  outside of the image add nothing, so the sums of v_w go over those inside.
  """
  outputs = w.v.shape[-1]
  # Both scales first: they are small, and the large sums are then multiplied
  # once.
  scale = jnp.broadcast_to(x.scale * w.scale, jnp.broadcast_shapes(
      jnp.shape(x.scale), (outputs,)))
  shift = jnp.zeros(outputs, jnp.float32) if bias is None else bias
  if x.zero is None:
    return scale, shift
  if tap_sums is None:
    tap_sums = w.v.astype(jnp.float32).sum(-2)
  inside = sums_inside(tap_sums, geometry, x.v.shape[1:-1])
  return scale, add(inside * (x.zero * w.scale), shift)


def sums_inside(tap_sums: jax.Array, geometry: Geometry | None,
                spatial: Sequence[int]) -> jax.Array:
  """Sum over the taps that lie inside the image, `[O]` or `[*spatial', O]`."""
  window = tuple(range(tap_sums.ndim - 1))
  if geometry is None or not geometry.padded:
    return tap_sums.sum(window)
  #   taps inside, 3x3 with zeros around:   4 6 6 4
  #                                         6 9 9 6
  #                                         4 6 6 4
  #
  # A convolution of ones sums each place's own. Zeros around an image are
  # true zeros and not levels, so a zero point must not be added for them.
  ones = jnp.ones((1, *spatial, 1), jnp.float32)
  return geometry.conv(ones, tap_sums[..., None, :], groups=1,
                       precision=lax.Precision.HIGHEST)[0]


def zero_of_weights(x: Operand, w: Operand, geometry: Geometry | None
                    ) -> jax.Array:
  """z_w (s_x sum v_x + z_x K), `[B, *spatial', O]`."""
  total, count = totals(x.v, geometry, w.v.shape[:-2])
  total = total * x.scale
  if x.zero is not None:
    total = add(count * x.zero, total)
  return jnp.repeat(total, w.v.shape[-1] // total.shape[-1], axis=-1) * w.zero


def totals(v: jax.Array, geometry: Geometry | None, window: Sequence[int]
           ) -> tuple[jax.Array, jax.Array]:
  """What an output sees of the input: sum of v_x, and K, how many they are.

  Args:
    v: `[B, *spatial, I]` or `[..., I]`.
    geometry: of a convolution; None for a dense layer.
    window: of the weights.

  Returns:
    `[B, *spatial', groups]`, and what broadcasts to it; float32.
  """
  v = v.astype(jnp.float32)
  groups = 1 if geometry is None else geometry.groups
  v = v.reshape(*v.shape[:-1], groups, -1)
  size, v = v.shape[-1], v.sum(-1)
  count = jnp.full((*((1,) * (v.ndim - 1)), 1), size, jnp.float32)
  if geometry is None:
    return v, count
  # The sum over the window of x: a box filter.
  box = lambda a, g: geometry.conv(
      a, jnp.ones((*window, 1, g), jnp.float32), groups=g,
      precision=lax.Precision.HIGHEST)
  return box(v, groups), box(
      jnp.broadcast_to(count, (1, *v.shape[1:-1], 1)), 1)


def grouped(x: QTensor, w: QTensor, bias: jax.Array | None,
            geometry: Geometry | None, carrier: str) -> jax.Array:
  """The layer where scales differ along the contraction, float32.

  A batched product, a group of channels each, for every tap of the window;
  sums of int8 are exact before they are scaled.

  Args:
    x: `[B, *spatial, I]` or `[..., I]`.
    w: `[*window, I, O]`.
    bias: `[O]`, or None.
    geometry: of a convolution, of one group of channels; None if dense.
    carrier: of both.
  """
  # Tap by tap, so that a scale a pixel is one scale for a row of the product:
  #
  #   x [B, h, w, I] -> tap -> [n, B h w, size] -+
  #                                              +-> [n, B h w, O] -> sum over n
  #   w [kh, kw, I, O] -> tap -> [n, size, O] ---+   times both scales
  size = _common_group(x, w)
  inputs, weights = (_in_groups(tensor, carrier, size) for tensor in (x, w))
  total = None
  for tap in itertools.product(*map(range, w.window)):
    ours = Operand(*[None if part is None else _tap(part, geometry, tap, w)
                     for part in inputs])
    theirs = Operand(*[None if part is None else part[tap]
                       for part in weights])
    part = _sum_groups(ours, theirs, size, x.length, carrier)
    total = part if total is None else total + part
  return total if bias is None else total + bias


def _common_group(x, w):
  """Channels over which neither side's scale changes."""
  sizes = [tensor.group for tensor in (x, w)
           if any(part is not None and jnp.ndim(part) >= -tensor.axis
                  and part.shape[tensor.axis] > 1
                  for part in (tensor.scale, tensor.zero_point))]
  # 16 of the input and 24 of the weights: groups of 8 lie inside of both. No
  # group on either side: only taps are apart.
  return math.gcd(*sizes) if sizes else x.length


def _in_groups(tensor, carrier, size):
  """An operand in groups of `size`: v `[..., n, size, (O)]`, rest by group."""
  n, axis = -(-tensor.length // size), tensor.axis
  found = carriers.operand(tensor, carrier)
  v = found.v
  # Zeros in v fill up the last group: they add nothing to any sum of products.
  widths = [(0, 0)] * v.ndim
  widths[axis] = (0, n * size - tensor.length)
  v, at = jnp.pad(v, widths), v.ndim + axis
  v = v.reshape(*v.shape[:at], n, size, *v.shape[at + 1:])
  whole = list(found.v.shape)
  whole[axis] = n

  def by_group(part):
    if part is None:
      return None
    if jnp.ndim(part) >= -axis and part.shape[axis] > 1:
      # An entry a group of the tensor -> one a common group.
      part = jnp.repeat(part, tensor.group // size, axis=axis)
      part = lax.slice_in_dim(part, 0, n, axis=part.ndim + axis)
    return jnp.broadcast_to(part, whole)

  return Operand(v, by_group(found.scale), by_group(found.zero))


def _tap(part, geometry, tap, w):
  """The places of `[B, *spatial, ...]` that one tap visits; zeros outside."""
  if geometry is None:
    return part
  axes = len(tap)
  rest = part.ndim - axes - 1
  # Of scale and zero as well: outside of the image both are 0, and with them
  # all that they are multiplied with.
  part = jnp.pad(part, [(0, 0), *geometry.padding, *[(0, 0)] * rest])
  starts, limits, strides = [0], [part.shape[0]], [1]
  for i, d, s, k, n in zip(tap, geometry.dilation, geometry.strides,
                           w.window, part.shape[1:], strict=False):
    outputs = (n - (k - 1) * d - 1) // s + 1
    starts.append(i * d)
    limits.append(i * d + (outputs - 1) * s + 1)
    strides.append(s)
  starts += [0] * rest
  limits += part.shape[axes + 1:]
  return lax.slice(part, starts, limits, strides + [1] * rest)


def _sum_groups(x, w, size, length, carrier):
  """x `[..., n, size]` with w `[n, size, O]`, scaled and summed over n."""
  shape = x.v.shape[:-2]
  v = x.v.reshape(-1, *x.v.shape[-2:])
  sums = lax.dot_general(
      v, w.v, (((2,), (1,)), ((1,), (0,))), precision='highest',
      preferred_element_type=carriers.DTYPES[carrier][1])  # [n, rows, O]
  column = lambda part: part.reshape(-1, part.shape[-1]).T[..., None]
  scale, row = column(x.scale), lambda part: part[:, None]
  total = sums.astype(jnp.float32) * scale * row(w.scale)
  if x.zero is not None:
    inner = w.v.astype(jnp.float32).sum(1)
    total += column(x.zero) * row(w.scale * inner)
  if w.zero is not None:
    inner = column(x.v.astype(jnp.float32).sum(-1)) * scale
    if x.zero is not None:
      # K of the last group is what it holds, without what filled it up.
      counts = np.full(len(w.v), size, np.float32)
      counts[-1] = length - (len(w.v) - 1) * size
      inner += column(x.zero) * counts[:, None, None]
    total += inner * row(w.zero)
  return total.sum(0).reshape(*shape, -1)


def dequantized(x: QTensor, w: QTensor, bias: jax.Array | None,
                geometry: Geometry | None, product: Product) -> jax.Array:
  """The same as `grouped`, to float32's precision, by one plain product.

  Elements are scaled before they are multiplied: fewer passes over memory than
  a product a group, but every product rounds.
  """
  out = product(x.dequantize(), w.dequantize())
  return out if bias is None else out + bias
