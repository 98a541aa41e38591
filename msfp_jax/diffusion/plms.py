"""PLMS (Liu et al., "Pseudo Numerical Methods", ICLR 2022), as in CompVis."""

import numpy as np

from msfp_jax.diffusion.ddim import ddim_plan
from msfp_jax.diffusion.plan import Multistep
from msfp_jax.diffusion.plan import SamplerPlan
from msfp_jax.diffusion.schedules import NoiseSchedule

# Adams-Bashforth on the present and up to three earlier predictions.
_ORDERS = {2: np.array([3, -1]) / 2, 3: np.array([23, -16, 5]) / 12,
           4: np.array([55, -59, 37, -9]) / 24}


def plms_plan(schedule: NoiseSchedule, num_steps: int,
              spacing: str = 'uniform', convention: str = 'compvis',
              offset: int | None = None) -> SamplerPlan:
  """DDIM's step on a linear multistep estimate of the noise.

  The first step is taken twice: once by DDIM, and again with the mean of the
  predictions at its two ends. That makes S + 1 evaluations; the plan has an
  entry for each. The prediction at the far end is not used again.

  Args:
    schedule: the training schedule.
    num_steps: S >= 2.
    spacing: as of `ddim_timesteps`.
    convention: likewise.
    offset: likewise.

  Raises:
    ValueError: fewer steps; or steps of 'trailing' or 'linspace' that are not
      all T // S long, to which the method's weights do not apply.
  """
  if num_steps < 2:
    raise ValueError(f'num_steps={num_steps}: PLMS takes at least 2')
  one = ddim_plan(schedule, num_steps, spacing, convention=convention,
                  offset=offset)
  stride = schedule.num_train_steps // num_steps
  if spacing in ('trailing', 'linspace') and (
      np.diff(one.timesteps) != -stride).any():
    raise ValueError(
        f'spacing {spacing!r} with {num_steps} of {schedule.num_train_steps} '
        f'steps are not all {stride} apart, as PLMS wants them: use another '
        "number of steps, 'leading', or the sampler 'ddim'")
  first, factor = one.eps_factor[0], one.eps_factor
  # Evaluation 0 takes DDIM's step, to the far end. Evaluation 1, there, takes
  # half of it back and adds half of its own: from the start, the mean of both.
  rows = [[first], [first / 2, -first / 2]]
  for i in range(1, one.num_steps):
    terms = list(_ORDERS[min(i + 1, 4)])
    # Evaluation 1, the far end, stands between 0 and 2 in the history.
    place = i
    if place < len(terms):
      terms.insert(place, 0.0)
    rows.append(factor[i] * np.array(terms))
  weights = np.zeros((len(rows), max(map(len, rows))))
  for row, values in zip(weights, rows, strict=True):
    row[:len(values)] = values
  # Evaluation 1 is at the second timestep, and so is 2, from the better sample.
  again = lambda values, extra: np.concatenate(
      [values[:1], [extra], values[1:]])
  count = len(rows)
  return SamplerPlan(
      again(one.timesteps, one.timesteps[1]), again(one.x_coef, 1.0),
      weights[:, 0], np.zeros(count),
      Multistep(np.zeros(count), np.ones(count), -weights))
