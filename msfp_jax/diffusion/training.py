"""What a model is trained on: at which noise levels, and to predict what."""

import dataclasses

import jax
import jax.numpy as jnp

from msfp_jax.base import arguments
from msfp_jax.diffusion.schedules import FlowSchedule
from msfp_jax.diffusion.schedules import Schedule

DENSITIES = ('uniform', 'logit_normal')
_RULES = {'density': arguments.one_of(DENSITIES), 'mean': arguments.NUMBER,
          'std': arguments.POSITIVE}


@dataclasses.dataclass(frozen=True)
class Times:
  """How often training sees which share of the way from data to noise.

  Attributes:
    density: 'uniform', or 'logit_normal' for the logistic function of a normal
      number, which prefers the middle (Esser et al. 2024, arXiv 2403.03206).
    mean: of that number; the shift a of `flow.shift_levels` is log(a) here.
    std: of that number.

  Raises:
    ValueError: a field that is none of these.
  """

  density: str = 'uniform'
  mean: float = 0.0
  std: float = 1.0

  def __post_init__(self):
    arguments.check_fields('times', self, _RULES)

  def draw(self, key: jax.Array, schedule: Schedule, number: int) -> jax.Array:
    """Timesteps `[number]`: int32 below T, or of a flow float32 up to T."""
    steps = schedule.num_train_steps
    is_flow = isinstance(schedule, FlowSchedule)
    if self.density == 'logit_normal':
      share = jax.nn.sigmoid(
          self.mean + self.std * jax.random.normal(key, (number,)))
    elif is_flow:
      share = jax.random.uniform(key, (number,))
    else:
      return jax.random.randint(key, (number,), 0, steps)
    if is_flow:
      return steps * share
    return jnp.minimum(jnp.int32(steps * share), steps - 1)


UNIFORM = Times()


def target(schedule: Schedule, x0: jax.Array, noise: jax.Array) -> jax.Array:
  """What a model learns to predict: the noise; of a flow noise - x_0."""
  return noise - x0 if isinstance(schedule, FlowSchedule) else noise
