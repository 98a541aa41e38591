"""scheduler_config.json of diffusers: every key used, harmless, or refused.

Its classes step models of the noise, of v or of x_0 on one kind of schedule. Of
those that are ours the class is the checkpoint's sampler; their relatives, such
as Euler's, share model and schedule and need another one of ours to be named.
Models of flow matching have a class of their own (`flow_scheduler`); any other
class is of other models.
"""

from collections.abc import Mapping
import math
import pathlib
from typing import Any

from msfp_jax.convert import flow_scheduler
from msfp_jax.convert import key_check
from msfp_jax.convert import source as source_lib
from msfp_jax.diffusion.origin import Origin

FILE = 'scheduler_config.json'
# Class -> our sampler.
CLASSES = {
    'DDIMScheduler': 'ddim', 'DDIMParallelScheduler': 'ddim',
    'DDPMScheduler': 'ddpm', 'DDPMParallelScheduler': 'ddpm',
    'PNDMScheduler': 'plms', 'DPMSolverMultistepScheduler': 'dpm_solver',
    flow_scheduler.CLASS: 'flow'}
# Other samplers of the same models; their own default betas, where they differ.
_STABLE_DIFFUSION = {'beta_start': 0.00085, 'beta_end': 0.012}
RELATIVES: dict[str, dict[str, float]] = {
    'DEISMultistepScheduler': {}, 'DPMSolverSinglestepScheduler': {},
    'DPMSolverSDEScheduler': _STABLE_DIFFUSION,
    'EulerDiscreteScheduler': {}, 'EulerAncestralDiscreteScheduler': {},
    'HeunDiscreteScheduler': _STABLE_DIFFUSION,
    'KDPM2DiscreteScheduler': _STABLE_DIFFUSION,
    'KDPM2AncestralDiscreteScheduler': _STABLE_DIFFUSION,
    'LMSDiscreteScheduler': {}, 'UniPCMultistepScheduler': {}}

_SHAPES = {'linear': 'linear', 'scaled_linear': 'scaled_linear',
           'squaredcos_cap_v2': 'cosine'}
_PREDICTIONS = {'epsilon': 'eps', 'v_prediction': 'v', 'sample': 'x0'}
_SPACINGS = ('leading', 'trailing', 'linspace')
_LEARNED = ('learned', 'learned_range')
_VARIANCES = {'fixed_small': 'small', 'fixed_small_log': 'small',
              None: 'small', 'fixed_large': 'large'}
# Keys that become options, of the schedule or of a sampler.
USED = frozenset({
    'num_train_timesteps', 'beta_start', 'beta_end', 'beta_schedule',
    'trained_betas', 'prediction_type', 'predict_epsilon', 'clip_sample',
    'clip_sample_range', 'set_alpha_to_one', 'steps_offset',
    'timestep_spacing', 'variance_type', '_class_name'})
# Keys that change nothing: names and versions; what only thresholding, flows,
# other spacings of noise levels or samplers that are not ours read.
HARMLESS = frozenset({
    '_diffusers_version', '_name_or_path', 'tensor_format', 'timestep_values',
    'dynamic_thresholding_ratio', 'sample_max_value', 'flow_shift',
    'time_shift_type', 'lower_order_final', 'euler_at_final',
    'interpolation_type', 'sigma_min', 'sigma_max', 'noise_sampler_seed',
    'predict_x0', 'disable_corrector', 'solver_p', 'shift_terminal'})
# Keys with the values that our steps compute: for every sampler, and for one.
ONLY: dict[str, tuple[Any, ...]] = {
    'rescale_betas_zero_snr': (False, None), 'timestep_type': ('discrete',),
    'use_flow_sigmas': (False,), 'use_dynamic_shifting': (False,)}
ONLY_OF: dict[str, dict[str, tuple[Any, ...]]] = {
    'ddim': {'thresholding': (False,)},
    'ddpm': {'thresholding': (False,), 'variance_type': tuple(_VARIANCES)},
    'plms': {'skip_prk_steps': (True,), 'prediction_type': ('epsilon',)},
    'dpm_solver': {
        'thresholding': (False,), 'algorithm_type': ('dpmsolver++', 'deis'),
        'solver_order': (2,), 'solver_type': ('midpoint', 'logrho', 'bh1',
                                              'bh2'),
        'use_karras_sigmas': (False,), 'use_exponential_sigmas': (False,),
        'use_beta_sigmas': (False,), 'use_lu_lambdas': (False,),
        'final_sigmas_type': ('zero',), 'lambda_min_clipped': (-math.inf,)}}
KEYS = USED | HARMLESS | ONLY.keys() | {
    key for only in ONLY_OF.values() for key in only}


def find(weights: pathlib.Path) -> pathlib.Path | None:
  """The scheduler's file of the weights' folder, or of its pipeline."""
  # PIPE/unet/WEIGHTS beside PIPE/scheduler; PIPE/WEIGHTS above it; or all flat.
  folder = weights.parent
  return next((path for path in (
      folder / FILE, folder / 'scheduler' / FILE,
      folder.parent / 'scheduler' / FILE) if path.is_file()), None)


