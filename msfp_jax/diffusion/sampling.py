"""Running a sampler: the whole trajectory in one `lax.scan`.

The step of DDPM and of DDIM is affine in the sample, the predicted noise and
the fresh noise, so a sampler is three coefficients a step: a `SamplerPlan`.
Multistep methods (PLMS, DPM-Solver++) are affine too, in what was predicted at
the steps before as well: a `Multistep` says how.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

_ARRAYS = ('timesteps', 'x_coef', 'eps_factor', 'noise_std')
_CLIP_ARRAYS = ('x_part', 'eps_part', 'gain')
# (x [B, H, W, C], t [B] float32, position in the plan) -> noise like x.
NoiseFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# Likewise of a model that remembers: (x, t, position in the plan, memory) ->
# noise like x, memory.
RememberingFn = Callable[[jax.Array, jax.Array, jax.Array, Any],
                         tuple[jax.Array, Any]]


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


@flax.struct.dataclass
class Position:
  """Where a trajectory stands: the sample, and what later steps need.

  Attributes:
    x: `[B, H, W, C]`.
    past: earlier predictions, the latest first, `[K - 1, B, H, W, C]`; None
      for samplers of one step.
  """

  x: jax.Array
  past: jax.Array | None = None


def start(plan: SamplerPlan, x: jax.Array) -> Position:
  """The position before the first step."""
  if plan.multistep is None:
    return Position(x)
  length = plan.multistep.weights.shape[1] - 1
  return Position(x, jnp.zeros((length, *x.shape), x.dtype))


def check_prediction(noisy: tuple[int, ...], predicted: tuple[int, ...]
                     ) -> None:
  """Looks at the shape of what a model makes of a sample.

  Args:
    noisy: `[..., C]` of what it is given.
    predicted: of what it returns.

  Raises:
    ValueError: they differ, in words for the models that are known to.
  """
  if predicted == noisy:
    return
  if predicted[:-1] != noisy[:-1]:
    raise ValueError(f'the model makes {list(predicted)} of {list(noisy)}: a '
                     'sampler needs the noise of every element')
  taken, made = noisy[-1], predicted[-1]
  why = 'a sampler needs the noise of every channel, and no more'
  if made == 2 * taken:
    why = ('it predicts a variance too, as trained with learn_sigma, and the '
           f'samplers here use none; cut its last layer to the first {taken} '
           'channels, the noise')
  elif made < taken:
    why = (f'{taken - made} channels are a condition, such as the mask and the '
           'picture of inpainting or the small picture of super-resolution, '
           'and the samplers here have none to give; take a model of the noise '
           'alone')
  raise ValueError(f'the model takes {taken} channels and makes {made}: {why}')


def advance(plan: SamplerPlan, step: dict[str, jax.Array], position: Position,
            eps: jax.Array, key: jax.Array | None) -> Position:
  """One step of the sampler; `step` is one entry of `plan.steps()`.

  Raises:
    ValueError: eps is not like x; or noise is to be added, and there is no key.
  """
  x, past = position.x, position.past
  check_prediction(x.shape, eps.shape)
  if plan.multistep is None:
    new = step['x_coef'] * x - step['eps_factor'] * eps
    if plan.clip is not None:
      x0 = step['clip_x_part'] * x + step['clip_eps_part'] * eps
      new += step['clip_gain'] * jnp.clip(x0, -plan.clip.limit, plan.clip.limit)
  else:
    # The history has a place for each of the K - 1 steps before, the latest
    # first; in the beginning these are zeros, whose weights are 0 as well.
    prediction = step['x_part'] * x + step['eps_part'] * eps
    past = jnp.concatenate([prediction[None], past])
    new = step['x_coef'] * x + jnp.tensordot(step['weights'], past, 1)
    past = past[:-1]
  if plan.noise_std.any():
    if key is None:
      raise ValueError('this sampler adds noise at every step: pass a key')
    # A step's noise depends on the key and on its number alone.
    z = jax.random.normal(jax.random.fold_in(key, step['index']), x.shape)
    new += step['noise_std'] * z
  return Position(new, past)


def sample(eps_fn: NoiseFn | RememberingFn, plan: SamplerPlan, x: jax.Array,
           key: jax.Array | None = None, memory: Any = None) -> jax.Array:
  """Samples from noise.

  Args:
    eps_fn: predicts the noise: (x, t `[B]`, position in the plan) -> eps.
    plan: the sampler.
    x: standard normal noise `[B, H, W, C]`.
    key: for samplers that add noise; unused by DDIM with eta = 0.
    memory: of an eps_fn that remembers, see `walk`.

  Returns:
    Samples like x, nominally in [-1, 1], not clipped.
  """
  return trajectory(eps_fn, plan, x, key, memory=memory)[0]


def trajectory(eps_fn: NoiseFn | RememberingFn, plan: SamplerPlan, x: jax.Array,
               key: jax.Array | None = None,
               visit: Callable[..., Any] = lambda x, eps, step: None,
               memory: Any = None) -> tuple[jax.Array, Any]:
  """Samples, and collects what `visit(x, eps, step)` returns on the way.

  Returns:
    The samples, and visit's results stacked along a first axis of S steps.
  """

  def body(position, step, predict):
    x = position.x
    eps = predict(x, jnp.full((x.shape[0],), step['t']), step['index'])
    return advance(plan, step, position, eps, key), visit(x, eps, step)

  final, seen = walk(body, eps_fn, plan, x, memory)
  return final.x, seen


def no_memory(eps_fn: Callable[..., tuple[jax.Array, Any]], x: jax.Array,
              *condition: Any) -> Any:
  """What a model remembers before the first step: zeros.

  Args:
    eps_fn: a `RememberingFn`, which may take conditions as well; {} is to it
      what there is to remember before anything was.
    x: `[B, H, W, C]`; its shape counts.
    *condition: likewise.
  """
  _, shapes = jax.eval_shape(
      lambda x, *condition: eps_fn(x, jnp.zeros(len(x)), 0, {}, *condition),
      x, *condition)
  return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), shapes)


def walk(body: Callable[..., tuple[Position, Any]],
         eps_fn: NoiseFn | RememberingFn, plan: SamplerPlan, x: jax.Array,
         memory: Any = None) -> tuple[Position, Any]:
  """Takes a plan's steps.

  Args:
    body: (position, one entry of `plan.steps()`, eps_fn without memory) -> the
      next position, and what is collected.
    eps_fn: predicts the noise.
    plan: the sampler.
    x: standard normal noise `[B, H, W, C]`.
    memory: that eps_fn has before the first step; None for one that remembers
      nothing. The first step is then taken twice: what it leaves in the memory
      the first time counts, and neither where it leads nor what is collected.

  Returns:
    The last position, and what is collected, with a first axis of S steps.
  """
  steps = plan.steps()
  if memory is None:
    return jax.lax.scan(
        lambda position, step: body(position, step, eps_fn), start(plan, x),
        steps)

  # The same program for both first steps: one of its own would have the whole
  # model compiled twice.
  #
  #   taken     0    0    1    2   ..
  #   position  x_T  x_T  x'   x'' ..
  #   memory    m    m'   m''  ..
  def remembering(carry, step):
    position, memory = carry
    step, again = step
    known = [memory]

    def predict(x, t, index):
      eps, known[0] = eps_fn(x, t, index, memory)
      return eps

    new, found = body(position, step, predict)
    new = jax.tree.map(
        lambda old, new: jnp.where(again, old, new), position, new)
    return (new, known[0]), found

  twice = jax.tree.map(lambda a: jnp.concatenate([a[:1], a]), steps)
  again = jnp.arange(plan.num_steps + 1) == 0
  (final, _), found = jax.lax.scan(
      remembering, (start(plan, x), memory), (twice, again))
  return final, jax.tree.map(lambda a: a[1:], found)
