"""Measures how far apart teacher and student are at every step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from msfp_jax import diffusion
from msfp_jax.diffusion import sampling
from msfp_jax.tune import losses


@flax.struct.dataclass
class Gaps:
  """The mean squared differences over a batch, at each of S steps `[S]`.

  Attributes:
    eps: between the noise predicted by both from the teacher's x_t.
    step: between the x_{t-1} that these predictions lead to.
  """

  eps: jax.Array
  step: jax.Array


def along_trajectory(
    teacher: sampling.NoiseFn,
    student: sampling.NoiseFn | sampling.RememberingFn,
    plan: diffusion.SamplerPlan, x: jax.Array, key: jax.Array | None = None,
    memory: Any = None) -> Gaps:
  """Compares predictions at every x_t of a trajectory that the teacher drives.

  So each step shows the difference that it makes by itself, at the samples
  that fine-tuning sees. The quality gap of the paper's figure 3 is not defined
  in what we read; `Gaps.step` is our choice (docs/method.md, section 6).

  Args:
    teacher: predicts the noise: (x, t `[B]`, position in the plan) -> eps.
    student: likewise.
    plan: the sampler.
    x: standard normal noise `[B, H, W, C]`.
    key: for samplers that add noise, the same to both.
    memory: of a student that remembers, see `sampling.walk`.
  """

  def body(position, step, student):
    #   teacher's x_t --+--> teacher: eps --> x_{t-1} --> goes on
    #                   |                        \
    #                   |                         difference: `step`
    #                   |                        /
    #                   +--> student: eps' -> x'_{t-1}    (ends here)
    t = jnp.full(position.x.shape[:1], step['t'])
    eps = [predict(position.x, t, step['index'])
           for predict in (teacher, student)]
    # Both from the teacher's position; only its own step is gone on from.
    new = [sampling.advance(plan, step, position, e, key) for e in eps]
    return new[0], Gaps(losses.dfa_loss(1.0, *eps),
                        jnp.mean((new[0].x - new[1].x)**2))

  return sampling.walk(body, student, plan, x, memory)[1]