def read(path: pathlib.Path) -> Origin:
  """Reads a scheduler_config.json.

  Raises:
    ValueError: a class of other models; a key that is unknown, or a value that
      no sampler of ours can do.
  """
  try:
    return _origin(source_lib.read_config(path), str(path))
  except (TypeError, ValueError) as error:
    # A TypeError: a list or an object where a name stands, without a hash.
    raise ValueError(f'{path}: {error}' if str(path) not in str(error)
                     else str(error)) from error


def _origin(given: Mapping[str, Any], source: str) -> Origin:
  kind = given.get('_class_name')
  if kind == flow_scheduler.CLASS:
    return flow_scheduler.read(given, source)
  if kind not in CLASSES and kind not in RELATIVES:
    raise ValueError(
        f'_class_name={kind!r}: models for it are none that are known here, '
        f'only those of {sorted([*CLASSES, *RELATIVES])}')
  if unknown := sorted(given.keys() - KEYS):
    raise ValueError(f'keys that nobody here knows: '
                     f'{ {key: given[key] for key in unknown} }')
  odd = key_check.odd(given, ONLY, given)
  if given.get('variance_type') in _LEARNED:
    odd.append(f"variance_type={given['variance_type']!r} (the model predicts "
               'a variance too)')
  if odd:
    raise ValueError('only the noise is predicted and stepped here: '
                     + '; '.join(odd))
  predicts = _prediction(given)
  # As diffusers does for one class from the file of another: keys that both
  # have go over, for others the class's own default stands.
  options, refused = {}, {}
  if kind == 'PNDMScheduler':  # other classes know no steps to skip
    given = {'skip_prk_steps': False} | dict(given)
  for sampler, only in ONLY_OF.items():
    odd = key_check.odd(given, only, given)
    if sampler == 'plms' and given.get('predict_epsilon') is False:
      odd.append('predict_epsilon=False')
    if odd:
      refused[sampler] = (f'the sampler {sampler!r} does not support '
                          + '; '.join(odd))
    else:
      options[sampler] = _options(given, sampler)
  own = CLASSES.get(kind, '')
  if not own or own in refused:
    why = refused.get(own, f'its {kind} is no sampler here')
    refused[own] = (f'{why}: name another, config.sampler.name of '
                    f'{sorted(options)}')
  return Origin(source, _schedule(given, RELATIVES.get(kind, {})), own, options,
                refused, predicts)


def _prediction(given):
  """What the model predicts; old files say whether it is the noise."""
  old = _take(given, 'predict_epsilon', None, bool)
  kind = given.get('prediction_type', 'sample' if old is False else 'epsilon')
  if kind not in _PREDICTIONS:
    raise ValueError(f'prediction_type={kind!r}: must be one of '
                     f'{sorted(_PREDICTIONS)}')
  if old is not None and old != (kind == 'epsilon'):
    raise ValueError(f'predict_epsilon={old} and prediction_type={kind!r} '
                     'contradict each other')
  return _PREDICTIONS[kind]


def _schedule(given, defaults):
  """Options of `make_schedule`, or all betas."""
  betas = given.get('trained_betas')
  if betas is not None:
    if not isinstance(betas, list) or not all(map(_is_number, betas)):
      raise ValueError('trained_betas must be a list of numbers')
    return {'betas': [float(beta) for beta in betas]}
  shape = given.get('beta_schedule', 'linear')
  if shape not in _SHAPES:
    raise ValueError(f'beta_schedule={shape!r}: must be one of '
                     f'{sorted(_SHAPES)}')
  found = {'name': _SHAPES[shape], 'num_train_steps': _take(
      given, 'num_train_timesteps', 1000, int)}
  if found['name'] == 'cosine':  # which has no betas to choose
    return found
  defaults = {'beta_start': 1e-4, 'beta_end': 0.02} | defaults
  return found | {key: _take(given, key, value, float)
                  for key, value in defaults.items()}


def _options(given, sampler):
  """Options of a sampler of ours, with its class's defaults."""
  spacing = given.get('timestep_spacing', 'linspace' if sampler == 'dpm_solver'
                      else 'leading')
  if spacing not in _SPACINGS:
    raise ValueError(f'timestep_spacing={spacing!r}: must be one of '
                     f'{list(_SPACINGS)}')
  found = {'spacing': spacing, 'offset': _take(given, 'steps_offset', 0, int)}
  if sampler in ('ddim', 'plms'):
    one = _take(given, 'set_alpha_to_one', sampler == 'ddim', bool)
    found['convention'] = 'ddim' if one else 'compvis'
  if sampler in ('ddim', 'ddpm'):
    limit = _take(given, 'clip_sample_range', 1.0, float)
    found['clip'] = (limit if _take(given, 'clip_sample', True, bool) else 0.0)
  if sampler == 'ddpm':
    found['variance'] = _VARIANCES[given.get('variance_type', 'fixed_small')]
  return found


def _take(given, key, default, kind):
  """A value of a type, or the default. Raises ValueError for another type."""
  value = given.get(key, default)
  if value is default:
    return value
  right = (isinstance(value, bool) if kind is bool else _is_number(value)
           and (kind is float or isinstance(value, int)))
  if not right:
    raise ValueError(f'{key}={value!r}: must be of type {kind.__name__}')
  return kind(value)


def _is_number(value):
  return isinstance(value, int | float) and not isinstance(value, bool)
