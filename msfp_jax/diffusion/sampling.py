"""Running a sampler: the whole trajectory in one `lax.scan`.

The step of DDPM and of DDIM is affine in the sample, the predicted noise and
the fresh noise, so a sampler is three coefficients a step: a `SamplerPlan`.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

# (x [B, H, W, C], t [B] float32, position in the plan) -> noise like x.
NoiseFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class SamplerPlan:
  """x_next = x_coef * x - eps_factor * eps(x, t) + noise_std * z.

  Attributes:
    timesteps: int `[S]`, in the order of sampling (noisiest first).
    x_coef: float64 `[S]`.
    eps_factor: float64 `[S]`: the denoising factor gamma_t of this sampler,
      what its own step multiplies into the predicted noise; >= 0.
    noise_std: float64 `[S]`.
  """

  timesteps: np.ndarray
  x_coef: np.ndarray
  eps_factor: np.ndarray
  noise_std: np.ndarray

  @property
  def num_steps(self) -> int:
    return len(self.timesteps)

  def steps(self) -> dict[str, jax.Array]:
    """The coefficients as float32 arrays that `lax.scan` walks over."""
    return {
        'index': jnp.arange(self.num_steps),
        't': jnp.asarray(self.timesteps, jnp.float32),
        'x_coef': jnp.asarray(self.x_coef, jnp.float32),
        'eps_factor': jnp.asarray(self.eps_factor, jnp.float32),
        'noise_std': jnp.asarray(self.noise_std, jnp.float32),
    }


def advance(plan: SamplerPlan, step: dict[str, jax.Array], x: jax.Array,
            eps: jax.Array, key: jax.Array | None) -> jax.Array:
  """One step of the sampler; `step` is one entry of `plan.steps()`."""
  x = step['x_coef'] * x - step['eps_factor'] * eps
  if plan.noise_std.any():
    if key is None:
      raise ValueError('this sampler adds noise at every step: pass a key')
    z = jax.random.normal(jax.random.fold_in(key, step['index']), x.shape)
    x += step['noise_std'] * z
  return x


def sample(eps_fn: NoiseFn, plan: SamplerPlan, x: jax.Array,
           key: jax.Array | None = None) -> jax.Array:
  """Samples from noise.

  Args:
    eps_fn: predicts the noise: (x, t `[B]`, position in the plan) -> eps.
    plan: the sampler.
    x: standard normal noise `[B, H, W, C]`.
    key: for samplers that add noise; unused by DDIM with eta = 0.

  Returns:
    Samples like x, nominally in [-1, 1], not clipped.
  """
  return trajectory(eps_fn, plan, x, key)[0]


def trajectory(eps_fn: NoiseFn, plan: SamplerPlan, x: jax.Array,
               key: jax.Array | None = None,
               visit: Callable[..., object] = lambda x, eps, step: None):
  """As `sample`, and collects what `visit(x, eps, step)` returns on the way.

  Returns:
    The samples, and visit's results stacked along a first axis of S steps.
  """

  def body(x, step):
    t = jnp.full((x.shape[0],), step['t'])
    eps = eps_fn(x, t, step['index'])
    return advance(plan, step, x, eps, key), visit(x, eps, step)

  return jax.lax.scan(body, x, plan.steps())
