"""Which implementation takes a layer: what each can do, and picks.

- 'reference': float32 and plain products (see `product`).
- 'xla': everywhere.
- a chip's kernels, for packed weights of 4 bits; what they take is in
  docs/kernels.md, and `why_not` says it of a layer.

None picks the kernels where the device has them, they take the operation, and
nobody has measured that XLA is faster there (`slower`); XLA elsewhere.

This is the one module that knows the chips' kernels. A chip is a folder, named
in KERNELS, with two modules. `measured` has SLOWER, the products that XLA was
measured to compute faster. `ops` has `matmul`, `conv`, `why_not`,
`carriers_of`, `weight_unit`, `weight_base`, `why_not_groups`,
`why_not_input_groups`, `why_not_shifts`, `CARRIERS_OF_GROUPS`, `SCALES_INPUTS`
(whether it multiplies sums by scales of groups of inputs, which else XLA does),
`lay_out`, `LAYOUT`.
"""

from collections.abc import Sequence
import importlib
import math
import types

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.kernels import carriers
from msfp_jax.kernels import cpu
from msfp_jax.kernels import product
from msfp_jax.kernels import slower
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant.geometry import Geometry
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.qtensor import QTensor

# Back end -> the implementation by kernels of its own.
KERNELS = {'tpu': 'mosaic_tpu', 'gpu': 'mosaic_gpu'}
IMPLEMENTATIONS = ('reference', 'xla', *KERNELS.values())
# Input channels from which on XLA convolves faster in int8 on CPUs.
_LEAST_CHANNELS = 32


def are_there() -> bool:
  """Whether the device has kernels of its own."""
  return jax.default_backend() in KERNELS


def pick(layer: QLayer, shape: Sequence[int],
         geometry: Geometry | None = None, carrier: str | None = None) -> str:
  """The implementation that None stands for; arguments as for `why_not`."""
  if not layer.weight.is_packed:
    # A simulation, not packed: scales in the sum are cheaper by 'xla', which
    # has `dequantized` (see `_run_xla`).
    separable = layer.input.is_full or product.is_separable(
        input_of(layer, shape), layer.weight, geometry)
    return 'reference' if separable else 'xla'
  kernel = KERNELS.get(jax.default_backend())
  if kernel is None or why_not(kernel, layer, shape, geometry, carrier):
    return 'xla'
  rows = _module(kernel, 'measured').SLOWER
  if rows and slower.loses(
      rows, operation(kernel, layer, shape, geometry, carrier)):
    return 'xla'
  return kernel


def operation(implementation: str, layer: QLayer, shape: Sequence[int],
              geometry: Geometry | None = None, carrier: str | None = None
              ) -> slower.Operation:
  """What a kernel's measurements call an operation that it takes.

  Args:
    implementation: the kernel's name.
    layer, shape, geometry, carrier: as for `why_not`.
  """
  weight, tensor = layer.weight, input_of(layer, shape)
  kind = slower.Kind(
      'matmul' if geometry is None else 'conv',
      carrier or pick_carrier(layer, shape, implementation),
      0 if product.weights_leave(weight) else weight.group,
      tensor.group if carriers.has_groups(tensor) else 0,
      0 if weight.shift is None else weight.shift_group,
      *(() if geometry is None else (weight.window, geometry.strides)))
  rows = shape[:-1] if geometry is None else (
      shape[0], *geometry.size(shape[1:-1], weight.window))
  return slower.Operation(
      kind, math.prod(rows),
      weight.length * math.prod(weight.window), np.shape(weight.scale)[-1])


