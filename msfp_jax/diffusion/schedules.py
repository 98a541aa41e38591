"""Forward processes: noise schedules, in NumPy float64, and flow matching.

Timesteps of a noise schedule count from 0 (least noise) to T - 1; those of a
flow are real numbers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.base import arguments


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
  """The variances of the forward process.

  Attributes:
    betas: float64 `[T]`, each in (0, 1).
  """

  betas: np.ndarray

  def __post_init__(self):
    betas = np.asarray(self.betas, np.float64)
    if betas.ndim != 1 or not len(betas):
      raise ValueError(f'betas must be [T] with T > 0, got {betas.shape}')
    if not np.all((betas > 0) & (betas < 1)):
      raise ValueError(
          'betas must lie in (0, 1), got '
          f'[{betas.min():.4g}, {betas.max():.4g}]; check the schedule')
    object.__setattr__(self, 'betas', betas)

  @property
  def num_train_steps(self) -> int:
    return len(self.betas)

  @property
  def alphas(self) -> np.ndarray:
    return 1.0 - self.betas

  @property
  def alphas_cumprod(self) -> np.ndarray:
    """alphabar_t, float64 `[T]`, falling."""
    return np.cumprod(self.alphas)


@dataclasses.dataclass(frozen=True)
class FlowSchedule:
  """The straight way from data to noise: flow matching, rectified flow.

      x = (1 - sigma) x_0 + sigma noise,    sigma from 0 (data) to 1 (noise)

  A model predicts the velocity along it, dx / dsigma = noise - x_0. Sources:
  Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv 2209.03003.

  Attributes:
    num_train_steps: T >= 1; a model is given t = T sigma. 1 for models that
      take sigma itself, as FLUX does; 1000 for those that were made for the
      timesteps of a noise schedule, as the UNets here.
  """

  num_train_steps: int = 1

  def __post_init__(self):
    allowed, words = arguments.COUNT
    if not allowed(self.num_train_steps):
      raise ValueError(f'num_train_steps={self.num_train_steps!r}: must be '
                       f'{words}, the t of pure noise')


# What a model may have been trained on.
Schedule = NoiseSchedule | FlowSchedule


def linear(num_train_steps: int, beta_start: float,
           beta_end: float) -> NoiseSchedule:
  """Betas linear in t (DDPM: 1e-4 .. 0.02 over 1000)."""
  return NoiseSchedule(np.linspace(beta_start, beta_end, num_train_steps))


def scaled_linear(num_train_steps: int, beta_start: float,
                  beta_end: float) -> NoiseSchedule:
  """Square roots of the betas linear in t (latent diffusion's "linear")."""
  return NoiseSchedule(
      np.linspace(beta_start**0.5, beta_end**0.5, num_train_steps)**2)


def cosine(num_train_steps: int, offset: float = 0.008,
           max_beta: float = 0.999) -> NoiseSchedule:
  """Nichol and Dhariwal 2021, eq. 17: alphabar a squared cosine of t."""
  # Capped, as alphabar reaches 0 at the end, and beta would be 1 there.
  grid = np.arange(num_train_steps + 1) / num_train_steps
  bar = np.cos((grid + offset) / (1 + offset) * np.pi / 2)**2
  return NoiseSchedule(np.minimum(1 - bar[1:] / bar[:-1], max_beta))


_SCHEDULES = {
    'linear': linear,
    'scaled_linear': scaled_linear,
    'cosine': lambda beta_start=None, beta_end=None, **options: cosine(
        **options),
    'flow': lambda beta_start=None, beta_end=None, **options: FlowSchedule(
        **options),
}
# Those that have no betas to choose.
WITHOUT_BETAS = ('cosine', 'flow')


_RULES = {'num_train_steps': arguments.COUNT} | dict.fromkeys(
    ('beta_start', 'beta_end'), arguments.or_none(arguments.NUMBER)) | {
        'offset': arguments.RATE, 'max_beta': arguments.POSITIVE}


def make_schedule(name: str, **options) -> Schedule:
  """The schedule `name`: 'linear', 'scaled_linear', 'cosine' or 'flow'.

  'cosine' and 'flow' have no betas to choose, and ignore `beta_start` and
  `beta_end`.
  """
  if name not in _SCHEDULES:
    raise ValueError(
        f'schedule {name!r}: must be one of {sorted(_SCHEDULES)}')
  arguments.check_options(options, _RULES)
  return _SCHEDULES[name](**options)


def add_noise(schedule: Schedule, x0: jax.Array, noise: jax.Array,
              t: jax.Array) -> jax.Array:
  """x_t = sqrt(alphabar_t) x_0 + sqrt(1 - alphabar_t) noise (DDPM eq. 4).

  Of a flow it is (1 - sigma) x_0 + sigma noise, with sigma = t / T.

  Args:
    schedule: the schedule.
    x0: images `[B, H, W, C]`.
    noise: standard normal, like x0.
    t: timesteps `[B]`, int; of a flow real numbers from 0 to T.

  Raises:
    ValueError: t is no array of integers: a noise schedule has no values
      between.
  """
  if isinstance(schedule, FlowSchedule):
    level = (jnp.asarray(t, x0.dtype) / schedule.num_train_steps)[
        :, None, None, None]
    return (1 - level) * x0 + level * noise
  if not jnp.issubdtype(jnp.result_type(t), jnp.integer):
    raise ValueError(f'add_noise: timesteps are {jnp.result_type(t)}, and must '
                     'be integers, steps of the schedule')
  # The marginal of t steps of noise, at once; [T] looked up at t, for [B, H, W,
  # C]. Rounded to float32 after the roots.
  bar = schedule.alphas_cumprod
  signal = jnp.asarray(np.sqrt(bar), x0.dtype)[t][:, None, None, None]
  sigma = jnp.asarray(np.sqrt(1 - bar), x0.dtype)[t][:, None, None, None]
  return signal * x0 + sigma * noise
