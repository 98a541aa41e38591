"""Noise schedules and samplers: pure functions, no model of their own."""

from msfp_jax.diffusion.ddim import ddim_plan
from msfp_jax.diffusion.ddim import ddim_timesteps
from msfp_jax.diffusion.ddpm import ddpm_plan
from msfp_jax.diffusion.sampling import sample
from msfp_jax.diffusion.sampling import SamplerPlan
from msfp_jax.diffusion.sampling import trajectory
from msfp_jax.diffusion.schedules import add_noise
from msfp_jax.diffusion.schedules import make_schedule
from msfp_jax.diffusion.schedules import NoiseSchedule

__all__ = [
    'NoiseSchedule', 'SamplerPlan', 'add_noise', 'ddim_plan',
    'ddim_timesteps', 'ddpm_plan', 'make_plan', 'make_schedule', 'sample',
    'trajectory',
]

_PLANS = {'ddim': ddim_plan, 'ddpm': ddpm_plan}


def make_plan(schedule: NoiseSchedule, name: str, **options) -> SamplerPlan:
  """The plan of the sampler `name`: 'ddim' or 'ddpm'; options as theirs."""
  if name not in _PLANS:
    raise ValueError(f'sampler {name!r}: must be one of {sorted(_PLANS)}')
  return _PLANS[name](schedule, **options)
