"""Changes to a predicted noise before a sampler uses it."""

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.diffusion.sampling import NoiseFn
from msfp_jax.diffusion.sampling import SamplerPlan
from msfp_jax.diffusion.schedules import NoiseSchedule


def classifier_free(eps_fn: NoiseFn, scale: float) -> NoiseFn:
  """Classifier-free guidance (Ho and Salimans 2022), e_u + s (e_c - e_u).

  Args:
    eps_fn: for a batch of `2 B`: the same x twice, first without condition,
      then with it.
    scale: s; 1 is the conditional prediction alone, 0 the other.

  Returns:
    A NoiseFn for a batch of B.
  """

  def guided(x: jax.Array, t: jax.Array, index: jax.Array) -> jax.Array:
    both = eps_fn(jnp.concatenate([x, x]), jnp.concatenate([t, t]), index)
    without, within = jnp.split(both, 2)
    return without + scale * (within - without)

  return guided


def clip_x0(eps_fn: NoiseFn, schedule: NoiseSchedule, plan: SamplerPlan,
            limit: float = 1.0) -> NoiseFn:
  """The noise that agrees with x_0 clipped to +-limit (DDPM's sampling).

  Args:
    eps_fn: predicts the noise.
    schedule: the training schedule.
    plan: the sampler.
    limit: 1 for images in [-1, 1].
  """
  bar = schedule.alphas_cumprod[plan.timesteps]
  signal = jnp.asarray(np.sqrt(bar), jnp.float32)
  sigma = jnp.asarray(np.sqrt(1 - bar), jnp.float32)

  def clipped(x: jax.Array, t: jax.Array, index: jax.Array) -> jax.Array:
    x0 = (x - sigma[index] * eps_fn(x, t, index)) / signal[index]
    return (x - signal[index] * jnp.clip(x0, -limit, limit)) / sigma[index]

  return clipped
