"""Products of quantized layers: one door to all back ends.

`run(layer, x)` is the only product there is: simulation, training and packed
inference are this function on other storage. It quantizes its input and
multiplies it with the weights by one of these implementations:

- 'reference': float32 and plain products (see `product`).
- 'xla': everywhere; weights are decoded to the carrier, which XLA's own
  products take. On CPUs wide 3x3 convolutions are by `winograd`.
- 'mosaic_tpu', 'mosaic_gpu': Pallas kernels that decode packed weights on the
  chip.

None picks the kernels where the device has them, they take the operation, and
none was measured to be slower than XLA; XLA elsewhere. The input is quantized
outside of the kernels, so that XLA can fuse it with the activation function or
normalization before it.

Which of them takes what is asked of `choice`.
"""

from collections.abc import Callable
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from msfp_jax.kernels import beside
from msfp_jax.kernels import carriers
from msfp_jax.kernels import choice
from msfp_jax.kernels import compiler
from msfp_jax.kernels import epilogue
from msfp_jax.kernels import product
from msfp_jax.kernels import training
from msfp_jax.kernels import winograd
from msfp_jax.quant.adapter import Adapter
from msfp_jax.quant.geometry import Geometry
from msfp_jax.quant.qlayer import Latent
from msfp_jax.quant.qlayer import QLayer


def run(layer: QLayer, x: jax.Array, geometry: Geometry | None = None, *,
        implementation: str | None = None, carrier: str | None = None,
        conv_general_dilated: Callable[..., jax.Array]
        = lax.conv_general_dilated) -> jax.Array:
  """Computes a layer: quantizes the input, multiplies, adds the bias.

  Args:
    layer: with one set of weights, `[*window, I / groups, O]` or `[I, O]`.
    x: float `[B, *spatial, I]` or `[..., I]`.
    geometry: of a convolution; None for a dense layer.
    implementation: one of `choice.IMPLEMENTATIONS`; None picks.
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
    # simulation does; of activations in bfloat16 in a carrier that is as fast,
    # where that holds the levels.
    return training.run(
        lambda layer, x: _run(
            layer, x, geometry, 'reference',
            choice.carrier_of_training(layer, x), plain), plain, layer, x)
  if implementation is None:
    implementation = choice.pick(layer, x.shape, geometry, carrier)
  if reason := choice.why_not(
      implementation, layer, x.shape, geometry, carrier):
    raise ValueError(f'implementation {implementation!r}: {reason}')
  carrier = carrier or choice.pick_carrier(
      layer, x.shape, implementation, geometry)
  work = functools.partial(_run, geometry=geometry,
                           implementation=implementation, carrier=carrier,
                           plain=plain)
  # A chip's kernel decodes the weights itself, a block at a time: there is
  # nothing that XLA could decode ahead of time.
  if implementation in choice.KERNELS.values():
    return work(layer, x)
  # Here, where all others pass: what is between two layers is then the same
  # program whatever they run by, and rounded alike. And weights are decoded
  # where they are used, not all of them before a sampler's loop.
  return compiler.apart(lambda x, layer: work(layer, x), x, layer)


def run_branches(layer: QLayer, x: jax.Array,
                 geometry: Geometry | None = None, *,
                 conv_general_dilated: Callable[..., jax.Array]
                 = lax.conv_general_dilated) -> jax.Array:
  """What the branches that a layer has add to its product, float32.

  Args:
    layer: with a branch, or an adapter.
    x: its input, as of `run`.
    geometry: likewise.
    conv_general_dilated: likewise.
  """
  return beside.add(
      jnp.zeros(()), layer, x, layer.around.input(x), functools.partial(
          _plain, geometry=geometry, function=conv_general_dilated))


def run_adapter(adapter: Adapter, x: jax.Array,
                geometry: Geometry | None = None, *,
                conv_general_dilated: Callable[..., jax.Array]
                = lax.conv_general_dilated) -> jax.Array:
  """What an adapter adds to a layer that is not quantized, float32.

  Args:
    adapter: of the layer.
    x: its input, as of `run`.
    geometry: likewise.
    conv_general_dilated: likewise.
  """
  return beside.low_rank(
      x, adapter.down, adapter.up, functools.partial(
          _plain, geometry=geometry, function=conv_general_dilated),
      adapter.gain)


def _plain(x, w, *, geometry, function):
  """The product of float32 values, by XLA."""
  if geometry is None or geometry.is_pointwise(w.shape[:-2]):
    return _dot(x, w, geometry)
  return geometry.conv(x, w, function=function)


def _dot(x, w, geometry, **options):
  """A dense layer or a window of 1: XLA has faster products than convolutions.
  """
  x = _visited(x, geometry)
  return lax.dot_general(x, w.reshape(w.shape[-2:]),
                         (((x.ndim - 1,), (0,)), ((), ())), **options)


def _visited(x, geometry):
  """The places of x at which a window of 1 stops; those of a dense layer."""
  if geometry is None or geometry.plain:
    return x
  # With strides it looks at every s-th place and at no other.
  return x[(slice(None), *[slice(None, None, s) for s in geometry.strides])]


def _run(layer, x, geometry, implementation, carrier, plain):
  """`run`, everything decided."""
  seen = layer.around.input(x)
  if layer.input.is_full:
    # The input has no levels: nothing exact to gain.
    out = plain(jnp.asarray(seen, jnp.float32), layer.weight.dequantize())
    out = out if layer.bias is None else out + layer.bias
  elif implementation in choice.KERNELS.values():
    out = _run_kernel(layer, seen, geometry, implementation, carrier)
  elif algorithm := _winograd_of(
      layer, seen.shape, geometry, implementation, carrier):
    out = _run_winograd(algorithm, layer, seen, geometry)
  else:
    out = _run_xla(layer, seen, geometry, implementation, carrier, plain)
  return beside.add(out, layer, x, seen, plain).astype(x.dtype)


def _run_xla(layer, x, geometry, implementation, carrier, plain):
  # An input with two scales is a sum of two, and so is its product.
  first, *others = layer.input.quantize(x, axis=-1).halves()
  multiply = functools.partial(
      _run_tensor, geometry=geometry, implementation=implementation,
      carrier=carrier, plain=plain)
  out = multiply(layer, first)
  for other in others:
    out = carriers.add(multiply(layer.replace(bias=None), other), out)
  return _with_nan(out, x, geometry) if carrier == 'int8' else out


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


def _with_nan(out, x, geometry):
  """Results in int8, NaN where the input has one: by row, token or image."""
  # Not of the levels: XLA would keep these in float32 for a second use. A
  # maximum of bytes is faster than `any` on CPUs.
  lost = jnp.isnan(x).astype(jnp.uint8).max(-1, keepdims=True)
  if geometry is not None:
    lost = lost.max(tuple(range(1, lost.ndim)), keepdims=True)
  return jnp.where(lost > 0, jnp.nan, out)


def _multiply(v, w, *, geometry, carrier, plain):
  """The product of values in a carrier, by XLA, in the carrier's sums."""
  if carrier == 'f32':
    return plain(v, w)
  options = {'preferred_element_type': carriers.DTYPES[carrier][1]}
  if geometry is None or geometry.is_pointwise(w.shape[:-2]):
    if carrier == 'int8' and jax.default_backend() == 'cpu':
      return compiler.product_of_bytes(
          _visited(v, geometry), w.reshape(w.shape[-2:]))
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


