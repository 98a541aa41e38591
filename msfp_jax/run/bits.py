"""Bits per weight and per activation, with all that comes with them counted.

A format of 4 bits takes more than 4: scales, zero points, shifts, and what
stands around the product. What methods really take is what compares them.
"""

from collections.abc import Mapping
import math
from typing import Any

import flax.linen as nn
import jax

from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import interception
from msfp_jax.quant.quantizers import FULL_BITS


def per_weight(model: packed_lib.PackedModel) -> float:
  """Bits that a model stores for each weight of its layers.

  Codes, scales, zero points, shifts, smoothing and branches, over the number
  of weights that a layer works with at one time: each bank adds its bits.
  """
  kernels = interception.leaves(model.params, 'kernel')
  bits = count = 0
  for name, layer in model.layers.items():
    if layer.weight is None:
      bits += FULL_BITS * kernels[name].size
      count += kernels[name].size
    else:
      bits += layer.weight.nbits + layer.around.nbits
      count += layer.weight.size // layer.num_banks
  return bits / count


def per_activation(model: packed_lib.PackedModel,
                   shapes: Mapping[str, tuple[int, ...]]) -> float:
  """Bits of the layers' inputs, for each of their elements.

  Args:
    model: whose quantizers of inputs are looked at; nothing is computed.
    shapes: {layer: of its input, `[..., I]`}, see `input_shapes`. A scale of
      the whole tensor counts once for all that a shape holds.

  Returns:
    Of all steps on average; with `differences` the first counts twice, as it is
    taken twice.
  """
  bits = count = 0
  for name, shape in shapes.items():
    size = math.prod(shape)
    count += size
    # By shapes alone, so that the quantizer itself says what it would store.
    layer = model.layers[name]
    bits += FULL_BITS * size if layer.input.is_full else jax.eval_shape(
        lambda x, layer=layer: layer.input.at(0).quantize(
            layer.around.input(x)),
        jax.ShapeDtypeStruct(shape, 'float32')).nbits
  steps = model.plan.num_steps
  return bits / count * ((steps + 1) / steps if model.differences else 1)


def input_shapes(model: nn.Module, params: Any, *inputs: Any
                 ) -> dict[str, tuple[int, ...]]:
  """{layer: the shape of its input}; the model does not run.

  Args:
    model: in full precision.
    params: its parameters, or their shapes.
    *inputs: what it is called with, or their shapes.
  """
  return {name: seen.shape for name, seen in jax.eval_shape(
      lambda *given: {name: call.input for name, call in interception.record(
          model, *given)[1].items()}, params, *inputs).items()}
