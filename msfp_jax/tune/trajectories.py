"""Trajectories along which a student is trained, and what it is to predict.

Driven by the teacher, there is one trajectory:

    x_t --> teacher --> eps, the target --> x_{t-1}

Driven by the student there are two, from one noise:

    teacher:  x_t  --> teacher --> eps   ----------------------> x_{t-1}
    student:  x'_t --> teacher --> eps', the target -- steered -->  ^
                 \\--> student ----------------------> x'_{t-1} . . . (apart)

It then sees samples that its own errors made, as it will when it is deployed.
What it is to predict there is the teacher's eps'; or, steered, that and a part
of what leads back to the teacher's own trajectory. A small error that every
step makes alike costs each of them next to nothing, and adds up over all of
them: only by the distance of the two trajectories it is seen. In windows of a
few steps the student's is set to the teacher's after each of them, so that it
meets errors of a few steps alone. (TCAQ-DM, AAAI 2025, calibrates along the
quantized model's own trajectories; to steer, and windows, are ours.)
"""

from collections.abc import Sequence
import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax import diffusion
from msfp_jax.base import devices
from msfp_jax.diffusion import sampling

TEACHER, STUDENT = DRIVERS = 'teacher', 'student'


@flax.struct.dataclass
class Both:
  """Where two trajectories stand that began with one noise."""

  teacher: sampling.Position
  student: sampling.Position


Positions = sampling.Position | Both


def check(where: str, driver: str, steer: float, window_steps: int) -> None:
  """Raises ValueError for a driver that there is not, or nothing to steer by.

  Args:
    where: what stands before the fields' names, such as 'config.finetune.'.
    driver: of `Trajectories`.
    steer: likewise.
    window_steps: likewise.
  """
  if driver not in DRIVERS:
    raise ValueError(f'{where}driver={driver!r}: must be one of {DRIVERS}')
  for name, value in (('steer', steer), ('window_steps', window_steps)):
    if value and driver == TEACHER:
      raise ValueError(
          f'{where}{name}={value}: with {where}driver={driver!r} the teacher '
          'drives, and there is no other trajectory to lead back to it; take '
          f'{where}driver={STUDENT!r}, or {where}{name}={type(value)()}')


@dataclasses.dataclass(frozen=True)
class Trajectories:
  """How trajectories go on.

  Attributes:
    plan: the sampler.
    driver: TEACHER or STUDENT, whose predictions move what the student sees.
    steer: share of the distance to the teacher's trajectory that a step of
      average denoising factor is to make good, from 0 to below 1; steps of
      smaller factors, which can do less, a smaller one. Of STUDENT alone.
    window_steps: steps after which the student's trajectory is set to the
      teacher's, fewer than the plan has; 0: not before both begin anew. Of
      STUDENT alone.

  Raises:
    ValueError: another driver, or one that has nothing to steer by; windows
      that change nothing.
  """

  plan: diffusion.SamplerPlan
  driver: str = TEACHER
  steer: float = 0.0
  window_steps: int = 0

  def __post_init__(self):
    check('', self.driver, self.steer, self.window_steps)
    if self.window_steps == 1 or self.window_steps >= self.plan.num_steps:
      raise ValueError(
          f'window_steps={self.window_steps}: must be from 2 to below the '
          f"sampler's {self.plan.num_steps} steps, or 0; with 1 the student "
          f'would see the teacher\'s trajectory, as with driver={TEACHER!r}')

  def begins(self, step: dict[str, jax.Array]) -> jax.Array:
    """Whether the student stands at the teacher's position, bool `[]`.

    What it remembers of its inputs is then of another path.
    """
    return step['index'] % (self.window_steps or self.plan.num_steps) == 0

  def start(self, noise: jax.Array) -> Positions:
    """The positions before the first step."""
    begin = sampling.start(self.plan, noise)
    if self.driver == TEACHER:
      return begin
    # Two arrays: a step is given both, and may write over them.
    return Both(begin, jax.tree.map(jnp.copy, begin))

  def inputs(self, positions: Positions) -> tuple[jax.Array, ...]:
    """Where the teacher is asked: the student's x, and its own if another."""
    if isinstance(positions, Both):
      return positions.student.x, positions.teacher.x
    return (positions.x,)

  def target(self, step: dict[str, jax.Array], positions: Positions,
             taught: Sequence[jax.Array], key: jax.Array) -> jax.Array:
    """What the student is to predict at its x.

    Args:
      step: one entry of `plan.steps()`.
      positions: before the step.
      taught: the teacher's predictions at `inputs`.
      key: of the sampler's noise.
    """
    if not self.steer:
      return taught[0]
    # A step is x' = .. - f eps: eps + apart / f would make all of it good. With
    # c = f apart / (f^2 + w), which minimizes (apart - f c)^2 + w c^2, a step
    # of a small f is not asked for what it cannot do.
    factors = self.plan.eps_factor
    factor = jnp.asarray(factors, jnp.float32)[step['index']]
    weight = np.float32((1 / self.steer - 1) * np.mean(factors**2))
    go = lambda position, eps: sampling.advance(
        self.plan, step, position, eps, key).x
    apart = (go(positions.student, taught[0])
             - go(positions.teacher, taught[1]))
    return taught[0] + factor / (factor**2 + weight) * apart

  def advance(self, step: dict[str, jax.Array], positions: Positions,
              taught: Sequence[jax.Array], eps: jax.Array, key: jax.Array
              ) -> Positions:
    """The positions after a step; arguments as of `target`.

    Args:
      eps: what the student predicted.
    """
    go = lambda position, eps: sampling.advance(
        self.plan, step, position, eps, key)
    if isinstance(positions, Both):
      # Both add the same noise, where the sampler adds some.
      teacher, student = (go(positions.teacher, taught[1]),
                          go(positions.student, eps))
      if self.window_steps:
        ends = (step['index'] + 1) % self.window_steps == 0
        student = jax.tree.map(
            lambda ours, own: jnp.where(ends, ours, own), teacher, student)
      return Both(teacher, student)
    return go(positions, taught[0])


def rows(positions: Positions) -> int:
  """Trajectories at once."""
  of = positions.student if isinstance(positions, Both) else positions
  return of.x.shape[0]


def shardings(layout: devices.Layout, positions: Positions) -> Positions:
  """Where they lie: as batches."""
  def of(position: sampling.Position) -> sampling.Position:
    return sampling.Position(
        layout.batch, None if position.past is None else layout.batch_second)

  return jax.tree.map(
      of, positions, is_leaf=lambda x: isinstance(x, sampling.Position))
