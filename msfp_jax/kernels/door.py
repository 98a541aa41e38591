"""Products of quantized layers: one door to all back ends.

`run(layer, x)` is the only product there is: simulation, training and packed
inference are this function on other storage. It quantizes its input and
multiplies it with the weights by one of these implementations:

- 'reference': float32 and plain products (see `product`).
- 'xla': everywhere; weights are decoded to the carrier, which XLA's own
  products take. On CPUs wide 3x3 convolutions are by `winograd`.
- 'mosaic_tpu', 'mosaic_gpu': Pallas kernels that decode packed weights on the
  chip, for signed 4-bit weights.

None picks the kernels where the device has them and they take the operation,
and XLA elsewhere. The input is quantized outside of the kernels, so that XLA
can fuse it with the activation function or normalization before it.

This is the one module that knows the chips' kernels. A chip is a folder, named
in KERNELS, with a module `ops` of `matmul`, `conv`, `why_not`, `carriers_of`,
`weight_unit`, `lay_out` and `LAYOUT`.
"""

from collections.abc import Callable, Sequence
import functools
import importlib
import types

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from msfp_jax.kernels import carriers
from msfp_jax.kernels import compiler
from msfp_jax.kernels import product
from msfp_jax.kernels import training
from msfp_jax.kernels import winograd
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant.geometry import Geometry
from msfp_jax.quant.qlayer import Latent
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.qtensor import QTensor

# Back end -> the implementation by kernels of its own.
KERNELS = {'tpu': 'mosaic_tpu', 'gpu': 'mosaic_gpu'}
IMPLEMENTATIONS = ('reference', 'xla', *KERNELS.values())
# Carriers of XLA, of which the first that holds both formats is taken; those
# of a chip's kernels are elsewhere those of XLA too.
_CARRIERS = {'cpu': ('f32',)}


def run(layer: QLayer, x: jax.Array, geometry: Geometry | None = None, *,
        implementation: str | None = None, carrier: str | None = None,
        conv_general_dilated: Callable[..., jax.Array]
        = lax.conv_general_dilated) -> jax.Array:
  """Computes a layer: quantizes the input, multiplies, adds the bias.

  Args:
    layer: with one set of weights, `[*window, I / groups, O]` or `[I, O]`.
    x: float `[B, *spatial, I]` or `[..., I]`.
    geometry: of a convolution; None for a dense layer.
    implementation: one of IMPLEMENTATIONS; None picks.
    carrier: a key of `carriers.DTYPES`; None picks.
    conv_general_dilated: for products in float32, in place of XLA's.

  Returns:
    `[B, *spatial', O]` or `[..., O]`, of x's dtype.

  Raises:
    ValueError: an implementation or carrier that does not take the operation;
      the message says why.
  """
  # One function for all products in float32: the model's own convolution where
  # it has one, in training as well.
  plain = functools.partial(
      _plain, geometry=geometry, function=conv_general_dilated)
  if isinstance(layer.weight, Latent):
    # Weights in training exist in float32 only, and are multiplied as the
    # simulation does.
    return training.run(
        lambda layer, x: _run(layer, x, geometry, 'reference', 'f32', plain),
        plain, layer, x)
  if implementation is None:
    implementation = pick(layer, x.shape, geometry, carrier)
  if reason := why_not(implementation, layer, x.shape, geometry, carrier):
    raise ValueError(f'implementation {implementation!r}: {reason}')
  carrier = carrier or pick_carrier(layer, x.shape, implementation)
  work = functools.partial(_run, geometry=geometry,
                           implementation=implementation, carrier=carrier,
                           plain=plain)
  # A chip's kernel decodes the weights itself, a block at a time: there is
  # nothing that XLA could decode ahead of time.
  if implementation in KERNELS.values():
    return work(layer, x)
  # Here, where all others pass: what is between two layers is then the same
  # program whatever they run by, and rounded alike. And weights are decoded
  # where they are used, not all of them before a sampler's loop.
  return compiler.apart(lambda x, layer: work(layer, x), x, layer)


