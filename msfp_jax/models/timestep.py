"""The embedding of timesteps that all our models begin with."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def timestep_embedding(t: jax.Array, dim: int, order: str = 'sin_cos',
                       freq_shift: int = 1, exponents: type = np.float64
                       ) -> jax.Array:
  """Sinusoidal embedding of timesteps.

  Args:
    t: timesteps, ints or real numbers, `[B]`; taken as float32.
    dim: width of the result.
    order: 'sin_cos' (DDPM) or 'cos_sin' (latent diffusion).
    freq_shift: 1 for DDPM, 0 for latent diffusion.
    exponents: what the exponents of the frequencies are rounded to. PyTorch's
      models have float32, which is up to 5e-7 of a frequency; an angle of 7000
      is moved by 1.5e-4.

  Returns:
    float32 `[B, dim]`; an odd `dim` gets a last column of zeros.
  """
  half = dim // 2
  # exp in float64 once: float32's differs by an ULP between frameworks, which
  # is 3e-5 of the embedding at t = 999.
  powers = (exponents(-math.log(10000.0)) * np.arange(half, dtype=exponents)
            / exponents(half - freq_shift))
  freqs = np.exp(powers.astype(np.float64))
  angles = t.astype(jnp.float32)[:, None] * freqs.astype(np.float32)[None, :]
  # Sines and cosines side by side, not alternating.
  parts = [jnp.sin(angles), jnp.cos(angles)]
  emb = jnp.concatenate(parts if order == 'sin_cos' else parts[::-1], axis=-1)
  return jnp.pad(emb, ((0, 0), (0, dim % 2)))
