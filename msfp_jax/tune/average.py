"""A moving average of what is trained, kept beside an optimizer's state."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class Average:
  """Attributes:
    count: int32, updates that are in it.
    params: the average.
  """

  count: jax.Array
  params: Any


def moved(average: Any, params: Any, decay: float, count: jax.Array) -> Any:
  """The average with one more set of parameters in it.

  Args:
    average: of `count` sets.
    params: the next.
    decay: reached after a warm-up of (1 + count) / (10 + count): early averages
      would be of the initial weights, which it forgets.
    count: how many there were.
  """
  decay = jnp.minimum(decay, (1.0 + count) / (10.0 + count))
  return jax.tree.map(
      lambda mean, p: mean + (1 - decay) * (p - mean), average, params)


def behind(tx: optax.GradientTransformation, decay: float
           ) -> optax.GradientTransformation:
  """The same optimizer, whose state also has the average of what it leaves.

  Args:
    tx: an optimizer.
    decay: of the average, see `moved`; 0: tx itself.
  """
  if not decay:
    return tx

  def init(params):
    # Its own arrays: a step may write over those that it is given.
    return tx.init(params), Average(
        jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

  def update(updates, state, params):
    inner, average = state
    updates, inner = tx.update(updates, inner, params)
    after = moved(average.params, optax.apply_updates(params, updates), decay,
                  average.count)
    return updates, (inner, Average(average.count + 1, after))

  return optax.GradientTransformation(init, update)


def of(params: Any, opt_state: Any) -> Any:
  """What training leaves: the average, where the optimizer's state has one.

  Args:
    params: as the last update left them.
    opt_state: of `behind`.
  """
  if (isinstance(opt_state, tuple) and len(opt_state) == 2
      and isinstance(opt_state[1], Average)):
    return opt_state[1].params
  return params