def _winograd_of(layer, shape, geometry, implementation, carrier):
  """The algorithm of `winograd` that computes a layer; None for a plain one."""
  prepared = layer.prepared
  if (implementation != 'xla' or prepared is None
      or jax.default_backend() != 'cpu' or geometry is None
      or not geometry.plain or geometry.padding != ((1, 1), (1, 1))):
    return None
  if carrier == 'int8' and prepared.fits_bytes:
    algorithm, parts = winograd.BYTES, 1
  elif carrier == 'f32' and prepared.parts:
    algorithm, parts = winograd.FLOAT, prepared.parts
  else:
    return None
  return algorithm if winograd.pays_for(algorithm, shape, parts) else None


def _run_winograd(algorithm, layer, x, geometry):
  # One scale for the input: it is quantized in parts, a few images at a time.
  carrier = algorithm.carrier
  whole, weight = product.operands(
      layer.input.quantize(x, axis=-1), layer.weight, geometry, 'f32')
  scale, shift = product.epilogue(
      whole, weight, layer.bias, geometry, layer.prepared.tap_sums)
  return winograd.conv(
      algorithm, x, weight.v,
      layer.prepared.parts if carrier == 'f32' else 1,
      lambda x: carriers.operand(layer.input.quantize(x, axis=-1), 'f32').v,
      lambda y: carriers.add(y.astype(jnp.float32) * scale, shift))


def _run_kernel(layer, x, geometry, implementation, carrier):
  ops, weight = choice.ops_of(implementation), layer.weight
  tensor = layer.input.quantize(x, axis=-1)
  grouped = carriers.has_groups(tensor)
  by_kernel = grouped and ops.SCALES_INPUTS
  # What the epilogue sees of an input whose scales stay in the sum has them.
  v = (carriers.scaled_operand(tensor, 'f32' if by_kernel else carrier)
       if grouped else carriers.operand(tensor, carrier))
  end = epilogue.make(
      v, weight, layer.bias, geometry, carrier, _sums_of(layer, carrier),
      ops.weight_unit(weight.numbers, carrier),
      ops.weight_base(weight.numbers, carrier))
  codes, options = ops.lay_out(weight).data, {
      'fmt': weight.fmt, 'out_dtype': x.dtype, 'columns': end.columns}
  if not product.weights_leave(weight):
    options |= {'groups': jnp.asarray(weight.scale, jnp.float32),
                'group': weight.group}
  if weight.shift is not None:
    options |= {'flags': weight.shift, 'flag_group': weight.shift_group,
                'wide': weight.wide}
  if by_kernel:
    v = carriers.operand(tensor, carrier)
    scale = jnp.asarray(tensor.scale, jnp.float32) * np.float32(
        carriers.carry(tensor.numbers, carrier).unit)
    options |= {'inputs': scale if geometry else scale.reshape(
        -1, scale.shape[-1]), 'input_group': tensor.group}
  if geometry is None:
    rows = jax.tree.map(lambda part: part.reshape(-1), end.rows)
    out = ops.matmul(v.v.reshape(-1, v.v.shape[-1]), codes, end.scale,
                     end.shift, rows=rows, **options)
    return out.reshape(*x.shape[:-1], -1)
  return ops.conv(v.v, codes, end.scale, end.shift, rows=end.rows,
                  strides=geometry.strides, padding=geometry.padding, **options)
