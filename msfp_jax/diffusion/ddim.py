"""DDIM (Song et al. 2021), as ermongroup/ddim and as CompVis step it."""

import numpy as np

from msfp_jax.diffusion.plan import make_clip
from msfp_jax.diffusion.plan import SamplerPlan
from msfp_jax.diffusion.schedules import NoiseSchedule

CONVENTIONS = ('ddim', 'compvis')
# Of diffusers, whose steps go back by a fixed stride.
_STRIDED = ('leading', 'trailing', 'linspace')
SPACINGS = ('uniform', 'quad', *_STRIDED)


def ddim_timesteps(num_train_steps: int, num_steps: int,
                   spacing: str = 'uniform', convention: str = 'ddim',
                   offset: int | None = None) -> np.ndarray:
  """The visited timesteps, ascending, int64.

  'uniform' is `range(0, T, T // S)`: where S does not divide T that is more
  than S steps, as in the original. 'quad' is
  `int(linspace(0, sqrt(0.8 T), S)^2)`; its first few steps may repeat t = 0.
  The others are those of diffusers, which are S steps: 'leading' the first S of
  'uniform', 'trailing' steps of T / S down from T - 1, 'linspace' even ones
  from 0 to T - 1, rounded.

  Args:
    num_train_steps: T.
    num_steps: S.
    spacing: one of SPACINGS.
    convention: one of CONVENTIONS.
    offset: added to each timestep; None for the convention's, which is 1 of
      'compvis' and 0 of 'ddim'. 'trailing' and 'linspace' take none, as in
      diffusers: they reach T - 1.

  Raises:
    ValueError: num_steps outside 1..T, an unknown spacing or convention, or an
      offset below 0 or beyond the schedule.
  """
  if convention not in CONVENTIONS:
    raise ValueError(f'convention {convention!r}: must be one of {CONVENTIONS}')
  if not 1 <= num_steps <= num_train_steps:
    raise ValueError(f'num_steps={num_steps}: must be in 1..{num_train_steps}')
  if offset is None:
    offset = int(convention == 'compvis')
  if offset < 0:
    raise ValueError(f'offset={offset}: must be >= 0')
  # Not linspace: steps of one length from 0 on, as in the original, so that
  # sampling begins below T - 1 (with 100 steps of 1000 at 990).
  stride = num_train_steps // num_steps
  if spacing == 'uniform':
    steps = np.arange(0, num_train_steps, stride)
  elif spacing == 'leading':
    steps = stride * np.arange(num_steps)
  elif spacing == 'quad':
    grid = np.linspace(0, np.sqrt(num_train_steps * 0.8), num_steps)
    steps = (grid**2).astype(np.int64)
  elif spacing == 'trailing':
    # Not linspace: rounding errors of arange decide ties, and so do they there.
    # They may leave one more, next to 0, which would be t = -1.
    down = np.arange(
        num_train_steps, 0, -num_train_steps / num_steps)[:num_steps]
    return np.round(down)[::-1].astype(np.int64) - 1
  elif spacing == 'linspace':
    return np.linspace(0, num_train_steps - 1, num_steps).round().astype(
        np.int64)
  else:
    raise ValueError(f'spacing {spacing!r}: must be one of {SPACINGS}')
  steps = steps + offset
  if steps[-1] >= num_train_steps:
    raise ValueError(
        f'num_steps={num_steps}, convention {convention!r} and offset {offset} '
        f'visit t = {steps[-1]}, beyond the schedule')
  return steps


def previous_alphas_cumprod(schedule: NoiseSchedule, timesteps: np.ndarray,
                            convention: str = 'ddim',
                            stride: int | None = None) -> np.ndarray:
  """The alphabar that each of the ascending timesteps is stepped to.

  At the end it is 1; CompVis ends at alphabar_0 instead.

  Args:
    schedule: the training schedule.
    timesteps: those visited, int64 `[S]`, ascending.
    convention: one of CONVENTIONS.
    stride: None to step to the timestep that is visited next; or how far each
      steps back, whatever is visited next.
  """
  bar = schedule.alphas_cumprod
  end = bar[0] if convention == 'compvis' else 1.0
  if stride is None:
    return np.concatenate([[end], bar[timesteps[:-1]]])
  before = timesteps - stride
  return np.where(before < 0, end, bar[np.maximum(before, 0)])


def ddim_plan(schedule: NoiseSchedule, num_steps: int,
              spacing: str = 'uniform', eta: float = 0.0,
              convention: str = 'ddim', offset: int | None = None,
              clip: float = 0.0) -> SamplerPlan:
  """DDIM eq. 12, with sigma of eq. 16.

      x' = sqrt(abar' / abar) x + sigma z
         + [sqrt(1 - abar' - sigma^2) - sqrt(abar' / abar) sqrt(1 - abar)] eps

  With a spacing of diffusers, abar' is of t - T // S, as it is there, even
  where another timestep is visited next.

  Args:
    schedule: the training schedule.
    num_steps: number of steps asked for (see `ddim_timesteps`).
    spacing: of `ddim_timesteps`.
    eta: 0 is deterministic, 1 has DDPM's variance, the most there is.
    convention: 'ddim' (ermongroup) lands on x_0; 'compvis' (latent diffusion)
      visits the timesteps plus one and ends at alphabar_0.
    offset: added to the timesteps in place of the convention's.
    clip: x_0 as predicted is kept within this distance of 0, and the noise as
      predicted, as diffusers does it by default; 0 for neither.
  """
  # Beyond 1 more noise is added than a step has room for.
  if not 0 <= eta <= 1:
    raise ValueError(f'eta={eta}: must be in [0, 1]')
  total = schedule.num_train_steps
  timesteps = ddim_timesteps(total, num_steps, spacing, convention, offset)
  bar = schedule.alphas_cumprod[timesteps]
  bar_prev = previous_alphas_cumprod(
      schedule, timesteps, convention,
      total // num_steps if spacing in _STRIDED else None)
  # sigma is eq. 16. What of the noise eps is left at x' is `direction`; taking
  # x to x' = x_coef * x would leave x_coef sqrt(1 - abar) of it, and the
  # difference is what a step subtracts. Plans run from the noisiest step on.
  sigma = eta * np.sqrt((1 - bar_prev) / (1 - bar) * (1 - bar / bar_prev))
  x_coef = np.sqrt(bar_prev / bar)
  direction = np.sqrt(np.maximum(1 - bar_prev - sigma**2, 0))
  eps_factor = x_coef * np.sqrt(1 - bar) - direction
  return SamplerPlan(
      timesteps[::-1], x_coef[::-1], eps_factor[::-1], sigma[::-1],
      clip=make_clip(clip, bar[::-1], np.sqrt(bar_prev)[::-1]))
