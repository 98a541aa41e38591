"""A quantized layer as kernels take it: codes, scales, zero points, bias."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.kernels import carriers
from msfp_jax.kernels.mosaic_gpu import decode as mosaic_gpu_decode
from msfp_jax.quant import quantizers
from msfp_jax.quant.numbers import FPFormat

# How the weights of a layer are stored.
NIBBLES = 'nibbles'  # two codes a byte, see `carriers.pack_halves`
BYTES = 'bytes'  # formats of more than 4 bits: a code a byte
VALUES = 'values'  # float32, not packed: the simulation
HOPPER = 'hopper'  # nibbles in the order of `mosaic_gpu.prepare`
# Weights that are encoded at once.
_AT_ONCE = 2**18


@flax.struct.dataclass
class PackedLayer:
  """The weights of an nn.Conv or nn.Dense, and how its input is quantized.

  With h sets of weights (TALoRA's banks), `weights` and `tap_sums` have a
  first axis of h, and `bank` takes one.

  Attributes:
    weights: `[*window, ceil(I / 2), O]` uint8 nibbles, `[*window, I, O]` uint8
      bytes, or the same in float32 values (of any precision: they are taken
      to the nearest levels).
    scale: of the weights, float32 `[O]`.
    zero_point: of the weights, float32 `[O]`; None without.
    act_scale: of the input, float32 scalar; None: the input stays as it is.
    act_zero_point: float32 scalar; None without.
    bias: float32 `[O]` or None.
    fmt: of the weights.
    act_fmt: of the input, or None.
    tap_sums: sum of the weights' v over I, float32 `[*window, O]`, where the
      input has a zero point and `ops.prepare` was there; else None.
    in_features: I.
    packing: NIBBLES, BYTES, VALUES or HOPPER.
    banked: whether there is the axis of h.
    parts: of the channels that `winograd.conv` sums exactly; 0 for no such
      convolution.
  """

  weights: jax.Array
  scale: jax.Array
  zero_point: jax.Array | None
  act_scale: jax.Array | None
  act_zero_point: jax.Array | None
  bias: jax.Array | None
  tap_sums: jax.Array | None
  fmt: FPFormat = flax.struct.field(pytree_node=False)
  act_fmt: FPFormat | None = flax.struct.field(pytree_node=False)
  in_features: int = flax.struct.field(pytree_node=False)
  packing: str = flax.struct.field(pytree_node=False, default=NIBBLES)
  banked: bool = flax.struct.field(pytree_node=False, default=False)
  parts: int = flax.struct.field(pytree_node=False, default=0)

  @property
  def needs_sums(self) -> bool:
    """Whether the sums of the weights enter the result (see `reference`)."""
    return self.act_fmt is not None and (
        self.act_zero_point is not None
        or carriers.carry(self.act_fmt, 'f32').offset != 0)

  def bank(self, index: Any) -> 'PackedLayer':
    """The layer with one of its sets of weights; `index` may be traced."""
    sums = None if self.tap_sums is None else self.tap_sums[index]
    return self.replace(
        weights=self.weights[index], tap_sums=sums, banked=False)

  def codes(self) -> jax.Array:
    """uint8 codes `[..., *window, I, O]`."""
    if self.packing == NIBBLES:
      return carriers.unpack_halves(self.weights, self.in_features)
    if self.packing == BYTES:
      return self.weights
    return quantizers.encode(
        self.weights, self.fmt, self.scale, self.zero_point)

  def values(self, carrier: str) -> jax.Array:
    """The weights' v (see `carriers.Carried`), in the carrier."""
    carried = carriers.carry(self.fmt, carrier)
    if self.packing == VALUES:
      return carried.quantize(self.weights, self.scale, self.zero_point)
    if self.packing == HOPPER:
      levels = self._hopper_levels().astype(jnp.float32)
      return (levels * (carriers.step(self.fmt) / carried.unit)).astype(
          carried.dtype)
    return carried.decode(self.codes())

  def dequantized(self) -> jax.Array:
    """The quantized weights themselves, float32."""
    if self.packing == VALUES:
      return quantizers.fake_quant(
          self.weights, self.fmt, self.scale, self.zero_point)
    if self.packing == HOPPER:
      return self.values('f32') * (
          carriers.carry(self.fmt, 'f32').unit * self.scale)
    return quantizers.decode(
        self.codes(), self.fmt, self.scale, self.zero_point)

  def _hopper_levels(self) -> jax.Array:
    """Integers `[*window, I, O]`."""
    levels = mosaic_gpu_decode.decode_array(self.weights, self.fmt, 'int8')
    levels = jnp.moveaxis(levels, 0, -1)
    return levels[..., :self.in_features, :self.scale.shape[-1]]


def make_layer(weights: Any, weight: quantizers.Quantizer,
               act: quantizers.Quantizer | None,
               bias: Any | None = None, banked: bool = False) -> PackedLayer:
  """A layer that is not packed: the simulation.

  Args:
    weights: float `[*window, I, O]`, or with an axis of banks before.
    weight: their quantizer, a scale for every output channel or one for all.
    act: the input's, with a scalar scale; None for full precision.
    bias: `[O]` or None.
    banked: whether the weights have that axis.

  Raises:
    ValueError: the scales are not of these shapes.
  """
  outputs = weights.shape[-1]
  per_channel = lambda array: None if array is None else jnp.broadcast_to(
      _last_axis(array, outputs), (outputs,))
  scalar = lambda array: None if array is None else jnp.reshape(array, ())
  if act is not None:
    for name, value in [('scale', act.scale), ('zero point', act.zero_point)]:
      if value is not None and jnp.size(value) != 1:
        raise ValueError(f'a {name} of shape {jnp.shape(value)} for the input: '
                         'kernels take one for the whole tensor')
  if bias is not None:
    bias = jnp.asarray(bias, jnp.float32)
  return PackedLayer(
      jnp.asarray(weights, jnp.float32), per_channel(weight.scale),
      per_channel(weight.zero_point),
      None if act is None else scalar(act.scale),
      None if act is None else scalar(act.zero_point), bias, None, weight.fmt,
      None if act is None else act.fmt, weights.shape[-2],
      VALUES, banked)


def pack(layer: PackedLayer) -> PackedLayer:
  """The layer with codes in place of values, in NumPy; packed stays packed.

  Raises:
    ValueError: a weight is NaN.
  """
  if layer.packing != VALUES:
    return layer
  layer = jax.tree.map(np.asarray, layer)
  if nans := np.isnan(layer.weights).sum():
    raise ValueError(f'{nans} of {layer.weights.size} weights are NaN')
  codes = _encode(layer.weights, layer.fmt, layer.scale, layer.zero_point)
  packing = NIBBLES if layer.fmt.bits <= 4 else BYTES
  if packing == NIBBLES:
    codes = carriers.pack_halves(codes)
  return layer.replace(weights=codes, packing=packing)


def _encode(weights: np.ndarray, fmt: FPFormat, scale: np.ndarray,
            zero_point: np.ndarray | None) -> np.ndarray:
  """`quantizers.encode` by pieces of one size: one compilation for a format."""
  pieces = -(-weights.size // _AT_ONCE)
  flat = lambda array: np.resize(
      np.broadcast_to(array, weights.shape), (pieces, _AT_ONCE))
  zero = [0] * pieces if zero_point is None else flat(zero_point)
  codes = [quantizers.encode(x, fmt, s, z) for x, s, z in zip(
      flat(weights), flat(scale), zero, strict=True)]
  return np.concatenate(codes)[:weights.size].reshape(weights.shape)


def _last_axis(array: Any, outputs: int) -> jax.Array:
  """A scale `[1, ..., O]`, or of size 1, as a vector."""
  shape = jnp.shape(array)
  if shape and (shape[-1] not in (1, outputs)
                or any(size != 1 for size in shape[:-1])):
    raise ValueError(
        f'a scale of shape {shape} for weights of {outputs} output channels: '
        'kernels take one for each output channel, or one for all')
  return jnp.reshape(array, (-1,))
