"""The denoising factors, and DFA, the distillation loss that they weight."""

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax import diffusion
from msfp_jax.diffusion import ddim
from msfp_jax.diffusion import ddpm

GAMMAS = ('ddpm', 'ddpm_respaced', 'sampler', 'none')


def denoising_factors(schedule: diffusion.NoiseSchedule,
                      plan: diffusion.SamplerPlan,
                      variant: str) -> np.ndarray:
  """gamma_t at the sampler's steps, scaled to mean 1.

  Under Adam only the ratio between timesteps matters.

  Args:
    schedule: the training schedule.
    plan: the sampler.
    variant: 'ddpm' is (1 - alpha_t) / (sqrt(alpha_t) sqrt(1 - alphabar_t)) of
      the training schedule at the visited timesteps; 'ddpm_respaced' has
      alpha := alphabar / alphabar' between visited timesteps; 'sampler' is
      the factor of the plan's own step (for DDIM the exact one); 'none' is 1.

  Returns:
    float64 `[S]`, in the plan's order.
  """
  t = plan.timesteps
  bar = schedule.alphas_cumprod[t]
  if variant == 'ddpm':
    gamma = ddpm.denoising_factors(schedule.alphas[t], bar)
  elif variant == 'ddpm_respaced':
    # That function takes ascending timesteps; plans go down.
    previous = ddim.previous_alphas_cumprod(schedule, t[::-1])[::-1]
    gamma = ddpm.denoising_factors(bar / previous, bar)
  elif variant == 'sampler':
    gamma = plan.eps_factor
  elif variant == 'none':
    gamma = np.ones(len(t))
  else:
    raise ValueError(f'gamma {variant!r}: must be one of {GAMMAS}')
  return gamma / gamma.mean()


def dfa_loss(gamma: jax.Array, eps_teacher: jax.Array,
             eps_student: jax.Array) -> jax.Array:
  """gamma_t * ||eps_teacher - eps_student||^2, as a mean over elements.

  Args:
    gamma: the denoising factor of the batch's timestep, scalar.
    eps_teacher: full-precision prediction `[B, H, W, C]`.
    eps_student: quantized prediction, likewise.
  """
  return gamma * jnp.mean((eps_teacher - eps_student)**2)
