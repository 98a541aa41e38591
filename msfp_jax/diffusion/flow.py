"""Flow matching by Euler's method, with the shifts of FLUX.1 and SD3."""

from collections.abc import Sequence
import math

import numpy as np

from msfp_jax.diffusion.plan import SamplerPlan
from msfp_jax.diffusion.schedules import FlowSchedule

SPACINGS = ('uniform', 'linspace')
SHIFT_TYPES = ('exponential', 'linear')
# Of FLUX.1-dev: shifts mu at 256 and at 4096 tokens.
FLUX_SHIFT = (0.5, 1.15, 256, 4096)
# diffusers counts noise levels in thousandths, and its own steps, without
# those of a pipeline, end at the least of them.
_LEAST = 1 / 1000
# Of models that take sigma itself.
_SIGMA = FlowSchedule()


def shift_of(image_tokens: int, shift_by_tokens: Sequence[float],
             shift_type: str = 'exponential') -> float:
  """The factor by which large images shift noise levels, as `shift_levels` has.

  Larger images need more noise before they are as unrecognizable as small
  ones. mu is on a line through two sizes; the factor is exp(mu), or mu itself.

  Args:
    image_tokens: of the transformer, H / 16 * W / 16 for FLUX.
    shift_by_tokens: (mu at the first size, mu at the second, the first size,
      the second size), in diffusers (base_shift, max_shift,
      base_image_seq_len, max_image_seq_len).
    shift_type: 'exponential' for exp(mu), or 'linear' for mu.

  Raises:
    ValueError: no such type; sizes that are no two; no number of tokens; or a
      factor that is not above 0.
  """
  if shift_type not in SHIFT_TYPES:
    raise ValueError(f'shift_type {shift_type!r}: must be one of {SHIFT_TYPES}')
  if len(shift_by_tokens) != 4 or not all(map(math.isfinite, shift_by_tokens)):
    raise ValueError(f'shift_by_tokens={tuple(shift_by_tokens)}: must be four '
                     f'numbers, such as {FLUX_SHIFT}')
  low, high, small, large = shift_by_tokens
  if small == large:
    raise ValueError(f'shift_by_tokens={tuple(shift_by_tokens)}: its two sizes '
                     'must differ')
  if image_tokens < 1:
    raise ValueError(
        f'image_tokens={image_tokens}: the shift depends on the size of the '
        'image; give the tokens that the transformer sees of it, for FLUX '
        'height / 16 times width / 16 (config.sampler.image_tokens), or a '
        'shift that does not (config.sampler.shift)')
  mu = low + (high - low) / (large - small) * (image_tokens - small)
  if shift_type == 'exponential':
    return math.exp(mu)
  if mu <= 0:
    raise ValueError(f'shift_by_tokens={tuple(shift_by_tokens)} at '
                     f'{image_tokens} tokens is {mu:g}: must be above 0')
  return mu


def shift_levels(sigma: np.ndarray, shift: float) -> np.ndarray:
  """a sigma / (1 + (a - 1) sigma): keeps 0 and 1, and spends a > 1 on noise."""
  return shift * sigma / (1 + (shift - 1) * sigma)


def flow_plan(num_steps: int, shift: float = 1.0, spacing: str = 'uniform',
              shift_by_tokens: Sequence[float] = (), image_tokens: int = 0,
              shift_type: str = 'exponential', shift_terminal: float = 0.0, *,
              schedule: FlowSchedule = _SIGMA) -> SamplerPlan:
  """Euler's method on dx / dsigma = v, from noise at sigma 1 to data at 0.

      x' = x - (sigma - sigma') v(x, t),    t = T sigma

  What a plan calls eps is here the velocity v = noise - x_0. FLUX.1-schnell is
  the default; -dev has `shift_by_tokens=FLUX_SHIFT`, Stable Diffusion 3
  `shift=3.0, spacing='linspace'`.

  Args:
    num_steps: S; the model is evaluated so often.
    shift: a of `shift_levels`.
    spacing: of the S noise levels before they are shifted. 'uniform' is S even
      ones from 1 to 1 / S, as FLUX's pipelines; 'linspace' from 1 to the least
      of 1000, itself shifted by `shift`, as diffusers where a pipeline names
      none, which is that of Stable Diffusion 3.
    shift_by_tokens: of `shift_of`, in place of `shift`; () for none.
    image_tokens: likewise.
    shift_type: likewise.
    shift_terminal: levels are stretched away from 1 until the last is this; 0
      for not.
    schedule: what the model was trained on: its T.

  Raises:
    ValueError: options that make no falling noise levels.
  """
  if isinstance(num_steps, bool) or not isinstance(num_steps, int) or (
      num_steps < 1):
    raise ValueError(f'num_steps={num_steps!r}: must be a whole number, at '
                     'least 1')
  if not 0 < shift < math.inf:
    raise ValueError(f'shift={shift}: must be a number above 0, 1 for none')
  factor = shift
  if len(shift_by_tokens):
    if shift != 1.0:
      raise ValueError(f'shift={shift} and shift_by_tokens='
                       f'{tuple(shift_by_tokens)}: one replaces the other; '
                       'give one of them')
    factor = shift_of(image_tokens, shift_by_tokens, shift_type)
  if spacing == 'uniform':
    last = 1 / num_steps
  elif spacing == 'linspace':
    # Twice, as in diffusers: its training's levels are shifted already, but
    # not where the shift is that of an image's size.
    last = _LEAST if len(shift_by_tokens) else shift_levels(_LEAST, shift)
  else:
    raise ValueError(f'spacing {spacing!r}: must be one of {SPACINGS}')
  sigma = shift_levels(np.linspace(1.0, last, num_steps), factor)
  if shift_terminal:
    sigma = _stretched(sigma, shift_terminal)
  return SamplerPlan(
      schedule.num_train_steps * sigma, np.ones(num_steps),
      sigma - np.append(sigma[1:], 0.0), np.zeros(num_steps))


def _stretched(sigma, last):
  if not 0 < last < 1:
    raise ValueError(f'shift_terminal={last}: must be a number from 0, for '
                     'none, to below 1')
  if len(sigma) == 1:
    raise ValueError(f'shift_terminal={last}: one step begins at 1 and cannot '
                     'end elsewhere; take two or more, or 0 for none')
  return 1 - (1 - sigma) * (1 - last) / (1 - sigma[-1])
