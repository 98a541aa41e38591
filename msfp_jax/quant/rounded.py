"""Rounded: weights whose levels calibration chose, and KeptScales.

Levels that are not the nearest do not follow from weights and quantizer. So a
spec holds them, and a digest of the weights that they stand for.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.quant.qtensor import QTensor
from msfp_jax.quant.quantizers import Quantizer


@dataclasses.dataclass(frozen=True)
class Rounded:
  """Weights as calibration rounded them.

  Attributes:
    weight: a bank of one, `[1, *window, I, O]`, packed.
    digest: of the parameter `kernel` that it was made of, see `digest_of`.
  """

  weight: QTensor
  digest: str

  @classmethod
  def of(cls, weight: QTensor, kernel: np.ndarray) -> 'Rounded':
    """Of weights, and the parameter that they were made of."""
    return cls(weight.packed(), digest_of(kernel))

  def dequantize(self) -> jax.Array:
    """The weights themselves, float32 `[*window, I, O]`."""
    return self.weight.dequantize()[0]

  def quantizer(self, of: Quantizer) -> Quantizer:
    """One that leaves these weights as they are, to be trained with.

    Args:
      of: the layer's, which their scales are of. It stays where it has ranges
        to train: its scales are then its own. A quantizer whose scales follow
        the data would find others for these weights, whose largest may have
        been rounded down.
    """
    return of if of.offsets() else KeptScales(
        self.weight.bank(0).replace(data=None))


def digest_of(kernel: Any) -> str:
  """SHA-256 of a kernel's shape and float32 values, in hex."""
  array = np.ascontiguousarray(kernel, '<f4')
  made = hashlib.sha256(str(array.shape).encode())
  made.update(array.data)
  return made.hexdigest()


def check_digests(rounded: Mapping[str, Rounded | None],
                  kernels: Mapping[str, Any]) -> None:
  """Raises ValueError if weights were rounded from others than `kernels`.

  Kernels that are being traced, or quantized already, are not looked at.
  """
  for name, part in rounded.items():
    kernel = kernels[name]
    if part is None or isinstance(kernel, jax.core.Tracer | QTensor):
      continue
    if digest_of(kernel) != part.digest:
      raise ValueError(
          f'the spec holds the weights of layer {name} as rounded from other '
          'parameters than these: calibrate these')


@flax.struct.dataclass
class KeptScales(Quantizer):
  """Scales, zero points and shifts of weights that were quantized before.

  Attributes:
    like: those weights, `[*window, I, O]`, with None for data.
  """

  like: QTensor

  @property
  def bits(self) -> int:
    return self.like.fmt.bits

  def quantize(self, x, axis=-1):
    if axis != self.like.axis:
      raise ValueError(f'axis={axis}: these scales are along {self.like.axis}')
    return self.like.with_levels_of(jnp.asarray(x, jnp.float32))

  def describe(self):
    return {'format': str(self.like.fmt), 'scale': 'kept'}
