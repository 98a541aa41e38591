"""DDIM (Song et al. 2021), as ermongroup/ddim steps it."""

import numpy as np

from msfp_jax.diffusion.sampling import SamplerPlan
from msfp_jax.diffusion.schedules import NoiseSchedule


def ddim_timesteps(num_train_steps: int, num_steps: int,
                   spacing: str = 'uniform') -> np.ndarray:
  """The visited timesteps, ascending, int64.

  'uniform' is `range(0, T, T // S)`: where S does not divide T that is more
  than S steps, as in the original. 'quad' is
  `int(linspace(0, sqrt(0.8 T), S)^2)`; its first few steps may repeat t = 0.

  Raises:
    ValueError: num_steps outside 1..T, or an unknown spacing.
  """
  if not 1 <= num_steps <= num_train_steps:
    raise ValueError(f'num_steps={num_steps}: must be in 1..{num_train_steps}')
  if spacing == 'uniform':
    return np.arange(0, num_train_steps, num_train_steps // num_steps)
  if spacing == 'quad':
    grid = np.linspace(0, np.sqrt(num_train_steps * 0.8), num_steps)
    return (grid**2).astype(np.int64)
  raise ValueError(f"spacing {spacing!r}: must be 'uniform' or 'quad'")


def previous_alphas_cumprod(schedule: NoiseSchedule,
                            timesteps: np.ndarray) -> np.ndarray:
  """alphabar after each of the ascending timesteps' steps; 1 at the end."""
  bar = schedule.alphas_cumprod[timesteps]
  return np.concatenate([[1.0], bar[:-1]])


def ddim_plan(schedule: NoiseSchedule, num_steps: int,
              spacing: str = 'uniform', eta: float = 0.0) -> SamplerPlan:
  """DDIM eq. 12, with sigma of eq. 16; the last step lands on x_0.

      x' = sqrt(abar' / abar) x + sigma z
         + [sqrt(1 - abar' - sigma^2) - sqrt(abar' / abar) sqrt(1 - abar)] eps

  Args:
    schedule: the training schedule.
    num_steps: number of steps asked for (see `ddim_timesteps`).
    spacing: 'uniform' or 'quad'.
    eta: 0 is deterministic, 1 has DDPM's variance.
  """
  if not eta >= 0:
    raise ValueError(f'eta={eta}: must be >= 0')
  timesteps = ddim_timesteps(schedule.num_train_steps, num_steps, spacing)
  bar = schedule.alphas_cumprod[timesteps]
  bar_prev = previous_alphas_cumprod(schedule, timesteps)
  sigma = eta * np.sqrt((1 - bar_prev) / (1 - bar) * (1 - bar / bar_prev))
  x_coef = np.sqrt(bar_prev / bar)
  direction = np.sqrt(np.maximum(1 - bar_prev - sigma**2, 0))
  eps_factor = x_coef * np.sqrt(1 - bar) - direction
  return SamplerPlan(timesteps[::-1], x_coef[::-1], eps_factor[::-1],
                     sigma[::-1])
