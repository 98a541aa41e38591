"""Where the layers of a packed model run, and by what."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax

from msfp_jax import kernels
from msfp_jax.base import devices
from msfp_jax.kernels import offload
from msfp_jax.quant.qlayer import QLayer


def check_implementation(implementation: str | None) -> None:
  """Raises ValueError unless it is one of `kernels.IMPLEMENTATIONS`, or None.
  """
  known = (None, *kernels.IMPLEMENTATIONS)
  if implementation not in known:
    raise ValueError(
        f'implementation {implementation!r}: must be one of {known}')


def on_devices(model: Any, layout: devices.Layout) -> Any:
  """A `PackedModel` as the devices of a layout can run it."""
  if (layout.is_single or not kernels.are_there()
      or model.implementation is not None or not any(
          layer.weight is not None and layer.weight.is_packed
          for layer in model.layers.values())):
    return model
  # A kernel is a program of one device, which XLA does not split.
  return dataclasses.replace(model, implementation='xla')


def settler(implementation: str | None, on_host: bool
            ) -> Callable[[QLayer], QLayer]:
  """What prepares a packed layer, in NumPy, and moves it to where it runs.

  Args:
    implementation: see `PackedModel.with_implementation`.
    on_host: whether its weights wait in the host's memory; else all of it is
      moved to the device.

  Raises:
    ValueError: no such implementation; a device that does not read the host's
      memory.
  """
  check_implementation(implementation)
  memory = offload.host() if on_host else None

  def settle(layer):
    layer = kernels.prepare(layer, implementation)
    # What is copied later is held in NumPy as well until then.
    return jax.block_until_ready(
        jax.device_put(layer) if memory is None else
        offload.to_host(layer, memory))

  return settle
