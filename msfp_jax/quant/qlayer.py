"""QLayer: an nn.Conv or nn.Dense as quantized products take it."""

from typing import Any

import flax.struct
import jax

from msfp_jax.quant.adapter import Adapter
from msfp_jax.quant.around import Around
from msfp_jax.quant.qtensor import QTensor
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Quantizer


@flax.struct.dataclass
class Latent:
  """Weights that are quantized whenever they are used: those in training.

  Attributes:
    kernel: float32 `[*window, I, O]`; gradients reach it.
    quantizer: its quantizer, and they reach this one's ranges.
  """

  kernel: jax.Array
  quantizer: Quantizer


@flax.struct.dataclass
class Prepared:
  """Facts about packed weights that are computed once; see `kernels.prepare`.

  Attributes:
    tap_sums: sums over I of the weights as carried in float32, `[*window, O]`,
      or with an axis of banks before; None where no zero point needs them.
    parts: into how many the channels are cut so that `winograd.FLOAT` sums
      exactly; 0 for no such convolution.
    fits_bytes: whether `winograd.BYTES` holds what it transforms.
  """

  tap_sums: jax.Array | None = None
  parts: int = flax.struct.field(pytree_node=False, default=0)
  fits_bytes: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class QLayer:
  """A layer's weights, and how its input is quantized.

  With h sets of weights (TALoRA's banks), those of `weight` and `prepared`
  have a first axis of h, and `at` takes one.

  Attributes:
    weight: `[*window, I, O]`; None: the module's own, in full precision.
    input: the quantizer of the input `[..., I]`.
    bias: float32 `[O]`, or None.
    around: what stands around the product.
    prepared: None for weights that are not packed.
    adapter: what LoRAs of a user add, or None; no part of the layer's file.
  """

  weight: QTensor | Latent | None
  input: Quantizer = Full()
  bias: jax.Array | None = None
  around: Around = Around()
  prepared: Prepared | None = None
  adapter: Adapter | None = None

  @property
  def num_banks(self) -> int:
    """h; 1 without weights of its own."""
    return 1 if self.weight is None else self.weight.data.shape[0]

  @property
  def nbits(self) -> int:
    """Bits of weights, bias, what stands around, and the input's parameters.

    Of all banks; an adapter, which is the user's own, is not counted.
    """
    total = self.around.nbits + self.input.nbits
    total += 0 if self.bias is None else 32 * self.bias.size
    return total + (0 if self.weight is None else self.weight.nbits)

  def at(self, step: Any, bank: Any = 0) -> 'QLayer':
    """The layer at a step of the sampler, with one of its sets of weights.

    Args:
      step: position in the plan; may be traced.
      bank: which set; may be traced.
    """
    # Sampling asks for this at every step: a choice by index, inside the
    # compiled loop, in place of one program a bank.
    prepared = self.prepared
    if prepared is not None and prepared.tap_sums is not None:
      prepared = prepared.replace(tap_sums=prepared.tap_sums[bank])
    weight = self.weight
    # A Latent has one set: in training banks are mixed before it is made.
    if isinstance(weight, QTensor):
      weight = weight.bank(bank)
    return self.replace(
        weight=weight, input=self.input.at(step), prepared=prepared)
