"""Geometry: strides, padding, dilation and groups of a convolution."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp


class Geometry(NamedTuple):
  """How a window walks over an input `[B, *spatial, I]`.

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

  @property
  def padded(self) -> bool:
    """Whether the window sees zeros beside the image."""
    return any(map(any, self.padding))

  def is_pointwise(self, window: Sequence[int]) -> bool:
    """Whether every output sees one place of the input."""
    return set(window) <= {1} and self.groups == 1 and not self.padded

  def size(self, spatial: Sequence[int], window: Sequence[int]
           ) -> tuple[int, ...]:
    """spatial', the size of the result."""
    return tuple(
        (n + sum(p) - (k - 1) * d - 1) // s + 1 for n, p, k, d, s in zip(
            spatial, self.padding, window, self.dilation, self.strides,
            strict=True))

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
  # As XLA counts: batch, channels, then the spatial axes; of weights outputs,
  # inputs, then the window.
  data = (0, axes + 1, *range(1, axes + 1))
  return lax.ConvDimensionNumbers(
      data, (axes + 1, axes, *range(axes)), data)


def resolve(shape: Sequence[int], window: Sequence[int],
            strides: Sequence[int] | int = 1,
            padding: Sequence[tuple[int, int]] | str = 'SAME',
            dilation: Sequence[int] | int = 1, groups: int = 1) -> Geometry:
  """The geometry of a convolution, from what its callers may write.

  Args:
    shape: of the input, `[B, *spatial, I]`.
    window: of the weights.
    strides: per spatial axis, or one for all.
    padding: (before, after) per spatial axis, 'SAME' or 'VALID'.
    dilation: of the window, per spatial axis, or one for all.
    groups: of the channels.
  """
  axes = len(shape) - 2
  each = lambda n: (n,) * axes if isinstance(n, int) else tuple(n)
  strides, dilation = each(strides), each(dilation)
  if isinstance(padding, str):
    # 'SAME' is by the window as dilation spreads it.
    reach = [(size - 1) * d + 1
             for size, d in zip(window, dilation, strict=True)]
    padding = lax.padtype_to_pads(shape[1:-1], reach, strides, padding)
  padding = tuple((int(a), int(b)) for a, b in padding)
  return Geometry(strides, padding, dilation, groups)


def of_module(module: nn.Conv, x: jax.Array
              ) -> tuple[jax.Array, Geometry, tuple[int, ...]]:
  """The input as a convolution sees it, its geometry, and its window.

  Args:
    module: an nn.Conv.
    x: its input, with any number of batch axes.

  Returns:
    x `[B, *spatial, I]`, its batch axes made one and with the paddings that
    are not of zeros; the geometry; the window.

  Raises:
    ValueError: masked weights or a dilated input (a transposed convolution).
  """
  if module.mask is not None:
    raise ValueError('a masked convolution cannot be packed')
  window = module.kernel_size
  window = (window,) if isinstance(window, int) else tuple(window)
  axes = len(window)
  each = lambda n: (n,) * axes if n is None or isinstance(n, int) else tuple(n)
  if any(n not in (None, 1) for n in each(module.input_dilation)):
    raise ValueError(f'input_dilation {module.input_dilation}: a transposed '
                     'convolution cannot be packed')
  dilation = tuple(n or 1 for n in each(module.kernel_dilation))
  # nn.Conv takes any number of batch axes, also none.
  x = x.reshape(-1, *x.shape[x.ndim - axes - 1:])
  x, padding = _pad(x, module, window, dilation)
  strides = tuple(n or 1 for n in each(module.strides))
  return x, resolve(x.shape, window, strides, padding, dilation,
                    module.feature_group_count), window


def _pad(x: jax.Array, module: nn.Conv, window: tuple[int, ...],
         dilation: tuple[int, ...]) -> tuple[jax.Array, Any]:
  """x and the zeros around it; other kinds of padding are done here."""
  padding = module.padding
  reach = [d * (size - 1) for size, d in zip(window, dilation, strict=True)]
  if padding in ('CIRCULAR', 'REFLECT'):
    # These are pixels of the image, to be quantized like any; a geometry's
    # padding is zeros, which add nothing to a sum whatever the zero point.
    widths = [(0, 0), *[(r // 2, r - r // 2) for r in reach], (0, 0)]
    mode = 'wrap' if padding == 'CIRCULAR' else 'reflect'
    return jnp.pad(x, widths, mode=mode), 'VALID'
  if padding == 'CAUSAL':
    # All before: an output sees nothing that comes after it. Flax has it for
    # one spatial axis.
    return x, ((reach[0], 0),)
  if isinstance(padding, int):
    return x, ((padding, padding),) * len(reach)
  if isinstance(padding, str):
    return x, padding
  return x, tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)
