"""Which implementation and carrier a layer runs by, and why not another."""

from collections.abc import Sequence
import functools
import types

import jax
import numpy as np

from msfp_jax.kernels import carriers
from msfp_jax.kernels import layer as layer_lib
from msfp_jax.kernels.layer import PackedLayer
from msfp_jax.kernels.reference import Geometry

IMPLEMENTATIONS = ('reference', 'xla', 'mosaic_tpu', 'mosaic_gpu')
KERNELS = {'tpu': 'mosaic_tpu', 'gpu': 'mosaic_gpu'}
# Platform -> carriers, of which the first that holds both formats is taken.
_CARRIERS = {
    'cpu': ('f32',),
    'gpu': ('int8', 'bf16'),
    'tpu': ('int8', 'bf16'),
}
# The same of kinds of devices.
_CARRIERS_OF_KIND = {'TPU7x': ('fp8', 'bf16')}


def pick(shape: Sequence[int], layer: PackedLayer,
         geometry: Geometry | None = None, carrier: str | None = None) -> str:
  """The implementation that None stands for; arguments as for `why_not`."""
  if layer.packing == layer_lib.VALUES:
    return 'reference'
  kernel = KERNELS.get(jax.default_backend())
  if kernel and why_not(kernel, shape, layer, geometry, carrier) is None:
    return kernel
  return 'xla'


def pick_carrier(layer: PackedLayer, implementation: str) -> str:
  """The carrier of an implementation on the default device."""
  if implementation == 'reference' or layer.act_fmt is None:
    return 'f32'
  platform = {'mosaic_tpu': 'tpu', 'mosaic_gpu': 'gpu'}.get(
      implementation, jax.default_backend())
  kind = jax.devices()[0].device_kind
  choices = _CARRIERS_OF_KIND.get(kind) or _CARRIERS.get(platform, ('f32',))
  return next((name for name in choices if _carries(layer, name)), 'f32')


def _carries(layer, carrier):
  if layer.act_fmt is None:
    return carrier == 'f32'
  formats = (layer.fmt, layer.act_fmt)
  return None not in [carriers.carry(fmt, carrier) for fmt in formats]


def why_not(implementation: str, shape: Sequence[int], layer: PackedLayer,
            geometry: Geometry | None = None, carrier: str | None = None
            ) -> str | None:
  """Why an implementation does not take an operation; None if it does.

  Args:
    implementation: one of IMPLEMENTATIONS.
    shape: of the input.
    layer: one set of weights.
    geometry: of a convolution; None for a dense layer.
    carrier: None for the one that would be picked.

  Raises:
    ValueError: there is no such implementation.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'implementation {implementation!r}: must be None or one '
                     f'of {IMPLEMENTATIONS}')
  if carrier and not _carries(layer, carrier):
    inputs = layer.act_fmt or 'full precision'
    return (f'{carrier} does not hold weights in {layer.fmt} and inputs in '
            f'{inputs}; choose another carrier, such as '
            f'{"bf16" if layer.act_fmt else "f32"}')
  if implementation not in KERNELS.values():
    return None
  return _why_no_kernel(implementation, shape, layer, geometry, carrier)


def _why_no_kernel(implementation, shape, layer, geometry, carrier):
  if layer.act_fmt is None:
    return 'it multiplies quantized inputs, and those of this layer are not'
  if layer.zero_point is not None:
    return 'its weights have no zero point, and those of this layer have'
  if layer.packing == layer_lib.HOPPER and implementation != 'mosaic_gpu':
    return 'the weights are laid out for mosaic_gpu'
  if layer.packing not in (layer_lib.NIBBLES, layer_lib.HOPPER):
    return (f'it reads weights of 4 bits, and those of this layer are '
            f'{layer.fmt}, stored as {layer.packing}')
  if geometry is not None and (
      geometry.groups != 1 or set(geometry.dilation) != {1}
      or len(geometry.strides) != 2):
    return (f'it takes 2-D convolutions without groups and dilation, not '
            f'{geometry}')
  carrier = carrier or pick_carrier(layer, implementation)
  module = module_of(implementation)
  weights = layer.weights
  if implementation == 'mosaic_gpu' and layer.packing == layer_lib.NIBBLES:
    weights = jax.eval_shape(functools.partial(
        module.prepare, length=layer.in_features), weights)
  if geometry is None:
    op, rows, more = 'matmul', (int(np.prod(shape[:-1])), shape[-1]), {}
  else:
    op, rows = 'conv', tuple(shape)
    more = {'strides': geometry.strides, 'padding': geometry.padding}
  x = jax.ShapeDtypeStruct(rows, carriers.DTYPES[carrier][0])
  return module.why_not(op, x, weights, fmt=layer.fmt, **more)


def module_of(implementation: str) -> types.ModuleType:
  """Of a kernel."""
  # Here, so that neither back end's library loads before it is asked for.
  if implementation == 'mosaic_tpu':
    from msfp_jax.kernels.mosaic_tpu import ops as mosaic_tpu
    return mosaic_tpu
  from msfp_jax.kernels.mosaic_gpu import ops as mosaic_gpu
  return mosaic_gpu
