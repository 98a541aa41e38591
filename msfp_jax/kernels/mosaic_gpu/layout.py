"""The layout in which Hopper's kernels read weights, as a QTensor has it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.kernels import carriers
from msfp_jax.kernels.mosaic_gpu import decode
from msfp_jax.quant import functional
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qtensor import QTensor


@dataclasses.dataclass(frozen=True)
class Hopper(layout_lib.Layout):
  """Nibbles in the order of `decode.prepare`, `[N', *window, K' / 2]`.

  Attributes:
    outputs: N, output channels without padding.
  """

  outputs: int = 0

  def levels(self, data: jax.Array, fmt: FPFormat, length: int) -> jax.Array:
    # fp8 holds all formats of 4 bits.
    levels = decode.decode_array(data, fmt, 'fp8')
    levels = jnp.moveaxis(levels, 0, -1)[..., :length, :self.outputs]
    return levels.astype(jnp.float32) * np.float32(
        carriers.carry(fmt, 'fp8').unit)

  def codes(self, data: jax.Array, fmt: FPFormat, length: int) -> jax.Array:
    return functional.encode(self.levels(data, fmt, length), fmt,
                             np.float32(1))

  def window(self, data):
    return tuple(data.shape[1:-1])

  def size(self, data, length):
    padded = -(-self.outputs // decode.CHANNELS) * decode.CHANNELS
    places = data.size // data.shape[-1] // padded  # banks x window
    return places * length * self.outputs


def lay_out(weight: QTensor) -> QTensor:
  """Weights of one set in this layout; those that are in it stay.

  Args:
    weight: in `layout.NIBBLES`, of a format of 4 bits.
  """
  if isinstance(weight.layout, Hopper):
    return weight
  data = decode.prepare(weight.data, weight.length, weight.fmt.signed)
  return dataclasses.replace(
      weight, data=data, layout=Hopper(weight.data.shape[-1]))
