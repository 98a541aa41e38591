"""LoRAs as the adapters of a packed model's layers."""

from collections.abc import Iterable, Mapping
import math
from typing import Any

from flax import traverse_util
import jax

from msfp_jax.convert import lora as lora_lib
from msfp_jax.kernels import offload
from msfp_jax.quant import adapter as adapter_lib
from msfp_jax.quant.adapter import Adapter
from msfp_jax.quant.qlayer import QLayer


def adapters(loras: Iterable[tuple[lora_lib.Lora, Any]],
             layers: Mapping[str, QLayer], params: Any) -> dict[str, Adapter]:
  """{layer: what the LoRAs add to it}, of those that any adds to.

  Args:
    loras: (what `load_lora` returned, its strength); what has strength 0 adds
      nothing.
    layers: of the packed model.
    params: of its layers in full precision.

  Raises:
    ValueError: a LoRA of another model.
    TypeError: other things than LoRAs.
  """
  loras = list(loras)
  kernels = {'.'.join(path[:-1]): leaf for path, leaf
             in traverse_util.flatten_dict(params).items()
             if path[-1] == 'kernel'}
  shapes = {name: _shape(layer.weight) if layer.weight is not None
            else kernels[name].shape for name, layer in layers.items()
            if layer.weight is not None or name in kernels}
  parts: dict[str, list[Any]] = {}
  for lora, strength in lora_lib.check_loras(loras, shapes):
    for name, (down, up, scale) in lora.layers.items():
      parts.setdefault(name, []).append((down, up, strength * scale))
  return {name: adapter_lib.join(found) for name, found in parts.items()}


def _shape(weight):
  """`[*window, I, O]` of weights with an axis of banks, in any layout."""
  # Wherever they are: shapes alone.
  one = jax.eval_shape(lambda weight: offload.fetch(weight).bank(0), weight)
  inputs = math.prod(one.window) * one.length
  return (*one.window, one.length, one.size // inputs)
