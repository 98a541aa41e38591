"""Applying a QuantSpec to any Flax model, by interception."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.linen as nn
import jax

from msfp_jax.quant import interception as layers_lib
from msfp_jax.quant import quantizers
from msfp_jax.quant import spec as spec_lib


def quantize(params: Any, spec: spec_lib.QuantSpec) -> Any:
  """Parameters with every kernel replaced by its quantized value.

  Biases and normalizations stay as they are.

  Raises:
    ValueError: the parameters hold a kernel that the spec does not name, or
      the other way round, or one with NaN.
  """
  kernels = layers_lib.leaves(params, 'kernel')
  check_layers(spec, kernels)
  layers_lib.check_finite(kernels)
  return layers_lib.replace(
      params, 'kernel', quantize_kernels(kernels, spec))


def quantize_kernels(kernels: Mapping[str, jax.Array],
                     spec: spec_lib.QuantSpec) -> dict[str, jax.Array]:
  """{layer: fake-quantized kernel}; a layer without quantizer passes."""
  out = {}
  for name, kernel in kernels.items():
    weight = spec.layers[name].weight
    out[name] = kernel if weight is None else weight.fake_quant(kernel)
  return out


def check_layers(spec: spec_lib.QuantSpec, names: Any) -> None:
  """Raises ValueError unless the spec names exactly these layers."""
  uncovered = sorted(set(names) - set(spec.layers))
  absent = sorted(set(spec.layers) - set(names))
  if uncovered or absent:
    raise ValueError(
        'the spec does not fit the model: layers that it does not cover: '
        f'{uncovered}; layers that the model lacks: {absent}; calibrate this '
        'model')


def apply(model: nn.Module, params: Any,
          act_quantizers: Mapping[str, quantizers.Quantizer | None],
          *inputs: Any) -> Any:
  """model(*inputs) with every layer's input quantized.

  Args:
    model: any linen model.
    params: its parameters, with weights already quantized (`quantize`).
    act_quantizers: one for every Conv and Dense; None for full precision.
    *inputs: of the model.

  Raises:
    ValueError: a layer has no entry, or an entry no layer.
  """
  visited = set()

  def visit(name: str, x: jax.Array) -> jax.Array:
    if name not in act_quantizers:
      raise ValueError(f'no rule covers layer {name!r}: calibrate this model, '
                       'or state that the layer stays in full precision')
    visited.add(name)
    quantizer = act_quantizers[name]
    return x if quantizer is None else quantizer.fake_quant(x)

  with layers_lib.intercept_inputs(visit):
    out = model.apply({'params': params}, *inputs)
  if unvisited := sorted(set(act_quantizers) - visited):
    raise ValueError(f'the spec names layers that the model lacks: {unvisited}')
  return out


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
  """A model whose layers see quantized inputs; call `apply` as the model's.

  Its parameters are what `quantize` returned.
  """

  model: nn.Module
  spec: spec_lib.QuantSpec

  def apply(self, variables: Mapping[str, Any], *inputs: Any) -> Any:
    return apply(self.model, variables['params'], self.spec.act_quantizers,
                 *inputs)
