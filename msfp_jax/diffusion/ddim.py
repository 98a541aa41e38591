"""DDIM (Song et al. 2021), as ermongroup/ddim and as CompVis step it."""

import numpy as np

from msfp_jax.diffusion.sampling import SamplerPlan
from msfp_jax.diffusion.schedules import NoiseSchedule

CONVENTIONS = ('ddim', 'compvis')


def ddim_timesteps(num_train_steps: int, num_steps: int,
                   spacing: str = 'uniform', convention: str = 'ddim'
                   ) -> np.ndarray:
  """The visited timesteps, ascending, int64.

  'uniform' is `range(0, T, T // S)`: where S does not divide T that is more
  than S steps, as in the original. 'quad' is
  `int(linspace(0, sqrt(0.8 T), S)^2)`; its first few steps may repeat t = 0.
  The convention 'compvis' visits each plus one.

  Raises:
    ValueError: num_steps outside 1..T, or an unknown spacing or convention.
  """
  if convention not in CONVENTIONS:
    raise ValueError(f'convention {convention!r}: must be one of {CONVENTIONS}')
  if not 1 <= num_steps <= num_train_steps:
    raise ValueError(f'num_steps={num_steps}: must be in 1..{num_train_steps}')
  if spacing == 'uniform':
    # Not linspace: steps of one length from 0 on, as in the original, so that
    # sampling begins below T - 1 (with 100 steps of 1000 at 990).
    steps = np.arange(0, num_train_steps, num_train_steps // num_steps)
  elif spacing == 'quad':
    grid = np.linspace(0, np.sqrt(num_train_steps * 0.8), num_steps)
    steps = (grid**2).astype(np.int64)
  else:
    raise ValueError(f"spacing {spacing!r}: must be 'uniform' or 'quad'")
  if convention == 'compvis':
    steps = steps + 1
    if steps[-1] >= num_train_steps:
      raise ValueError(f'num_steps={num_steps}: the convention {convention!r} '
                       f'then visits t = {steps[-1]}, beyond the schedule')
  return steps


def previous_alphas_cumprod(schedule: NoiseSchedule, timesteps: np.ndarray,
                            convention: str = 'ddim') -> np.ndarray:
  """The alphabar that each of the ascending timesteps is stepped to.

  At the end it is 1; CompVis ends at alphabar_0 instead.
  """
  bar = schedule.alphas_cumprod
  end = bar[0] if convention == 'compvis' else 1.0
  return np.concatenate([[end], bar[timesteps[:-1]]])


def ddim_plan(schedule: NoiseSchedule, num_steps: int,
              spacing: str = 'uniform', eta: float = 0.0,
              convention: str = 'ddim') -> SamplerPlan:
  """DDIM eq. 12, with sigma of eq. 16.

      x' = sqrt(abar' / abar) x + sigma z
         + [sqrt(1 - abar' - sigma^2) - sqrt(abar' / abar) sqrt(1 - abar)] eps

  Args:
    schedule: the training schedule.
    num_steps: number of steps asked for (see `ddim_timesteps`).
    spacing: 'uniform' or 'quad'.
    eta: 0 is deterministic, 1 has DDPM's variance.
    convention: 'ddim' (ermongroup) lands on x_0; 'compvis' (latent diffusion)
      visits the timesteps plus one and ends at alphabar_0.
  """
  if not eta >= 0:
    raise ValueError(f'eta={eta}: must be >= 0')
  timesteps = ddim_timesteps(
      schedule.num_train_steps, num_steps, spacing, convention)
  bar = schedule.alphas_cumprod[timesteps]
  bar_prev = previous_alphas_cumprod(schedule, timesteps, convention)
  # sigma is eq. 16. What of the noise eps is left at x' is `direction`; taking
  # x to x' = x_coef * x would leave x_coef sqrt(1 - abar) of it, and the
  # difference is what a step subtracts. Plans run from the noisiest step on.
  sigma = eta * np.sqrt((1 - bar_prev) / (1 - bar) * (1 - bar / bar_prev))
  x_coef = np.sqrt(bar_prev / bar)
  direction = np.sqrt(np.maximum(1 - bar_prev - sigma**2, 0))
  eps_factor = x_coef * np.sqrt(1 - bar) - direction
  return SamplerPlan(timesteps[::-1], x_coef[::-1], eps_factor[::-1],
                     sigma[::-1])