def _plain(x, w, *, geometry, function):
  """The product of float32 values, by XLA."""
  if geometry is None or geometry.is_pointwise(w.shape[:-2]):
    return _dot(x, w, geometry)
  return geometry.conv(x, w, function=function)


def _dot(x, w, geometry, **options):
  """A dense layer or a window of 1: XLA has faster products than convolutions.
  """
  if geometry is not None and not geometry.plain:
    # A window of 1 with strides looks at every s-th place and at no other.
    x = x[(slice(None), *[slice(None, None, s) for s in geometry.strides])]
  return lax.dot_general(x, w.reshape(w.shape[-2:]),
                         (((x.ndim - 1,), (0,)), ((), ())), **options)


def _run(layer, x, geometry, implementation, carrier, plain):
  """`run`, everything decided."""
  seen = layer.around.input(x)
  if layer.input.is_full:
    # The input has no levels: nothing exact to gain.
    out = plain(jnp.asarray(seen, jnp.float32), layer.weight.dequantize())
    out = out if layer.bias is None else out + layer.bias
  elif implementation in KERNELS.values():
    out = _run_kernel(layer, seen, geometry, implementation, carrier)
  elif _winograd_takes(layer, seen.shape, geometry, implementation, carrier):
    out = _run_winograd(layer, seen, geometry)
  else:
    out = _run_xla(layer, seen, geometry, implementation, carrier, plain)
  if layer.around.down is not None:
    # The branch sees x' before it was quantized: it carries what 4 bits lose.
    out = out + training.low_rank(layer.around, seen, plain)
  return out.astype(x.dtype)


def _run_xla(layer, x, geometry, implementation, carrier, plain):
  # An input with two scales is a sum of two, and so is its product.
  first, *others = layer.input.quantize(x, axis=-1).halves()
  multiply = functools.partial(
      _run_tensor, geometry=geometry, implementation=implementation,
      carrier=carrier, plain=plain)
  out = multiply(layer, first)
  for other in others:
    out = carriers.add(multiply(layer.replace(bias=None), other), out)
  return out


def _run_tensor(layer, tensor, geometry, implementation, carrier, plain):
  """The product of an input with one scale for both signs, by XLA."""
  weight = layer.weight
  multiply = functools.partial(
      _multiply, geometry=geometry, carrier=carrier, plain=plain)
  # Scales that stay in the sum, by one of two ways. `grouped` sums each group
  # exactly, and holds all groups' sums: n times the result for n groups.
  # `dequantized` is one product of scaled elements, each rounded: fewer passes
  # over memory, and float32's own precision. `grouped` knows no groups of
  # channels (depthwise convolutions).
  if not product.is_separable(tensor, weight, geometry):
    if carrier == 'f32' and implementation == 'xla' or (
        geometry is not None and geometry.groups != 1):
      return product.dequantized(tensor, weight, layer.bias, geometry, plain)
    return product.grouped(tensor, weight, layer.bias, geometry, carrier)
  if carrier == 'f32' and carriers.cancels(weight):
    return product.dequantized(tensor, weight, layer.bias, geometry, plain)
  return product.separable(
      *product.operands(tensor, weight, geometry, carrier), layer.bias,
      geometry, multiply, _sums_of(layer, carrier))


def _multiply(v, w, *, geometry, carrier, plain):
  """The product of values in a carrier, by XLA, in the carrier's sums."""
  if carrier == 'f32':
    return plain(v, w)
  options = {'preferred_element_type': carriers.DTYPES[carrier][1]}
  if geometry is None or geometry.is_pointwise(w.shape[:-2]):
    return _dot(v, w, geometry, **options)
  return geometry.conv(v, w, **options)


