"""What a packed model's file says in its header (see `export`), as JSON."""

import json
from typing import Any

import flax.linen as nn
import numpy as np

from msfp_jax import diffusion
from msfp_jax import kernels
from msfp_jax.diffusion import sampling
from msfp_jax.models.guided import Guided
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig
from msfp_jax.quant import quantizers
from msfp_jax.quant.numbers import FPFormat

_MULTISTEP = ('x_part', 'eps_part', 'weights')
_PLAN = ('timesteps', 'x_coef', 'eps_factor', 'noise_std')
# What a layer may have for every output channel, by its letter.
PER_CHANNEL = {'s': 'scale', 'z': 'zero_point', 'b': 'bias'}


def dumps(content: Any) -> str:
  """The shortest JSON."""
  return json.dumps(content, separators=(',', ':'))


def layer_to_row(name: str, layer: kernels.PackedLayer) -> list[Any]:
  """[name, format, I, letters, *row of its input]."""
  letters = [letter for letter, field in PER_CHANNEL.items()
             if getattr(layer, field) is not None]
  row = [name, str(layer.fmt), layer.in_features, ''.join(letters)]
  if layer.act_fmt is not None:
    row += act_to_row(layer.act_fmt, layer.act_scale, layer.act_zero_point)
  return row


def act_to_row(fmt: FPFormat, scale: Any, zero_point: Any) -> list[Any]:
  """[format, scale, zero point where there is one] of an input."""
  # As text a float32 is shortest, and survives.
  short = lambda value: float(str(np.float32(value)))
  zero = [] if zero_point is None else [short(zero_point)]
  return [str(fmt), short(scale), *zero]


def act_from_row(row: list[Any]) -> quantizers.Quantizer | None:
  """The inverse; None of an empty row.

  Raises:
    ValueError: no such scale or zero point.
  """
  if not row:
    return None
  fmt, *values = row
  scale, *zero = np.float32(values)
  if not (np.isfinite(values).all() and scale > 0 and len(zero) < 2):
    raise ValueError(f'scale and zero point {values} of an input')
  return quantizers.Quantizer(
      FPFormat.parse(fmt), scale, zero[0] if zero else None)


def model_to_dict(model: nn.Module) -> dict[str, Any]:
  """Empty for models that are no UNet of this package."""
  if isinstance(model, Guided):
    return {'unet': model.inner.config.to_dict(), 'scale': model.scale,
            'null_label': model.null_label}
  return {'unet': model.config.to_dict()} if isinstance(model, UNet) else {}


def model_from_dict(row: dict[str, Any]) -> nn.Module:
  """The inverse.

  Raises:
    ValueError: it is empty.
  """
  if not row:
    raise ValueError('the file does not describe its model: pass '
                     'load(path, model=...)')
  unet = UNet(UNetConfig(**row['unet']))
  if 'scale' in row:
    return Guided(unet, row['scale'], row['null_label'])
  return unet


def plan_to_dict(plan: diffusion.SamplerPlan) -> dict[str, Any]:
  """Float64 survives as text."""
  row = {name: np.asarray(getattr(plan, name)).tolist() for name in _PLAN}
  if plan.multistep is not None:
    row['multistep'] = {name: getattr(plan.multistep, name).tolist()
                        for name in _MULTISTEP}
  return row


def plan_from_dict(row: dict[str, Any]) -> diffusion.SamplerPlan:
  """The inverse.

  Raises:
    ValueError: arrays of unequal lengths, or of none.
  """
  array = lambda row, name: np.asarray(row[name], np.float64)
  multistep = row.get('multistep')
  if multistep is not None:
    multistep = sampling.Multistep(
        *(array(multistep, name) for name in _MULTISTEP))
  timesteps, *others = (array(row, name) for name in _PLAN)
  if not len(timesteps) or any(a.shape != timesteps.shape for a in others):
    raise ValueError('a plan of unequal lengths')
  return diffusion.SamplerPlan(np.int64(timesteps), *others, multistep)
