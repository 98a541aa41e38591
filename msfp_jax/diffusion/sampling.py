"""Running a sampler: the whole trajectory in one `lax.scan`."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from msfp_jax.diffusion.plan import SamplerPlan

# (x [B, H, W, C], t [B] float32, position in the plan) -> noise like x.
NoiseFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# Likewise of a model that remembers: (x, t, position in the plan, memory) ->
# noise like x, memory.
RememberingFn = Callable[[jax.Array, jax.Array, jax.Array, Any],
                         tuple[jax.Array, Any]]


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