def _sums_of(layer, carrier):
  """The prepared sums of the weights, if they are those of this carrier."""
  # `prepare` summed v as float32 carries it. Another carrier with the same
  # offsets has the same v in other units; fp8 has no offsets, and other v.
  own, other = (carriers.carry(layer.weight.numbers, name)
                for name in ('f32', carrier))
  if layer.prepared is None or layer.prepared.tap_sums is None or (
      own.highest_offset != other.highest_offset):
    return None
  return layer.prepared.tap_sums * (own.unit / other.unit)


def _winograd_takes(layer, shape, geometry, implementation, carrier):
  return (implementation == 'xla' and carrier == 'f32'
          and layer.prepared is not None and layer.prepared.parts > 0
          and jax.default_backend() == 'cpu'
          and geometry is not None and geometry.plain
          and geometry.padding == ((1, 1), (1, 1))
          and winograd.pays_for(shape, layer.prepared.parts))


def _run_winograd(layer, x, geometry):
  # One scale for the input: it is quantized in parts, a few images at a time.
  whole, weight = product.operands(
      layer.input.quantize(x, axis=-1), layer.weight, geometry, 'f32')
  scale, shift = product.epilogue(
      whole, weight, layer.bias, geometry, layer.prepared.tap_sums)
  return winograd.conv(
      x, weight.v, layer.prepared.parts,
      lambda x: carriers.operand(layer.input.quantize(x, axis=-1), 'f32').v,
      lambda y: carriers.add(y.astype(jnp.float32) * scale, shift))


def _run_kernel(layer, x, geometry, implementation, carrier):
  ops, weight = _ops_of(implementation), layer.weight
  fmt, v = weight.fmt, carriers.operand(
      layer.input.quantize(x, axis=-1), carrier)
  # In place of the weights a shape: the epilogue looks at their scale alone,
  # unless it has to sum them.
  bare = carriers.Operand(
      jax.ShapeDtypeStruct((*weight.data.shape[:-2], weight.length,
                            weight.scale.shape[-1]), jnp.float32),
      weight.scales().reshape(-1) * carriers.carry(fmt, carrier).unit, None)
  sums = _sums_of(layer, carrier)
  if v.zero is not None and sums is None:
    bare = bare._replace(v=carriers.operand(weight, carrier).v)
  scale, shift = product.epilogue(v, bare, layer.bias, geometry, sums)
  # The kernels' weights are in units of their own.
  unit = carriers.carry(fmt, carrier).unit
  scale = scale * (fmt.step / unit / ops.weight_unit(fmt, carrier))
  codes = ops.lay_out(weight).data
  options = {'fmt': fmt, 'out_dtype': x.dtype}
  if geometry is None:
    out = ops.matmul(v.v.reshape(-1, v.v.shape[-1]), codes, scale, shift,
                     **options)
    return out.reshape(*x.shape[:-1], -1)
  return ops.conv(v.v, codes, scale, shift, strides=geometry.strides,
                  padding=geometry.padding, **options)


def pick(layer: QLayer, shape: Sequence[int],
         geometry: Geometry | None = None, carrier: str | None = None) -> str:
  """The implementation that None stands for; arguments as for `why_not`."""
  if not layer.weight.is_packed:
    # A simulation, not packed: scales in the sum are cheaper by 'xla', which
    # has `dequantized` (see `_run_xla`).
    separable = layer.input.is_full or product.is_separable(
        _input_of(layer, shape), layer.weight, geometry)
    return 'reference' if separable else 'xla'
  kernel = KERNELS.get(jax.default_backend())
  if kernel and why_not(kernel, layer, shape, geometry, carrier) is None:
    return kernel
  return 'xla'


