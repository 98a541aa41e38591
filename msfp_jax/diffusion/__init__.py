"""Noise schedules and samplers: pure functions, no model of their own."""

import inspect
from typing import Any

from msfp_jax.base import arguments
from msfp_jax.diffusion.ddim import ddim_plan
from msfp_jax.diffusion.ddim import ddim_timesteps
from msfp_jax.diffusion.ddpm import ddpm_plan
from msfp_jax.diffusion.dpm_solver import dpm_solver_plan
from msfp_jax.diffusion.plms import plms_plan
from msfp_jax.diffusion.sampling import sample
from msfp_jax.diffusion.sampling import SamplerPlan
from msfp_jax.diffusion.sampling import trajectory
from msfp_jax.diffusion.schedules import add_noise
from msfp_jax.diffusion.schedules import make_schedule
from msfp_jax.diffusion.schedules import NoiseSchedule

__all__ = [
    'NoiseSchedule', 'SamplerPlan', 'add_noise', 'check_plan', 'ddim_plan',
    'ddim_timesteps', 'ddpm_plan', 'dpm_solver_plan', 'make_plan',
    'make_schedule', 'plms_plan', 'sample', 'sampler_defaults', 'trajectory',
]

_PLANS = {'ddim': ddim_plan, 'ddpm': ddpm_plan, 'dpm_solver': dpm_solver_plan,
          'plms': plms_plan}
# Values of options that change nothing where a sampler does not have them.
_NEUTRAL = {'eta': 0.0, 'spacing': 'uniform', 'convention': 'ddim',
            'offset': 0, 'clip': 0.0, 'variance': 'small'}


def check_plan(plan: SamplerPlan) -> None:
  """Raises TypeError unless it is what `make_plan` returns."""
  arguments.check_type('plan', plan, SamplerPlan,
                       "msfp.make_plan(schedule, 'ddim', num_steps=20)")


def sampler_defaults(name: str) -> dict[str, Any]:
  """{option: what it is where it is not given} of a sampler of `make_plan`."""
  return {option: parameter.default for option, parameter
          in inspect.signature(_PLANS[name]).parameters.items()
          if parameter.default is not inspect.Parameter.empty}


def make_plan(schedule: NoiseSchedule, name: str, **options) -> SamplerPlan:
  """The plan of a sampler: 'ddim', 'ddpm', 'dpm_solver' or 'plms'.

  Options are those of its own function. One that it does not have may be given
  at the value that changes nothing, as the fields of a config are.

  Raises:
    ValueError: an unknown sampler, or an option that it does not have.
  """
  if name not in _PLANS:
    raise ValueError(f'sampler {name!r}: must be one of {sorted(_PLANS)}')
  # A config has one set of fields for all samplers, so those that this one
  # lacks are dropped, but only where that cannot change what was asked for.
  known = inspect.signature(_PLANS[name]).parameters
  for option, value in options.items():
    if option not in known and value != _NEUTRAL.get(option):
      raise ValueError(f'sampler {name!r} has no option {option}={value!r}')
  return _PLANS[name](
      schedule, **{o: v for o, v in options.items() if o in known})
