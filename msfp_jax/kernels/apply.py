"""Running any linen model on quantized layers, by interception."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from msfp_jax.kernels import door
from msfp_jax.kernels import offload
from msfp_jax.quant import geometry as geometry_lib
from msfp_jax.quant import interception
from msfp_jax.quant import quantize as quantize_lib
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.qlayer import QLayer

# (layer, with one set of weights; module, its input, what it computes by
# itself) -> its output.
Run = Callable[[QLayer, nn.Module, jax.Array,
                Callable[[jax.Array], jax.Array]], jax.Array]
# As `interception.call`.
Call = Callable[..., Any]


def apply(model: nn.Module, params: Any, layers: Mapping[str, QLayer],
          *inputs: Any, implementation: str | None = None,
          at: Callable[[str, QLayer], QLayer] = lambda name, layer: layer,
          dtype: Any = None, run: Run | None = None,
          call: Call = interception.call) -> Any:
  """model(*inputs) with quantized layers in place of its nn.Conv, nn.Dense.

  Args:
    model: any linen model.
    params: its parameters; kernels and biases of layers with quantized weights
      are not used and may be absent.
    layers: {name: layer}, for every nn.Conv and nn.Dense; weights may wait in
      the host's memory, see `offload`.
    *inputs: of the model.
    implementation: see `kernels.door`; None picks for every layer.
    at: (name, layer of `layers`, on the device) -> with one set of weights.
    dtype: of what layers return whose modules name none; None: what the module
      would return.
    run: computes a layer, in place of `run_module`.
    call: of the model, with a visit of its layers.

  Raises:
    ValueError: a layer of the model is not in `layers`, or an entry names
      none; a layer that is not supported, or not by the implementation.
  """
  # Filled while the model is traced, or run: layers are found by being called.
  visited, queue = set(), offload.Queue()
  run = run or functools.partial(
      run_module, implementation=implementation, dtype=dtype)

  def visit(module, x, compute):
    name = interception.layer_name(module)
    visited.add(name)
    if name not in layers:
      raise ValueError(f'no rule covers layer {name!r}: calibrate this model, '
                       'or state that the layer stays in full precision')
    layer, x = queue.fetch(layers[name], x)
    layer = at(name, layer)
    try:
      out = run(layer, module, x, compute)
    except ValueError as error:
      raise ValueError(f'layer {name}: {error}') from error
    if layer.weight is not None:
      queue.ran(out)
    return out

  own = [name for name, layer in layers.items() if layer.weight is not None]
  out = call(model, params, visit, *inputs, names=own)
  if unvisited := sorted(layers.keys() - visited):
    raise ValueError(f'the spec names layers that the model lacks: {unvisited}')
  return out


def run_module(layer: QLayer, module: nn.Module, x: jax.Array,
               compute: Callable[[jax.Array], jax.Array],
               implementation: str | None = None, dtype: Any = None
               ) -> jax.Array:
  """Computes a layer; arguments as of `Run` and `run_layer`."""
  if layer.weight is not None:
    return run_layer(module, x, layer, implementation, dtype)
  # Its weights stay in full precision: the module's own product is right.
  out = compute(layer.input.fake_quant(x))
  if layer.adapter is None:
    return out
  return (out + by_geometry(module, x, functools.partial(
      door.run_adapter, layer.adapter))).astype(out.dtype)


def run_layer(module: nn.Module, x: jax.Array, layer: QLayer,
              implementation: str | None = None, dtype: Any = None
              ) -> jax.Array:
  """Computes an nn.Dense or nn.Conv from its quantized weights.

  Args:
    module: of which it is; its own parameters are not used.
    x: its input, `[..., I]`.
    layer: with one set of weights.
    implementation: see `kernels.door`; None picks.
    dtype: as of `apply`.
  """
  dtype = dtype_of(module, x, dtype)
  # Quantized as it comes: rounded to fewer bits first, levels would differ.
  x = x.astype(jnp.promote_types(x.dtype, dtype))
  return by_geometry(module, x, functools.partial(
      door.run, layer, implementation=implementation)).astype(dtype)


def dtype_of(module: nn.Module, x: jax.Array, dtype: Any = None) -> Any:
  """The type that a layer returns, by Flax's own rule; see `apply`."""
  return module.dtype or dtype or jnp.promote_types(
      x.dtype, module.param_dtype)


def by_geometry(module: nn.Module, x: jax.Array,
                run: Callable[..., jax.Array]) -> jax.Array:
  """run(x), or of a convolution run(x, geometry, conv_general_dilated=)."""
  if isinstance(module, nn.Dense):
    return run(x)
  # `of_module` makes one batch axis of all; they come back at the end.
  batch = x.shape[:x.ndim - _axes_of(module) - 1]
  x, geometry, _ = geometry_lib.of_module(module, x)
  out = run(x, geometry, conv_general_dilated=(
      module.conv_general_dilated or jax.lax.conv_general_dilated))
  return out.reshape(*batch, *out.shape[1:])


def _axes_of(module: nn.Conv) -> int:
  size = module.kernel_size
  return 1 if isinstance(size, int) else len(size)


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
  """A model on quantized layers; call `apply` as the model's.

  Its parameters are what `quantize` returned.

  Raises:
    ValueError: a spec of differences between steps.
  """

  model: nn.Module
  spec: spec_lib.QuantSpec

  def __post_init__(self):
    if self.spec.differences:
      raise ValueError(
          'inputs are quantized as what they differ by from the step of the '
          'sampler before, which a single call does not know: take msfp.pack, '
          'which samples')

  def apply(self, variables: Mapping[str, Any], *inputs: Any) -> Any:
    """model(*inputs), of what `quantize` returned, under 'params' or not.

    Raises:
      ValueError: parameters that were not quantized by this spec.
    """
    qparams = interception.parameters(variables)
    layers = quantize_lib.layers_of(qparams, self.spec)
    for name, layer in layers.items():
      if layer.weight is None and not self.spec.layers[name].weight.is_full:
        raise ValueError(f'the weights of layer {name!r} are not quantized: '
                         'pass what quantize(params, spec) returned')
    return apply(self.model, qparams, layers, *inputs)
