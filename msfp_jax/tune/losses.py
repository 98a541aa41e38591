"""The denoising factors, and DFA, the distillation loss that they weight."""

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax import diffusion
from msfp_jax.diffusion import ddim
from msfp_jax.diffusion import ddpm

GAMMAS = ('ddpm', 'ddpm_respaced', 'sampler', 'none')


def denoising_factors(schedule: diffusion.Schedule,
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
      the factor of the plan's own step (for DDIM the exact one, for flow
      matching sigma - sigma'); 'none' is 1.

  Returns:
    float64 `[S]`, in the plan's order.

  Raises:
    ValueError: an unknown variant, or one of the training schedule for a plan
      that does not visit its steps.
  """
  if variant not in GAMMAS:
    raise ValueError(f'gamma {variant!r}: must be one of {GAMMAS}')
  if variant == 'sampler':
    gamma = plan.eps_factor
  elif variant == 'none':
    gamma = np.ones(plan.num_steps)
  else:
    t = plan.schedule_steps(
        f"gamma={variant!r} is a formula of; use 'sampler' or 'none'")
    bar, alphas = schedule.alphas_cumprod[t], schedule.alphas[t]
    if variant == 'ddpm_respaced':
      # That function takes ascending timesteps; plans go down.
      alphas = bar / ddim.previous_alphas_cumprod(schedule, t[::-1])[::-1]
    gamma = ddpm.denoising_factors(alphas, bar)
  # A common factor would cancel in Adam's update; with mean 1 losses of
  # different gammas can be read side by side.
  return gamma / gamma.mean()


def dfa_loss(gamma: jax.Array, eps_teacher: jax.Array,
             eps_student: jax.Array, direction: float = 0.0) -> jax.Array:
  """gamma_t * ||eps_teacher - eps_student||^2, as a mean over elements.

  With `direction` the angle between the two is added to the mean square.

  Args:
    gamma: the denoising factor of the batch's timestep, scalar.
    eps_teacher: full-precision prediction `[B, H, W, C]`.
    eps_student: quantized prediction, likewise.
    direction: weight of 1 - cos of the angle, as a mean over images. For
      predictions of variance 1 an error at right angles to the teacher's adds
      half as much there as to the mean square.
  """
  loss = jnp.mean((eps_teacher - eps_student)**2)
  if direction:
    axes = tuple(range(1, eps_teacher.ndim))
    dot = lambda a, b: jnp.sum(a * b, axes)
    sizes = dot(eps_teacher, eps_teacher) * dot(eps_student, eps_student)
    # Predictions of nothing have no direction, and no gradient that is NaN.
    cosine = dot(eps_teacher, eps_student) * jax.lax.rsqrt(
        jnp.where(sizes > 0, sizes, 1.0))
    loss += direction * jnp.mean(1 - cosine)
  return gamma * loss
