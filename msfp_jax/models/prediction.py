"""Models that predict v or x_0, as models that predict the noise."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.models import denoiser

NOISE, VELOCITY, DATA = KINDS = ('eps', 'v', 'x0')


class AsNoise(nn.Module):
  """A model of v or of x_0, turned into one of the noise eps.

  With a = sqrt(alphabar_t) and s = sqrt(1 - alphabar_t), x_t = a x_0 + s eps
  and v = a eps - s x_0 (Salimans and Ho 2022), so

      eps = a v + s x_t          eps = (x_t - a x_0) / s

  What is calibrated, distilled and sampled is then the noise, as of any other
  model. Parameters and layer names are the inner model's.

  Attributes:
    raw: a model of (x, t, *conditions), t being steps of its schedule, whole
      or between two. Of a t that the schedule does not have all is NaN.
    predicts: 'v' or 'x0'.
    alphas_cumprod: alphabar_t of the schedule that it was trained on, `[T]`,
      each in (0, 1).
  """

  # Not called as that of other wrappers: modules of one scope need names of
  # their own.
  raw: nn.Module
  predicts: str
  alphas_cumprod: tuple[float, ...]

  def setup(self):
    # The UNet's parameters and layer names stay as they are, without a prefix.
    nn.share_scope(self, self.raw)

  def __post_init__(self):
    if self.predicts not in (VELOCITY, DATA):
      raise ValueError(f'predicts={self.predicts!r}: must be {VELOCITY!r} or '
                       f'{DATA!r}; models of the noise stay as they are')
    # Read from files, where a tuple is a list; linen's attributes are hashed.
    bar = np.asarray(self.alphas_cumprod, np.float64)
    if bar.ndim != 1 or not len(bar) or not ((0 < bar) & (bar < 1)).all():
      raise ValueError('alphas_cumprod must be [T] numbers in (0, 1)')
    self.alphas_cumprod = tuple(bar.tolist())
    super().__post_init__()

  @property
  def inner(self) -> nn.Module:
    """`raw`, by the name that it has in all wrappers."""
    return self.raw

  @property
  def sample_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of what it denoises."""
    return self.raw.sample_shape

  @property
  def conditions(self) -> tuple[denoiser.Condition, ...]:
    """Those of the inner model."""
    return self.raw.conditions

  def __call__(self, x: jax.Array, t: jax.Array, *conditions: jax.Array,
               **named: Any) -> jax.Array:
    predicted = self.raw(x, t, *conditions, **named)
    # In float64, as 1 - alphabar cancels near t = 0; between two steps both
    # are on a line, so that they still add up to 1.
    bar = np.asarray(self.alphas_cumprod, np.float64)
    at = lambda table: jnp.sqrt(_between(table, t)).astype(
        x.dtype)[:, None, None, None]
    signal, sigma = at(bar), at(1 - bar)
    if self.predicts == VELOCITY:
      return signal * predicted + sigma * x
    return (x - signal * predicted) / sigma


def check_plan(model: nn.Module, plan: Any) -> None:
  """Refuses a plan that leaves the schedule of a model of v or x_0.

  Args:
    model: of this package or not; wrappers have what they wrap as `inner`.
    plan: with `timesteps`.

  Raises:
    ValueError: it visits steps that the model's schedule does not have, of
      which all it would predict is NaN.
  """
  while model is not None:
    if isinstance(model, AsNoise):
      last, visited = len(model.alphas_cumprod) - 1, np.asarray(plan.timesteps)
      if visited.min() < 0 or visited.max() > last:
        raise ValueError(
            f'the plan visits t = {visited.min():g} to {visited.max():g}, and '
            f'this model of {model.predicts} has a schedule of 0 to {last}: '
            'make the plan on its own schedule')
    model = getattr(model, 'inner', None)


def _between(table: np.ndarray, t: jax.Array) -> jax.Array:
  """The table `[T]` at real positions `[B]`, float32; NaN outside of it."""
  found = jnp.interp(t.astype(jnp.float32), np.arange(len(table)), table)
  return jnp.where((t >= 0) & (t <= len(table) - 1), found, jnp.nan)
