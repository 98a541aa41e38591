"""Noise schedules and samplers: pure functions, no model of their own."""

import inspect
from typing import Any

from msfp_jax.base import arguments
from msfp_jax.diffusion.ddim import ddim_plan
from msfp_jax.diffusion.ddim import ddim_timesteps
from msfp_jax.diffusion.ddpm import ddpm_plan
from msfp_jax.diffusion.dpm_solver import dpm_solver_plan
from msfp_jax.diffusion.flow import flow_plan
from msfp_jax.diffusion.plan import SamplerPlan
from msfp_jax.diffusion.plms import plms_plan
from msfp_jax.diffusion.sampling import sample
from msfp_jax.diffusion.sampling import trajectory
from msfp_jax.diffusion.schedules import add_noise
from msfp_jax.diffusion.schedules import FlowSchedule
from msfp_jax.diffusion.schedules import make_schedule
from msfp_jax.diffusion.schedules import NoiseSchedule
from msfp_jax.diffusion.schedules import Schedule

__all__ = [
    'FlowSchedule', 'NoiseSchedule', 'SamplerPlan', 'Schedule', 'add_noise',
    'check_plan', 'ddim_plan', 'ddim_timesteps', 'ddpm_plan', 'dpm_solver_plan',
    'flow_plan', 'make_plan', 'make_schedule', 'plms_plan', 'sample',
    'sampler_defaults', 'trajectory',
]

_PLANS = {'ddim': ddim_plan, 'ddpm': ddpm_plan, 'dpm_solver': dpm_solver_plan,
          'flow': flow_plan, 'plms': plms_plan}
# The samplers of models of flow matching; all others are of noise schedules.
_FLOWS = ('flow',)
# Values of options that change nothing where a sampler does not have them.
_NEUTRAL = {'eta': 0.0, 'spacing': 'uniform', 'convention': 'ddim',
            'offset': 0, 'clip': 0.0, 'variance': 'small', 'shift': 1.0,
            'shift_by_tokens': (), 'image_tokens': 0,
            'shift_type': 'exponential', 'shift_terminal': 0.0}
# Other options are words, or checked by those that take them.
_RULES = {'num_steps': arguments.WHOLE,
          'offset': arguments.or_none(arguments.WHOLE),
          'image_tokens': arguments.WHOLE} | dict.fromkeys(
              ('eta', 'clip', 'shift', 'shift_terminal'), arguments.NUMBER)


def check_plan(plan: SamplerPlan) -> None:
  """Raises TypeError unless it is what `make_plan` returns."""
  arguments.check_type('plan', plan, SamplerPlan,
                       "msfp.make_plan(schedule, 'ddim', num_steps=20)")


def sampler_defaults(name: str) -> dict[str, Any]:
  """{option: what it is where it is not given} of a sampler of `make_plan`."""
  return {option: parameter.default for option, parameter
          in inspect.signature(_PLANS[name]).parameters.items()
          if parameter.default is not inspect.Parameter.empty
          and option != 'schedule'}


def make_plan(schedule: Schedule, name: str, **options) -> SamplerPlan:
  """The plan of a sampler: 'ddim', 'ddpm', 'dpm_solver', 'flow' or 'plms'.

  Options are those of its own function. One that it does not have may be given
  at the value that changes nothing, as the fields of a config are.

  Raises:
    ValueError: an unknown sampler, one of another kind of schedule, or an
      option that it does not have, or not of this type.
    TypeError: no schedule.
  """
  arguments.check_type('schedule', schedule, Schedule,
                       "msfp.make_schedule('linear', ...)")
  if not isinstance(name, str) or name not in _PLANS:
    raise ValueError(f'sampler {name!r}: must be one of {sorted(_PLANS)}')
  rules = dict(_RULES)
  if sampler_defaults(name).get('num_steps', 0) is None:  # all there are
    rules['num_steps'] = arguments.or_none(arguments.WHOLE)
  arguments.check_options(options, rules)
  if isinstance(schedule, FlowSchedule) != (name in _FLOWS):
    fits = _FLOWS if name not in _FLOWS else sorted({*_PLANS} - {*_FLOWS})
    kind = ('flow matching' if name not in _FLOWS
            else 'a noise schedule, such as DDPM\'s')
    raise ValueError(f'sampler {name!r}: the model is one of {kind}, which is '
                     f'sampled from by {fits[0]!r}' + (
                         f' or others of {fits}' if fits[1:] else '')
                     + ' (config.sampler.name)')
  # A config has one set of fields for all samplers, so those that this one
  # lacks are dropped, but only where that cannot change what was asked for.
  known = inspect.signature(_PLANS[name]).parameters
  for option, value in options.items():
    if option not in known and value != _NEUTRAL.get(option):
      raise ValueError(f'sampler {name!r} has no option {option}={value!r}')
  return _PLANS[name](
      schedule=schedule, **{o: v for o, v in options.items() if o in known})
