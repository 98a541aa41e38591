"""Products whose weights are in training: gradients through quantizers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from msfp_jax.kernels import beside
from msfp_jax.kernels.beside import Plain
from msfp_jax.quant.qlayer import QLayer


def run(product: Callable[[QLayer, jax.Array], jax.Array], plain: Plain,
        layer: QLayer, x: jax.Array) -> jax.Array:
  """The layer's product, with straight-through gradients.

  Forward it is `product` on the weights as they are quantized now: what the
  simulation and packed models compute. Backward it is the gradient of

      plain(Q_a(x'), Q_w(W')) + bias + branches of low rank

  with each quantizer's own gradient (`Quantizer.fake_quant`), whatever the
  product sums in and by what scales.

  Args:
    product: (layer with a QTensor, x) -> y.
    plain: product of float32 values.
    layer: its weight is a `Latent`.
    x: input; in its dtype values are multiplied on the way back.
  """

  #           forward                       backward: the gradient of
  #   kernel -> quantize -> levels -+
  #                                 +-> y     plain(fake_quant, fake_quant)
  #   x -> quantize -> levels ------+
  #
  # Left to itself, autodiff would go through levels, whose gradient is 0
  # (rounding) or not there at all (int8).
  def dequantized(layer, x):
    seen = layer.around.input(x)
    w = layer.weight.quantizer.fake_quant(layer.weight.kernel, axis=-2)
    values = layer.input.fake_quant(jnp.asarray(seen, jnp.float32))
    y = plain(values.astype(x.dtype), w.astype(x.dtype)).astype(jnp.float32)
    if layer.bias is not None:
      y = y + layer.bias
    return beside.add(y, layer, x, seen, plain).astype(x.dtype)

  # Full weights have no levels to multiply: one way for both directions.
  if layer.weight.quantizer.is_full:
    return dequantized(layer, x)

  @jax.custom_vjp
  def quantized(layer, x):
    weight = layer.weight.quantizer.quantize(layer.weight.kernel, axis=-2)
    return product(layer.replace(weight=weight), x)

  # Kept for the backward pass are the layer and x alone; what `dequantized`
  # needs between it computes again, which is elementwise and cheap beside the
  # products.
  quantized.defvjp(
      lambda layer, x: (quantized(layer, x), (layer, x)),
      lambda inputs, gradient: jax.vjp(dequantized, *inputs)[1](gradient))
  return quantized(layer, x)