def pick_carrier(layer: QLayer, shape: Sequence[int], implementation: str,
                 geometry: Geometry | None = None) -> str:
  """The carrier of an implementation on the default device.

  The first that holds both formats, of those that the device multiplies
  fastest.
  """
  if implementation == 'reference' or layer.input.is_full:
    return 'f32'
  # A chip's kernels may be asked for on another device, to be interpreted: they
  # have their own chip's carriers there.
  backend = {name: key for key, name in KERNELS.items()}.get(
      implementation, jax.default_backend())
  if backend == 'cpu':
    choices = _carriers_of_cpu(layer, shape, geometry)
  else:
    # A chip's own are also those of XLA there.
    known = KERNELS.get(backend)
    choices = ops_of(known).carriers_of(
        jax.devices()[0].device_kind) if known else ('f32',)
  if implementation in KERNELS.values() and (
      not product.weights_leave(layer.weight)
      or carriers.has_groups(input_of(layer, shape))):
    choices = [name for name in choices
               if name in ops_of(implementation).CARRIERS_OF_GROUPS]
  return next((name for name in choices if _carries(layer, shape, name)), 'f32')


def carrier_of_training(layer: QLayer, x: jax.Array) -> str:
  """The carrier in which a layer in training multiplies, by its input's type.
  """
  if x.dtype == jnp.bfloat16 and _carries(layer, x.shape, 'bf16'):
    return 'bf16'
  return 'f32'


def _carriers_of_cpu(layer, shape, geometry):
  """What a CPU multiplies fastest, of what the layer lets it."""
  weight, seen = layer.weight, input_of(layer, shape)
  # Scales inside of the sum are cheapest in one product of float32.
  if not product.is_separable(seen, weight, geometry):
    return ('f32',)
  # The larger tiles of `winograd` are as fast as int8 without any.
  prepared = layer.prepared
  if prepared is not None and prepared.parts and not prepared.fits_bytes:
    return ('f32',)
  # XLA's convolutions in int8 are fast for images of many channels alone.
  if geometry is not None and not geometry.is_pointwise(weight.window) and (
      len(weight.window) != 2 or geometry.groups != 1
      or weight.length < _LEAST_CHANNELS):
    return ('f32',)
  # Beyond, sums in float32 round and those in int32 do not: which of the two is
  # faster must not decide about numbers.
  terms = weight.length * math.prod(weight.window)
  if (terms * carriers.magnitude(weight.numbers)
      * carriers.magnitude(seen.numbers) > carriers.EXACT_FLOAT32):
    return ('f32',)
  rows = shape[:-1] if geometry is None else (
      shape[0], *geometry.size(shape[1:-1], weight.window))
  products = math.prod(rows) * terms * jnp.shape(weight.data)[-1]
  return ('int8', 'f32') if cpu.carrier(products) == 'int8' else ('f32',)


def input_of(layer, shape):
  """The quantized input's structure and shapes."""
  return jax.eval_shape(
      lambda layer, x: layer.input.quantize(layer.around.input(x), axis=-1),
      layer, jax.ShapeDtypeStruct(tuple(shape), jnp.float32))


def _carries(layer, shape, carrier):
  if layer.input.is_full:
    return carrier == 'f32'
  formats = (layer.weight.numbers, input_of(layer, shape).numbers)
  return None not in [carriers.carry(fmt, carrier) for fmt in formats]


