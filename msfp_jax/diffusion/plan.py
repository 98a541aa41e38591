"""What a sampler does at each of its steps, as arrays: a `SamplerPlan`.

The step of DDPM and of DDIM is affine in the sample, the predicted noise and
the fresh noise, so a sampler is three coefficients a step. Multistep methods
(PLMS, DPM-Solver++) are affine too, in what was predicted at the steps before
as well: a `Multistep` says how.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ARRAYS = ('timesteps', 'x_coef', 'eps_factor', 'noise_std')
_CLIP_ARRAYS = ('x_part', 'eps_part', 'gain')


@dataclasses.dataclass(frozen=True)
class Multistep:
  """How a step uses earlier predictions.

  With p_i = x_part * x_i + eps_part * eps_i, a step is
  x_next = x_coef * x_i + sum_k weights[k] * p_{i - k}.

  Attributes:
    x_part: float64 `[S]`; 0 for methods on the noise itself.
    eps_part: float64 `[S]`.
    weights: float64 `[S, K]`; 0 where there was no step yet.
  """

  x_part: np.ndarray
  eps_part: np.ndarray
  weights: np.ndarray


@dataclasses.dataclass(frozen=True)
class Clip:
  """How a step keeps the x_0 that it predicts near the data's range.

  With x0 = x_part * x + eps_part * eps, a step gains
  gain * (clip(x0, -limit, limit) - x0): the noise as predicted stays.

  Attributes:
    x_part: float64 `[S]`.
    eps_part: float64 `[S]`.
    gain: float64 `[S]`: what of x_0 is in x_next.
    limit: > 0.
  """

  x_part: np.ndarray
  eps_part: np.ndarray
  gain: np.ndarray
  limit: float


def make_clip(limit: float, alphas_cumprod: np.ndarray, gain: np.ndarray
              ) -> Clip | None:
  """The clipping of x_0 = (x - sqrt(1 - abar) eps) / sqrt(abar).

  Args:
    limit: of its magnitude; 0 for no clipping.
    alphas_cumprod: abar of every step, float64 `[S]`.
    gain: as of `Clip`.

  Raises:
    ValueError: a limit below 0, or none that is a number.
  """
  if not 0 <= limit < np.inf:
    raise ValueError(f'clip={limit}: must be a number >= 0, 0 for no clipping')
  signal = np.sqrt(alphas_cumprod)
  return Clip(1 / signal, -np.sqrt(1 - alphas_cumprod) / signal, gain,
              float(limit)) if limit else None


@dataclasses.dataclass(frozen=True)
class SamplerPlan:
  """x_next = x_coef * x - eps_factor * eps(x, t) + noise_std * z.

  Attributes:
    timesteps: `[S]`, in the order of sampling (noisiest first): int64 steps of
      a training schedule, or float64 times, as flow matching has them. The
      model is given them as float32.
    x_coef: float64 `[S]`.
    eps_factor: float64 `[S]`: the denoising factor gamma_t of this sampler,
      what its own step multiplies into the predicted noise; >= 0.
    noise_std: float64 `[S]`.
    multistep: None for the step above; else it replaces the term of eps, and
      `eps_factor` is what of it falls on the present prediction.
    clip: None, or what is done to the x_0 that a step predicts; `eps_factor`
      is then that of the values that need no clipping.
  """

  timesteps: np.ndarray
  x_coef: np.ndarray
  eps_factor: np.ndarray
  noise_std: np.ndarray
  multistep: Multistep | None = None
  clip: Clip | None = None

  def __post_init__(self):
    t = np.asarray(self.timesteps)
    if t.dtype.kind not in 'iuf' or t.ndim != 1 or not len(t):
      raise ValueError('timesteps must be [S] integers or real numbers with '
                       f'S > 0, got {t.dtype} {list(t.shape)}')
    if not np.isfinite(t).all():
      raise ValueError(f'timesteps hold NaN or infinity: {t.tolist()}')
    t = t.astype(np.float64 if t.dtype.kind == 'f' else np.int64)
    object.__setattr__(self, 'timesteps', t)
    shapes = {name: np.shape(getattr(self, name)) for name in _ARRAYS}
    if self.multistep is not None:
      shapes |= {field.name: np.shape(getattr(self.multistep, field.name))[:1]
                 for field in dataclasses.fields(Multistep)}
    if self.clip is not None:
      if self.multistep is not None:
        raise ValueError('a plan of several steps does not clip')
      shapes |= {f'clip.{name}': np.shape(getattr(self.clip, name))
                 for name in _CLIP_ARRAYS}
    if odd := {n: shape for n, shape in shapes.items() if shape != t.shape}:
      raise ValueError(f'a plan of unequal lengths: {len(t)} timesteps, and '
                       + ', '.join(f'{n} {list(s)}' for n, s in odd.items()))

  @property
  def num_steps(self) -> int:
    """The number of times that the model is evaluated."""
    return len(self.timesteps)

  def schedule_steps(self, why: str) -> np.ndarray:
    """The timesteps, to index a training schedule with, int64 `[S]`.

    Args:
      why: what needs them, and the way out; ends the message.

    Raises:
      ValueError: they are real numbers.
    """
    if self.timesteps.dtype.kind == 'f':
      raise ValueError(f'the timesteps are real numbers, such as '
                       f'{self.timesteps[0]:g}, and no steps of a training '
                       f'schedule, which {why}')
    return self.timesteps

  def to_dict(self) -> dict[str, Any]:
    """Plain JSON-able form; every number survives as text."""
    fields = {name: np.asarray(getattr(self, name)).tolist()
              for name in _ARRAYS}
    if self.multistep is not None:
      fields['multistep'] = {
          field.name: np.asarray(getattr(self.multistep, field.name)).tolist()
          for field in dataclasses.fields(Multistep)}
    if self.clip is not None:
      fields['clip'] = {'limit': self.clip.limit} | {
          name: np.asarray(getattr(self.clip, name)).tolist()
          for name in _CLIP_ARRAYS}
    return fields

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> 'SamplerPlan':
    """The inverse of `to_dict`: integers stay integers, others float64.

    Raises:
      ValueError, KeyError, TypeError: it is no plan.
    """
    timesteps, *others = (fields[name] for name in _ARRAYS)
    multistep = fields.get('multistep')
    if multistep is not None:
      multistep = Multistep(*(
          np.asarray(multistep[field.name], np.float64)
          for field in dataclasses.fields(Multistep)))
    clip = fields.get('clip')
    if clip is not None:
      clip = Clip(*(np.asarray(clip[name], np.float64)
                    for name in _CLIP_ARRAYS), float(clip['limit']))
    return cls(np.asarray(timesteps),
               *(np.asarray(values, np.float64) for values in others),
               multistep, clip)

  def steps(self) -> dict[str, jax.Array]:
    """The coefficients as float32 arrays that `lax.scan` walks over."""
    x_coef, eps_factor, more = self.x_coef, self.eps_factor, {}
    if (clip := self.clip) is not None:
      # What of x and eps is beside x_0, which is taken off here, in float64,
      # and put back clipped.
      x_coef = x_coef - clip.gain * clip.x_part
      eps_factor = eps_factor + clip.gain * clip.eps_part
      more = {f'clip_{name}': jnp.asarray(getattr(clip, name), jnp.float32)
              for name in _CLIP_ARRAYS}
    found = more | {
        'index': jnp.arange(self.num_steps),
        't': jnp.asarray(self.timesteps, jnp.float32),
        'x_coef': jnp.asarray(x_coef, jnp.float32),
        'eps_factor': jnp.asarray(eps_factor, jnp.float32),
        'noise_std': jnp.asarray(self.noise_std, jnp.float32),
    }
    if self.multistep is not None:
      found |= {name: jnp.asarray(getattr(self.multistep, name), jnp.float32)
                for name in ('x_part', 'eps_part', 'weights')}
    return found
