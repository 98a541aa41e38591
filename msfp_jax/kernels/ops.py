"""Products with packed layers: one door to all back ends.

`matmul` and `conv` quantize their input, multiply it with the packed weights
and return what `reference` says, by one of these implementations:

- 'reference': float32 and plain products.
- 'xla': everywhere; weights are decoded to the carrier, which XLA's own
  products take. On CPUs wide 3x3 convolutions are by `winograd`.
- 'mosaic_tpu', 'mosaic_gpu': Pallas kernels that decode packed weights on the
  chip, for signed 4-bit weights.

None picks the kernels where the device has them and they take the operation,
and XLA elsewhere. The input is quantized outside of the kernels, so that XLA
can fuse it with the activation function or normalization before it.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from msfp_jax.kernels import carriers
from msfp_jax.kernels import compiler
from msfp_jax.kernels import dispatch
from msfp_jax.kernels import layer as layer_lib
from msfp_jax.kernels import reference
from msfp_jax.kernels import winograd
from msfp_jax.kernels.layer import PackedLayer
from msfp_jax.kernels.reference import Geometry


def matmul(x: jax.Array, layer: PackedLayer, *,
           implementation: str | None = None,
           carrier: str | None = None) -> jax.Array:
  """A dense layer.

  Args:
    x: float `[..., I]`.
    layer: one set of weights, `[I, O]`.
    implementation: one of IMPLEMENTATIONS; None picks.
    carrier: a key of `carriers.DTYPES`; None picks.

  Returns:
    `[..., O]` of x's dtype.

  Raises:
    ValueError: an implementation or carrier that does not take the operation;
      the message says why.
  """
  return _run(x, layer, None, implementation, carrier,
              lax.conv_general_dilated)


def conv(x: jax.Array, layer: PackedLayer, *,
         strides: Sequence[int] | int = 1,
         padding: Sequence[tuple[int, int]] | str = 'SAME',
         dilation: Sequence[int] | int = 1, groups: int = 1,
         implementation: str | None = None, carrier: str | None = None,
         conv_general_dilated: Callable[..., jax.Array]
         = lax.conv_general_dilated) -> jax.Array:
  """A convolution, padded with zeros.

  Args:
    x: float `[B, *spatial, I]`.
    layer: one set of weights, `[*window, I / groups, O]`.
    strides: per spatial axis, or one for all.
    padding: (before, after) per spatial axis, 'SAME' or 'VALID'.
    dilation: of the window, per spatial axis, or one for all.
    groups: of the channels.
    implementation: one of IMPLEMENTATIONS; None picks.
    carrier: a key of `carriers.DTYPES`; None picks.
    conv_general_dilated: for products in float32, in place of XLA's.

  Returns:
    `[B, *spatial', O]` of x's dtype.

  Raises:
    ValueError: as `matmul`.
  """
  axes = x.ndim - 2
  each = lambda n: (n,) * axes if isinstance(n, int) else tuple(n)
  strides, dilation = each(strides), each(dilation)
  if isinstance(padding, str):
    window = layer.weights.shape[:axes] if (
        layer.packing != layer_lib.HOPPER) else layer.weights.shape[1:1 + axes]
    reach = [(size - 1) * d + 1 for size, d in zip(
        window, dilation, strict=True)]
    padding = lax.padtype_to_pads(x.shape[1:-1], reach, strides, padding)
  geometry = Geometry(
      strides, tuple((int(a), int(b)) for a, b in padding), dilation, groups)
  return _run(x, layer, geometry, implementation, carrier,
              conv_general_dilated)


def _run(x, layer, geometry, implementation, carrier, function):
  if implementation is None:
    implementation = dispatch.pick(x.shape, layer, geometry, carrier)
  if reason := dispatch.why_not(
      implementation, x.shape, layer, geometry, carrier):
    raise ValueError(f'implementation {implementation!r}: {reason}')
  carrier = carrier or dispatch.pick_carrier(layer, implementation)
  if implementation in dispatch.KERNELS.values():
    return _run_kernel(x, layer, geometry, implementation, carrier)
  if implementation == 'xla' and layer.parts and _winograd_takes(
      x.shape, layer, geometry, carrier):
    run = functools.partial(_run_winograd, geometry=geometry)
  else:
    product = functools.partial(
        _product, geometry=geometry, carrier=carrier, function=function)
    run = functools.partial(reference.run, product=product, carrier=carrier,
                            geometry=geometry)
  return compiler.apart(run, x, layer)


def _product(v, w, *, geometry, carrier, function):
  """Of values in the carrier, by XLA."""
  sums = carriers.DTYPES[carrier][1]
  if geometry is None or _is_pointwise(geometry, w.shape):
    w = w.reshape(w.shape[-2:])  # XLA has faster products than convolutions
    return lax.dot_general(
        v, w, (((v.ndim - 1,), (0,)), ((), ())), preferred_element_type=sums)
  if v.dtype == jnp.float32:
    return geometry.conv(v, w, function=function)
  return geometry.conv(v, w, preferred_element_type=sums)


def _is_pointwise(geometry, shape):
  return (geometry.plain and set(shape[:-2]) == {1}
          and not any(map(any, geometry.padding)))


def _winograd_takes(shape, layer, geometry, carrier):
  return (carrier == 'f32' and jax.default_backend() == 'cpu'
          and geometry is not None and geometry.plain
          and geometry.padding == ((1, 1), (1, 1))
          and winograd.pays_for(shape, layer.parts))


def _run_winograd(x, layer, geometry):
  act = carriers.carry(layer.act_fmt, 'f32')
  w = layer.values('f32')
  scale, shift = reference.epilogue(layer, 'f32', geometry, x.shape[1:-1])
  return winograd.conv(
      x, w, layer.parts,
      lambda x: act.quantize(x, layer.act_scale, layer.act_zero_point),
      lambda y: reference.add(
          y.astype(jnp.float32) * scale, shift).astype(x.dtype))


def _run_kernel(x, layer, geometry, implementation, carrier):
  module = dispatch.module_of(implementation)
  act = carriers.carry(layer.act_fmt, carrier)
  v = act.quantize(x, layer.act_scale, layer.act_zero_point)
  scale, shift = reference.epilogue(
      layer, carrier, geometry, x.shape[1:-1])
  # The kernels' weights are in units of their own.
  unit = carriers.carry(layer.fmt, carrier).unit
  scale = scale * (carriers.step(layer.fmt) / unit
                   / module.weight_unit(layer.fmt, carrier))
  codes = layer.weights
  if implementation == 'mosaic_gpu' and layer.packing == layer_lib.NIBBLES:
    codes = module.prepare(codes, layer.in_features)
  options = {'fmt': layer.fmt, 'out_dtype': x.dtype}
  if geometry is None:
    out = module.matmul(v.reshape(-1, v.shape[-1]), codes, scale, shift,
                        **options)
    return out.reshape(*x.shape[:-1], -1)
  return module.conv(v, codes, scale, shift, strides=geometry.strides,
                     padding=geometry.padding, **options)


def prepare(layer: PackedLayer, implementation: str | None = None
            ) -> PackedLayer:
  """What is done once for a packed layer before it runs.

  Adds the sums of the weights where zero points need them; for XLA on CPUs
  finds out how `winograd` can sum exactly; for 'mosaic_gpu' lays the weights
  out anew.

  Args:
    layer: packed, with or without an axis of banks.
    implementation: that it will run by; None for the one that is picked.
  """
  if layer.packing in (layer_lib.VALUES, layer_lib.HOPPER):
    return layer
  layer = jax.tree.map(np.asarray, layer)
  changes: dict[str, Any] = {}
  wide = layer.weights.ndim - layer.banked == 4
  if layer.act_fmt is not None and (layer.needs_sums or wide):
    values = carriers.carry(layer.fmt, 'f32').values().astype(np.float32)[
        np.asarray(layer.codes())]
    if layer.needs_sums:
      changes['tap_sums'] = values.sum(-2)
    if wide and _has_winograd(layer, values):
      changes['parts'] = winograd.splits(values, layer.act_fmt)
  kernel = implementation or dispatch.KERNELS.get(jax.default_backend())
  if kernel == 'mosaic_gpu' and _is_for_kernels(layer):
    changes |= {'weights': _lay_out(layer), 'packing': layer_lib.HOPPER}
  return layer.replace(**changes)


def _is_for_kernels(layer):
  """Whether kernels that read signed weights of 4 bits take the layer."""
  return (layer.packing == layer_lib.NIBBLES and layer.act_fmt is not None
          and layer.zero_point is None and layer.fmt.signed
          and layer.fmt.bits == 4)


def _lay_out(layer):
  """The weights for `mosaic_gpu`, bank by bank."""
  lay = functools.partial(
      dispatch.module_of('mosaic_gpu').prepare, length=layer.in_features)
  if not layer.banked:
    return lay(layer.weights)
  return np.stack([lay(bank) for bank in layer.weights])


def _has_winograd(layer, values):
  carried = carriers.carry(layer.fmt, 'f32')
  return (values.shape[-4:-2] == (3, 3) and layer.zero_point is None
          and (carried.unit, carried.offset) == (carriers.step(layer.fmt), 0)
          and winograd.pays(*values.shape[-2:]))
