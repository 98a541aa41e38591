"""Parameters + QuantSpec -> quantized weights, once."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from msfp_jax.quant import interception
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.around import Around
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.qtensor import QTensor
from msfp_jax.quant.rounded import check_digests


def quantize(params: Any, spec: spec_lib.QuantSpec) -> Any:
  """Parameters with the kernels of quantized layers as QTensors.

  Biases, normalizations and layers in full precision stay as they are.

  Raises:
    ValueError: the parameters hold a kernel that the spec does not name, or
      the other way round, or one with NaN, or another than it was rounded
      from.
  """
  params = interception.parameters(params)
  kernels = interception.leaves(params, 'kernel')
  check_layers(spec, kernels)
  interception.check_finite(kernels)
  return interception.replace(params, 'kernel', {
      name: quantize_kernel(kernel, spec.layers[name])
      for name, kernel in kernels.items()})


def quantize_kernel(kernel: jax.Array, layer: spec_lib.LayerSpec
                    ) -> QTensor | jax.Array:
  """The weights of one layer, without what stands around its product.

  Where the spec holds them they are taken from there: `check_layers` tells
  whether they are those of this kernel.
  """
  if layer.weight.is_full:
    return kernel
  if layer.rounded is not None:
    return jax.tree.map(jnp.asarray, layer.rounded.weight.unpacked()).bank(0)
  if layer.around is not None:
    kernel = layer.around.residual(kernel)
  # As a single bank, by the function that serves several: both kinds of model
  # get the same weights.
  return layer.weight.quantize_banks(kernel[None]).bank(0)


def layers_of(qparams: Any, spec: spec_lib.QuantSpec) -> dict[str, QLayer]:
  """{name: the layer} of what `quantize` returned."""
  kernels = interception.leaves(qparams, 'kernel')
  biases = interception.leaves(qparams, 'bias')
  check_layers(spec, kernels)
  return {name: make_layer(
      kernels[name] if isinstance(kernels[name], QTensor) else None, layer,
      biases.get(name)) for name, layer in spec.layers.items()}


def make_layer(weight: Any, layer: spec_lib.LayerSpec,
               bias: jax.Array | None) -> QLayer:
  """A QLayer of a LayerSpec; without quantized weights the module has both."""
  if weight is None:
    # Its bias stays in the model's parameters, where the module adds it.
    return QLayer(None, layer.act)
  return QLayer(weight, layer.act, bias, layer.around or Around())


def check_layers(spec: spec_lib.QuantSpec, kernels: Mapping[str, Any]) -> None:
  """Raises ValueError unless the spec is of these layers, {name: kernel}.

  A spec that holds weights must be of these very kernels.
  """
  uncovered = sorted(set(kernels) - set(spec.layers))
  absent = sorted(set(spec.layers) - set(kernels))
  if uncovered or absent:
    raise ValueError(
        'the spec does not fit the model: layers that it does not cover: '
        f'{uncovered}; layers that the model lacks: {absent}; calibrate this '
        'model')
  check_digests({name: layer.rounded for name, layer in spec.layers.items()},
                kernels)
