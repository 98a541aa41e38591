"""DPM-Solver++ (2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2)."""

import numpy as np

from msfp_jax.diffusion.plan import Multistep
from msfp_jax.diffusion.plan import SamplerPlan
from msfp_jax.diffusion.schedules import NoiseSchedule


def dpm_solver_plan(schedule: NoiseSchedule, num_steps: int,
                    spacing: str = 'linspace', offset: int = 0) -> SamplerPlan:
  """The multistep solver of second order on predictions of x_0.

  With alpha = sqrt(alphabar), sigma = sqrt(1 - alphabar), lambda =
  log(alpha / sigma), h = lambda' - lambda and r = (lambda - lambda_before) / h:

      x' = sigma' / sigma x - alpha' (exp(-h) - 1) [(1 + 1 / 2r) x0
                                                    - 1 / 2r x0_before]

  The first step and the last, which lands on x_0, are of first order.

  Args:
    schedule: the training schedule.
    num_steps: S.
    spacing: see `_timesteps`.
    offset: added to the timesteps of 'leading'.

  Raises:
    ValueError: num_steps outside 1..T - 1, an unknown spacing, or an offset
      beyond the schedule.
  """
  timesteps = _timesteps(schedule.num_train_steps, num_steps, spacing, offset)
  # The last step lands on alphabar = 1: sigma' = 0, lambda' infinite, exp(-h) =
  # 0. So its gain is 1, and the result the predicted x_0.
  bar = schedule.alphas_cumprod[timesteps]
  alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)
  alpha_next, sigma_next = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
  log_ratio = np.append(np.log(alpha / sigma), np.inf)
  h = np.diff(log_ratio)
  gain = -alpha_next * np.expm1(-h)
  # 1 / 2r, and 0 where the step is of first order.
  slope = np.zeros(len(timesteps))
  slope[1:-1] = h[1:-1] / h[:-2] / 2
  weights = np.stack([gain * (1 + slope), -gain * slope], axis=1)
  # p_i is x_0 as predicted at step i: (x - sigma eps) / alpha.
  multistep = Multistep(1 / alpha, -sigma / alpha, weights)
  return SamplerPlan(
      timesteps, sigma_next / sigma, weights[:, 0] * sigma / alpha,
      np.zeros(len(timesteps)), multistep)


def _timesteps(total: int, num_steps: int, spacing: str, offset: int
               ) -> np.ndarray:
  """The visited timesteps, descending, int64, as diffusers has them.

  'linspace' is S of S + 1 even ones from T - 1 to 0, all but the last, rounded
  ('uniform' is another name for it); 'leading' the same of steps of
  T // (S + 1) from 0 on; 'trailing' steps of T / S down from T - 1.
  """
  if not 1 <= num_steps < total:
    raise ValueError(f'num_steps={num_steps}: must be in 1..{total - 1}')
  if spacing in ('linspace', 'uniform'):
    return np.linspace(0, total - 1, num_steps + 1).round().astype(
        np.int64)[:0:-1]
  if spacing == 'trailing':
    # Rounding errors of arange may leave one more, next to 0.
    down = np.arange(total, 0, -total / num_steps)[:num_steps]
    return down.round().astype(np.int64) - 1
  if spacing != 'leading':
    raise ValueError(f"spacing {spacing!r}: must be 'linspace', 'leading' or "
                     "'trailing' of this sampler")
  found = total // (num_steps + 1) * np.arange(num_steps, 0, -1) + offset
  if not 0 <= offset < total - found[0] + offset:
    raise ValueError(f'offset={offset}: the timesteps begin at {found[0]}, of '
                     f'{total}')
  return found
