"""Ancestral sampling (DDPM, Ho et al. 2020), on all or some timesteps."""

import numpy as np

from msfp_jax.diffusion.ddim import ddim_timesteps
from msfp_jax.diffusion.ddim import previous_alphas_cumprod
from msfp_jax.diffusion.plan import make_clip
from msfp_jax.diffusion.plan import SamplerPlan
from msfp_jax.diffusion.schedules import NoiseSchedule


def denoising_factors(alphas: np.ndarray,
                      alphas_cumprod: np.ndarray) -> np.ndarray:
  """gamma_t = (1 - alpha_t) / (sqrt(alpha_t) sqrt(1 - alphabar_t)).

  The factor of the predicted noise in DDPM's algorithm 2, line 4, and the
  paper's denoising factor as we read it (docs/method.md). float64, like the
  arguments.
  """
  return (1 - alphas) / np.sqrt(alphas * (1 - alphas_cumprod))


def ddpm_plan(schedule: NoiseSchedule, num_steps: int | None = None,
              spacing: str = 'uniform', variance: str = 'small',
              offset: int = 0, clip: float = 0.0) -> SamplerPlan:
  """DDPM's algorithm 2.

      x' = (x - (1 - alpha) / sqrt(1 - abar) eps) / sqrt(alpha) + sigma z

  Args:
    schedule: the training schedule.
    num_steps: None for all T; else a subset, with alpha := abar / abar'.
    spacing: as of `ddim_timesteps`.
    variance: 'small' is the posterior's, 'large' is beta; none is added at
      t = 0, nor of 'small' by any last step.
    offset: added to the timesteps, as of `ddim_timesteps`.
    clip: x_0 as predicted is kept within this distance of 0; 0 for not.
  """
  if variance not in ('small', 'large'):
    raise ValueError(f"variance {variance!r}: must be 'small' or 'large'")
  num_train_steps = schedule.num_train_steps
  timesteps = ddim_timesteps(
      num_train_steps, num_train_steps if num_steps is None else num_steps,
      spacing, offset=offset)
  if len(np.unique(timesteps)) < len(timesteps):
    raise ValueError(f'spacing {spacing!r} with {num_steps} steps visits a '
                     'timestep twice, which DDPM cannot; use fewer steps')
  bar = schedule.alphas_cumprod[timesteps]
  bar_prev = previous_alphas_cumprod(schedule, timesteps)
  # Between visited timesteps the process is one longer step: its alpha is the
  # product of those skipped, the ratio of the cumulative products.
  alphas = bar / bar_prev
  sigma = np.sqrt(1 - alphas)
  if variance == 'small':
    sigma = sigma * np.sqrt((1 - bar_prev) / (1 - bar))
  sigma[timesteps == 0] = 0.0
  # What x_0 has in the posterior's mean, DDPM eq. 7.
  gain = np.sqrt(bar_prev) * (1 - alphas) / (1 - bar)
  return SamplerPlan(timesteps[::-1], 1 / np.sqrt(alphas)[::-1],
                     denoising_factors(alphas, bar)[::-1], sigma[::-1],
                     clip=make_clip(clip, bar[::-1], gain[::-1]))
