"""Models by name: what configs and files call them.

A new family is a file beside this one with a `denoiser.Denoiser`, and its
entry here.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from msfp_jax.models import denoiser
from msfp_jax.models import flux
from msfp_jax.models import guided
from msfp_jax.models import prediction
from msfp_jax.models import unet

REGISTRY: dict[str, type[denoiser.Denoiser]] = {
    'unet': unet.UNet, 'flux': flux.Flux}


# What wraps a model of any family, the innermost first: its own fields stand
# beside that model's name.
_WRAPPERS: dict[type[nn.Module], tuple[str, ...]] = {
    prediction.AsNoise: ('predicts', 'alphas_cumprod'),
    guided.Guided: ('scale', 'null_label'),
    guided.GuidedByText: ('text_scale',)}


def to_dict(model: Any) -> dict[str, Any]:
  """{name: fields}, JSON-able; empty for a model that is not of the registry.

  The fields of a wrapper, such as guidance, stand beside the name of the model
  inside.
  """
  # No subclass: what comes back would not be one.
  if type(model) in _WRAPPERS:
    inner = to_dict(model.inner)
    return inner and inner | {
        field: getattr(model, field) for field in _WRAPPERS[type(model)]}
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
  for wrapper, fields in _WRAPPERS.items():
    if own := {key: rest.pop(key) for key in fields if key in rest}:
      model = wrapper(model, **own)
  if rest:
    raise TypeError(f'no model has the fields {sorted(rest)}')
  return model
