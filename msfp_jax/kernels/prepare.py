"""Work on packed weights that is done once, before they run."""

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.kernels import carriers
from msfp_jax.kernels import choice
from msfp_jax.kernels import offload
from msfp_jax.kernels import winograd
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant.qlayer import Prepared
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.qtensor import QTensor

# Weights whose values are summed at once.
_AT_ONCE = 2**22


def prepare(layer: QLayer, implementation: str | None = None) -> QLayer:
  """Prepares packed weights once, so that every run of them is faster.

  Adds the sums of the weights where zero points need them; for XLA on CPUs
  finds out how `winograd` can sum exactly; for a chip's kernels lays the
  weights out anew.

  Args:
    layer: with an axis of banks; what is not packed stays as it is.
    implementation: that it will run by; None for the one that is picked.
  """
  weight = layer.weight
  if not isinstance(weight, QTensor) or weight.layout not in (
      layout_lib.NIBBLES, layout_lib.BYTES):
    return layer
  # On the host: this happens once, with as many shapes as there are layers,
  # each of which XLA would compile.
  layer = offload.to_numpy(layer)
  weight = layer.weight
  prepared = Prepared()
  if not layer.input.is_full and _per_output(weight):
    needs_sums = _has_zero(layer)
    # [h, kh, kw, I, O]: a convolution of images.
    wide = weight.data.ndim == 5
    if needs_sums:
      prepared = prepared.replace(tap_sums=_sums(weight))
    if wide and _has_winograd(layer):
      values, reach = _values(weight), _reach(layer.input)
      prepared = prepared.replace(
          parts=winograd.splits(values, *reach),
          fits_bytes=winograd.fits(values, *reach))
  if _is_for_kernels(layer):
    weight = choice.lay_out(weight, implementation)
  return layer.replace(weight=weight, prepared=prepared)


def _per_output(weight):
  return weight.outer is None and set(weight.scale.shape[:-1]) <= {1}


def _values(weight):
  """v of the weights as carried in float32, `[h, *window, I, O]`."""
  return np.asarray(carriers.operand(weight, 'f32').v)


def _sums(weight):
  """Sums of them over I, `[h, *window, O]`."""
  # Some columns at a time: all values of a large layer are eight times what it
  # takes packed, and are there more than once while they are made.
  outputs = weight.data.shape[-1]
  pieces = min(-(-weight.size // _AT_ONCE), outputs // 2) or 1
  ends = [outputs * i // pieces for i in range(pieces + 1)]
  of = lambda columns: jax.tree.map(
      lambda part: part[..., columns] if part.shape[-1:] == (outputs,)
      else part, weight)
  return np.concatenate([_values(of(slice(*ends[i:i + 2]))).sum(-2)
                         for i in range(pieces)], axis=-1)


def _has_zero(layer):
  """Whether the input may have a zero beside its scale, as carried."""
  probe = jax.eval_shape(
      lambda quantizer, x: quantizer.at(0).quantize(x), layer.input,
      jax.ShapeDtypeStruct((1, 8, 8, layer.weight.length), jnp.float32))
  carried = carriers.carry(probe.numbers, 'f32')
  # An unsigned format may be carried with an offset even without a zero point:
  # the offset is then the zero.
  return probe.zero_point is not None or carried.lowest_offset > 0


def _reach(quantizer):
  """Lowest and highest v of an input, as carried in float32."""
  fmt, scale, zero_point = quantizer.one_scale()
  carried = carriers.carry(fmt, 'f32')
  offset = np.asarray(carried.offset(
      np.asarray(scale), None if zero_point is None
      else np.asarray(zero_point)))
  values = carried.values()
  # Scales may differ by step, and with them the offset: the widest of all.
  return values.min() - offset.max(), values.max() - offset.min()


def _has_winograd(layer):
  static = layer.input.one_scale()
  if static is None:
    return False
  carried = carriers.carry(layer.weight.numbers, 'f32')
  of_input = carriers.carry(static[0], 'f32')
  # An offset is a zero as well, which `winograd` does not add.
  data = layer.weight.data
  return (data.shape[-4:-2] == (3, 3) and layer.weight.zero_point is None
          and carried.lowest_offset == 0
          and carried.unit == layer.weight.fmt.step
          and of_input.unit == static[0].step
          and winograd.pays(layer.weight.length, data.shape[-1]))


def _is_for_kernels(layer):
  """Whether kernels that read weights of 4 bits take the layer."""
  weight = layer.weight
  return (weight.layout == layout_lib.NIBBLES and not layer.input.is_full
          and weight.fmt.bits == 4 and weight.scales_outputs)
