"""Running any Flax model on packed layers, by interception."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from msfp_jax import kernels
from msfp_jax.quant import interception as layers_lib
from msfp_jax.quant import quantizers


def apply(model: nn.Module, params: Any,
          packed: Mapping[str, kernels.PackedLayer],
          act_quantizers: Mapping[str, quantizers.Quantizer | None],
          *inputs: Any, implementation: str | None = None) -> Any:
  """model(*inputs) with packed layers in place of their nn.Conv and nn.Dense.

  Args:
    model: any linen model.
    params: its parameters; kernels and biases of packed layers are not used
      and may be absent.
    packed: {layer: one set of weights}, which quantizes its input too.
    act_quantizers: of the layers whose weights are not packed; None leaves the
      input as it is.
    *inputs: of the model.
    implementation: see `kernels.ops`; None picks for every layer.

  Raises:
    ValueError: a layer of the model is in neither, or an entry names none; a
      layer that is not supported, or not by the implementation.
  """
  visited = set()

  def visit(module, x, compute):
    name = layers_lib.layer_name(module)
    visited.add(name)
    if name in packed:
      try:
        return _run(module, x, packed[name], implementation)
      except ValueError as error:
        raise ValueError(f'layer {name}: {error}') from error
    if name not in act_quantizers:
      raise ValueError(f'no rule covers layer {name!r}: calibrate this model, '
                       'or state that the layer stays in full precision')
    quantizer = act_quantizers[name]
    return compute(x if quantizer is None else quantizer.fake_quant(x))

  with layers_lib.intercept(visit):
    out = model.apply({'params': params}, *inputs)
  if unvisited := sorted({*packed, *act_quantizers} - visited):
    raise ValueError(f'the spec names layers that the model lacks: {unvisited}')
  return out


def _run(module: nn.Module, x: jax.Array, layer: kernels.PackedLayer,
         implementation: str | None) -> jax.Array:
  """What an nn.Dense or nn.Conv returns, from its packed weights."""
  dtype = module.dtype or jnp.promote_types(x.dtype, module.param_dtype)
  # Quantized as it comes: rounded to fewer bits first, levels would differ.
  x = x.astype(jnp.promote_types(x.dtype, dtype))
  if isinstance(module, nn.Dense):
    out = kernels.matmul(x, layer, implementation=implementation)
    return out.astype(dtype)
  if module.mask is not None:
    raise ValueError('a masked convolution cannot be packed')
  axes = 1 if isinstance(module.kernel_size, int) else len(module.kernel_size)
  each = lambda n: (n,) * axes if n is None or isinstance(n, int) else tuple(n)
  if any(n not in (None, 1) for n in each(module.input_dilation)):
    raise ValueError(f'input_dilation {module.input_dilation}: a transposed '
                     'convolution cannot be packed')
  dilation = tuple(n or 1 for n in each(module.kernel_dilation))
  batch = x.shape[:-axes - 1]
  x = x.reshape(-1, *x.shape[len(batch):])
  x, padding = _pad(x, module, each(module.kernel_size), dilation)
  out = kernels.conv(
      x, layer, strides=tuple(n or 1 for n in each(module.strides)),
      padding=padding, dilation=dilation, groups=module.feature_group_count,
      implementation=implementation,
      conv_general_dilated=(
          module.conv_general_dilated or jax.lax.conv_general_dilated))
  return out.reshape(*batch, *out.shape[1:]).astype(dtype)


def _pad(x: jax.Array, module: nn.Conv, window: tuple[int, ...],
         dilation: tuple[int, ...]) -> tuple[jax.Array, Any]:
  """x and the zeros around it; other kinds of padding are done here."""
  padding = module.padding
  reach = [d * (size - 1) for size, d in zip(window, dilation, strict=True)]
  if padding in ('CIRCULAR', 'REFLECT'):
    widths = [(0, 0), *[(r // 2, r - r // 2) for r in reach], (0, 0)]
    mode = 'wrap' if padding == 'CIRCULAR' else 'reflect'
    return jnp.pad(x, widths, mode=mode), 'VALID'
  if padding == 'CAUSAL':
    return x, ((reach[0], 0),)
  if isinstance(padding, int):
    return x, ((padding, padding),) * len(reach)
  if isinstance(padding, str):
    return x, padding
  return x, tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)