def why_not(implementation: str, layer: QLayer, shape: Sequence[int],
            geometry: Geometry | None = None, carrier: str | None = None
            ) -> str | None:
  """Why an implementation does not take an operation; None if it does.

  Args:
    implementation: one of IMPLEMENTATIONS.
    layer: with one set of weights.
    shape: of the input.
    geometry: of a convolution; None for a dense layer.
    carrier: None for the one that would be picked.

  Raises:
    ValueError: there is no such implementation.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'implementation {implementation!r}: must be None or one '
                     f'of {IMPLEMENTATIONS}')
  if carrier and not _carries(layer, shape, carrier):
    full = layer.input.is_full
    inputs = 'full precision' if full else input_of(layer, shape).numbers
    return (f'{carrier} does not hold weights in {layer.weight.numbers} and '
            f'inputs in {inputs}; choose another carrier, such as '
            f'{"f32" if full else "bf16"}')
  if implementation not in KERNELS.values():
    return None
  return _why_no_kernel(implementation, shape, layer, geometry, carrier)


def _why_no_kernel(implementation, shape, layer, geometry, carrier):
  weight = layer.weight
  if layer.input.is_full:
    return 'it multiplies quantized inputs, and those of this layer are not'
  ops = ops_of(implementation)
  if not isinstance(weight.layout, (layout_lib.Nibbles, ops.LAYOUT)):
    if weight.layout in (layout_lib.BYTES, layout_lib.LEVELS):
      return (f'it reads weights of 4 bits, and those of this layer are '
              f'{weight.fmt}, stored as {weight.layout.name}')
    return f'the weights are laid out for {weight.layout.name}'
  if weight.layout == layout_lib.NIBBLES and not weight.scales_outputs:
    return ('it takes a scale for each output channel of the weights, and '
            f'those of this layer are of shape {jnp.shape(weight.scale)}')
  if weight.shift is not None and (reason := ops.why_not_shifts(weight)):
    return reason
  tensor = input_of(layer, shape)
  if tensor.negative is not None:
    return 'it takes one scale for all inputs, not one for each sign'
  groups = carriers.has_groups(tensor)
  if groups and (reason := ops.why_not_input_groups(tensor)):
    return reason
  if not groups and not product.input_leaves(tensor, weight.window, geometry):
    return ('it takes inputs with scales by image, or under a window of 1 by '
            f'pixel and token, not scales of {tensor.scale.shape}')
  grouped = not product.weights_leave(weight)
  if grouped and weight.zero_point is not None:
    return ('it takes zero points of weights by output channel, not of shape '
            f'{weight.zero_point.shape}')
  if grouped and (reason := ops.why_not_groups(weight)):
    return reason
  if geometry is not None and (
      geometry.groups != 1 or set(geometry.dilation) != {1}
      or len(geometry.strides) != 2):
    return (f'it takes 2-D convolutions without groups and dilation, not '
            f'{geometry}')
  carrier = carrier or pick_carrier(layer, shape, implementation, geometry)
  if groups and carrier not in ops.CARRIERS_OF_GROUPS:
    return (f'it multiplies inputs with scales of groups in '
            f'{" or ".join(ops.CARRIERS_OF_GROUPS)}, not in {carrier}')
  if grouped and (base := ops.weight_base(weight.numbers, carrier)):
    return (f'it takes {base} off the levels of {weight.numbers}, which scales '
            f'of groups do not let it add again; use the XLA implementation')
  # Shapes alone: the question is asked for every layer, the weights are laid
  # out for those that are taken.
  codes = jax.eval_shape(ops.lay_out, weight).data
  if geometry is None:
    op, rows, more = 'matmul', (int(np.prod(shape[:-1])), shape[-1]), {}
  else:
    op, rows = 'conv', tuple(shape)
    more = {'strides': geometry.strides, 'padding': geometry.padding}
  more['group'] = weight.group if grouped else 0
  if groups and ops.SCALES_INPUTS:
    more['input_group'] = tensor.group
  if weight.shift is not None:
    more |= {'flag_group': weight.shift_group, 'wide': weight.wide}
  x = jax.ShapeDtypeStruct(rows, carriers.DTYPES[carrier][0])
  return ops.why_not(op, x, codes, fmt=weight.fmt, **more)


def ops_of(implementation: str) -> types.ModuleType:
  """The operations of a chip's kernels."""
  return _module(implementation, 'ops')


def _module(implementation, name):
  # Here, so that neither back end's library loads before it is asked for.
  return importlib.import_module(f'msfp_jax.kernels.{implementation}.{name}')


def lay_out(weight: QTensor, implementation: str | None) -> QTensor:
  """Packed weights as the kernels of an implementation read them.

  Args:
    weight: packed, with an axis of banks; such that the kernels take it.
    implementation: None for the one that is picked.
  """
  kernel = implementation or KERNELS.get(jax.default_backend())
  if kernel not in KERNELS.values():
    return weight
  ops = ops_of(kernel)
  banks = [ops.lay_out(weight.bank(i)) for i in range(len(weight.data))]
  # Scales and shifts stay as they are: of each bank its own, or one for all.
  return weight.replace(data=np.stack([bank.data for bank in banks]),
                        layout=banks[0].layout)
