"""Models by name: what configs and files call them.

A new family is a file beside this one with a `denoiser.Denoiser`, and its
entry here.
"""

from collections.abc import Mapping
from typing import Any

from msfp_jax.models import denoiser
from msfp_jax.models import guided
from msfp_jax.models import unet

REGISTRY: dict[str, type[denoiser.Denoiser]] = {'unet': unet.UNet}


def to_dict(model: Any) -> dict[str, Any]:
  """{name: fields}, JSON-able; empty for a model that is not of the registry.

  Guidance wraps a model of any family: its own fields stand beside that
  model's name.
  """
  # No subclass: what comes back would not be one.
  if type(model) is guided.Guided:
    inner = to_dict(model.inner)
    return inner and inner | {
        'scale': model.scale, 'null_label': model.null_label}
  return {name: model.to_dict() for name, family in REGISTRY.items()
          if type(model) is family}


def from_dict(row: Mapping[str, Any]) -> denoiser.Denoiser:
  """The inverse.

  Raises:
    ValueError: it names no family, or several; or fields contradict each other.
    TypeError: fields that the family does not have.
  """
  names = [name for name in row if name in REGISTRY]
  if len(names) != 1:
    raise ValueError(f'{sorted(row)} must name one family of models, of '
                     f'{sorted(REGISTRY)}')
  model = REGISTRY[names[0]].from_dict(row[names[0]])
  rest = {key: value for key, value in row.items() if key not in names}
  return guided.Guided(model, **rest) if rest else model
