"""The schedule of a checkpoint: of its yaml, its buffers, or as published.

For checkpoints beside which there is no scheduler_config.json.
"""

from collections.abc import Mapping
from typing import Any

from absl import logging
import numpy as np

from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.diffusion.origin import Origin
from msfp_jax.diffusion.schedules import make_schedule
from msfp_jax.models.unet import UNetConfig

_STABLE_DIFFUSION_2 = 1024  # width of its context
_MAY_PREDICT_V = (
    '%s: neither shapes nor a config.json tell whether this Stable Diffusion 2 '
    'predicts the noise (512 pixels) or v (768): took the noise; a '
    'scheduler_config.json or its yaml would tell')
_PARAMETERIZATIONS = {'eps': 'eps', 'v': 'v', 'x0': 'x0'}
# CompVis' names (make_beta_schedule of ldm), whose "linear" is of the roots.
_COMPVIS = {'linear': 'scaled_linear', 'sqrt_linear': 'linear',
            'cosine': 'cosine'}
# ermongroup's (get_beta_schedule).
_DDIM = {'linear': 'linear', 'quad': 'scaled_linear'}
# Options of our samplers as the two code bases step.
_OPTIONS = {
    'ldm': {'ddim': {'spacing': 'uniform', 'convention': 'compvis'},
            'plms': {'spacing': 'uniform', 'convention': 'compvis'}},
    'ddim': {'ddim': {'spacing': 'uniform', 'convention': 'ddim'}}}


def _of_betas(name, start, end):
  return {'name': name, 'num_train_steps': 1000, 'beta_start': start,
          'beta_end': end}


_LINEAR = _of_betas('linear', 1e-4, 0.02)
_LATENT = _of_betas('scaled_linear', 0.0015, 0.0195)
_STABLE_DIFFUSION = _of_betas('scaled_linear', 0.00085, 0.012)
# Of published models, by width of the context, channels and multipliers.
_PUBLISHED = {
    (None, 128, (1, 2, 2, 2)): _LINEAR, (None, 128, (1, 2, 2, 2, 4)): _LINEAR,
    (None, 224, (1, 2, 3, 4)): _LATENT, (512, 192, (1, 2, 3, 5)): _LATENT,
    (512, 256, (1, 2, 4)): _LATENT,
    (None, 192, (1, 2, 2, 4, 4)): _of_betas('scaled_linear', 0.0015, 0.0155),
    (768, 320, (1, 2, 4, 4)): _STABLE_DIFFUSION,
    (1024, 320, (1, 2, 4, 4)): _STABLE_DIFFUSION}


def origin(family: str, source: str, given: Mapping[str, Any] | None,
           tensors: Mapping[str, LazyTensor], model: UNetConfig) -> Origin:
  """What is known of a checkpoint without a file of its scheduler.

  Args:
    family: a key of `load.FAMILIES`.
    source: the checkpoint, for messages.
    given: the yaml or config.json that describes the model, or None.
    tensors: all of the checkpoint's, by the names in the file.
    model: what was found of the model.

  Raises:
    ValueError: a yaml with a schedule or a parameterization that is none of
      ours.
  """
  if family == 'ddim':
    return Origin(source, _ermongroup(given), 'ddim', _OPTIONS['ddim'])
  if family not in ('ldm', 'diffusers'):
    return Origin(source)
  if model.context_dim == _STABLE_DIFFUSION_2 and not (
      given and family == 'ldm'):
    logging.warning(_MAY_PREDICT_V, source)
  known = _PUBLISHED.get((model.context_dim, model.ch, model.ch_mult), {})
  if family == 'ldm':
    return _compvis(source, given, tensors, known)
  latent = model.context_dim is not None
  return Origin(source, known, 'ddim', _OPTIONS['ldm' if latent else 'ddim'])


def _compvis(source, given, tensors, known):
  params = ((given or {}).get('model') or {}).get('params') or {}
  kind = params.get('parameterization', 'eps')
  if kind not in _PARAMETERIZATIONS:
    raise ValueError(f'parameterization={kind!r}: must be one of '
                     f'{sorted(_PARAMETERIZATIONS)}')
  schedule = _from_yaml(params) if given else known
  # Lightning keeps the very betas that the model was trained on; they win over
  # a yaml, as they do when CompVis loads them.
  betas = tensors.get('betas')
  if betas is not None and len(betas.shape) == 1:
    schedule = _named(betas.read().astype(np.float64), schedule)
  return Origin(source, schedule, 'ddim', _OPTIONS['ldm'], {}, kind)


def _named(betas, expected):
  """Betas in float32 by the options that make them, where some do."""
  # By name they are exact, and a user can change one of them.
  ends = {'num_train_steps': len(betas), 'beta_start': float(f'{betas[0]:.6g}'),
          'beta_end': float(f'{betas[-1]:.6g}')}
  for schedule in (expected, *({'name': name} | ends
                               for name in ('scaled_linear', 'linear'))):
    made = make_schedule(**schedule).betas if schedule else np.zeros(0)
    if made.shape == betas.shape and np.allclose(made, betas, rtol=1e-5):
      return schedule
  return {'betas': betas.tolist()}


def _from_yaml(params):
  """The schedule of a CompVis yaml, with the defaults of its class."""
  if params.get('given_betas') is not None:
    raise ValueError('given_betas of the configuration are not supported')
  name = _shape(params, 'beta_schedule', _COMPVIS)
  found = {'name': name, 'num_train_steps': _number(
      params, 'timesteps', 1000)}
  if name == 'cosine':
    return found | {'offset': _number(params, 'cosine_s', 8e-3)}
  return found | {'beta_start': _number(params, 'linear_start', 1e-4),
                  'beta_end': _number(params, 'linear_end', 2e-2)}


def _ermongroup(given):
  """The schedule of an original yaml; without one, that of all its models."""
  part = (given or {}).get('diffusion')
  if not part:
    return _LINEAR
  return {'name': _shape(part, 'beta_schedule', _DDIM),
          'num_train_steps': _number(part, 'num_diffusion_timesteps', 1000),
          'beta_start': _number(part, 'beta_start', 1e-4),
          'beta_end': _number(part, 'beta_end', 0.02)}


def _number(fields, key, default):
  """A field as a number of the default's type, also where YAML read text."""
  value = fields.get(key, default)
  # YAML 1.1 reads 1e-4, without a point, as text; what trained the model did
  # not.
  try:
    found = type(default)(value)
  except (TypeError, ValueError):
    found = None
  if found is None or isinstance(value, bool) or (
      not isinstance(value, str) and found != value):
    raise ValueError(f'{key}={value!r}: must be a number such as {default}')
  return found


def _shape(fields, key, names):
  value = fields.get(key, 'linear')
  if value not in names:
    raise ValueError(f'{key}={value!r}: must be one of {sorted(names)}')
  return names[value]
