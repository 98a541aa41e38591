"""Tables of a packed model's file that have an entry for every step."""

from collections.abc import Iterable, Mapping

import flax.linen as nn
import numpy as np

from msfp_jax import diffusion
from msfp_jax.packed import model as packed_lib
from msfp_jax.packed import reader as reader_lib
from msfp_jax.quant.qlayer import QLayer

_CHOICES, _DRIFT = 'choices', 'drift'


def tensors_of(model: packed_lib.PackedModel, own: Iterable[str]
               ) -> dict[str, np.ndarray]:
  """{name in the file: tensor}.

  Args:
    model: that is written.
    own: layers with weights of their own, in the file's order.

  Raises:
    ValueError: too many banks.
  """
  tensors = {}
  if model.choices:
    # In the order of the layers, so that the table needs no names.
    choices = np.stack([model.choices[name] for name in own
                        if name in model.choices])
    if choices.max() > 255:
      raise ValueError(f'{choices.max() + 1} banks: a file holds up to 256')
    tensors[_CHOICES] = np.uint8(choices)
  if model.drift is not None:
    tensors[_DRIFT] = np.asarray(model.drift, np.float32)
  return tensors


def read_choices(layers: Mapping[str, QLayer], plan: diffusion.SamplerPlan,
                 reader: reader_lib.Reader) -> dict[str, np.ndarray]:
  """{layer: int32 `[S]`} of the layers with several banks."""
  banked = [name for name, layer in layers.items() if layer.num_banks > 1]
  if not banked:
    return {}
  table = reader.take(_CHOICES, np.uint8, (len(banked), plan.num_steps))
  for name, banks in zip(banked, table, strict=True):
    if banks.max() >= (count := layers[name].num_banks):
      reader.problems.append(f'{_CHOICES}: bank {banks.max()} of layer {name}, '
                             f'which has {count}')
  return dict(zip(banked, np.int32(table), strict=True))


def read_drift(model: nn.Module, plan: diffusion.SamplerPlan,
               reader: reader_lib.Reader) -> np.ndarray | None:
  """The drift `[S, C]`, float32; None where it is not in the file."""
  # Of another model than ours it is not known how many channels it has.
  channels = getattr(model, 'sample_shape', (None,))[-1]
  known = len(reader.problems)
  drift = reader.take(_DRIFT, np.float32, (plan.num_steps, channels))
  # What stands for a missing one is as large as the header says, which may be
  # beyond all memory.
  if len(reader.problems) > known:
    return None
  if not np.isfinite(drift).all():
    reader.problems.append(f'{_DRIFT} holds values that are not finite')
  return drift