def pick_carrier(layer: QLayer, shape: Sequence[int], implementation: str
                 ) -> str:
  """The carrier of an implementation on the default device."""
  if implementation == 'reference' or layer.input.is_full:
    return 'f32'
  # A chip's kernels may be asked for on another device, to be interpreted: they
  # have their own chip's carriers there.
  backend = {name: key for key, name in KERNELS.items()}.get(
      implementation, jax.default_backend())
  choices = _CARRIERS.get(backend)
  if choices is None:
    known = KERNELS.get(backend)
    choices = _ops_of(known).carriers_of(
        jax.devices()[0].device_kind) if known else ('f32',)
  return next((name for name in choices if _carries(layer, shape, name)), 'f32')


def _input_of(layer, shape):
  """The quantized input's structure and shapes."""
  return jax.eval_shape(
      lambda layer, x: layer.input.quantize(layer.around.input(x), axis=-1),
      layer, jax.ShapeDtypeStruct(tuple(shape), jnp.float32))


def _carries(layer, shape, carrier):
  if layer.input.is_full:
    return carrier == 'f32'
  formats = (layer.weight.numbers, _input_of(layer, shape).numbers)
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
    inputs = 'full precision' if full else _input_of(layer, shape).numbers
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
  if weight.zero_point is not None:
    return 'its weights have no zero point, and those of this layer have'
  if weight.shift is not None:
    return 'its weights have no shifts, and those of this layer have'
  ops = _ops_of(implementation)
  if not isinstance(weight.layout, (layout_lib.Nibbles, ops.LAYOUT)):
    if weight.layout in (layout_lib.BYTES, layout_lib.LEVELS):
      return (f'it reads weights of 4 bits, and those of this layer are '
              f'{weight.fmt}, stored as {weight.layout.name}')
    return f'the weights are laid out for {weight.layout.name}'
  if weight.layout == layout_lib.NIBBLES and not weight.scales_outputs:
    return ('it takes a scale for each output channel of the weights, and '
            f'those of this layer are of shape {jnp.shape(weight.scale)}')
  tensor = _input_of(layer, shape)
  if tensor.negative is not None:
    return 'it takes one scale for all inputs, not one for each sign'
  if tensor.scale.ndim or not product.is_separable(tensor, weight, geometry):
    return ('it takes one scale for the input and one for each output channel, '
            f'not scales of {tensor.scale.shape} and {weight.scale.shape}')
  if geometry is not None and (
      geometry.groups != 1 or set(geometry.dilation) != {1}
      or len(geometry.strides) != 2):
    return (f'it takes 2-D convolutions without groups and dilation, not '
            f'{geometry}')
  carrier = carrier or pick_carrier(layer, shape, implementation)
  # Shapes alone: the question is asked for every layer, the weights are laid
  # out for those that are taken.
  codes = jax.eval_shape(ops.lay_out, weight).data
  if geometry is None:
    op, rows, more = 'matmul', (int(np.prod(shape[:-1])), shape[-1]), {}
  else:
    op, rows = 'conv', tuple(shape)
    more = {'strides': geometry.strides, 'padding': geometry.padding}
  x = jax.ShapeDtypeStruct(rows, carriers.DTYPES[carrier][0])
  return ops.why_not(op, x, codes, fmt=weight.fmt, **more)


def _ops_of(implementation: str) -> types.ModuleType:
  """The operations of a chip's kernels."""
  # Here, so that neither back end's library loads before it is asked for.
  return importlib.import_module(f'msfp_jax.kernels.{implementation}.ops')


def lay_out(weight: QTensor, implementation: str | None) -> QTensor:
  """Packed weights as the kernels of an implementation read them.

  Args:
    weight: packed, with an axis of banks; such that the kernels take it.
    implementation: None for the one that is picked.
  """
  kernel = implementation or KERNELS.get(jax.default_backend())
  if kernel not in KERNELS.values():
    return weight
  ops = _ops_of(kernel)
  banks = [ops.lay_out(weight.bank(i)) for i in range(len(weight.data))]
  return banks[0].replace(data=np.stack([bank.data for bank in banks]))
