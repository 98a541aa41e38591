"""Random conditions, such as labels, for the samples of conditional models."""

from collections.abc import Callable

import jax

# (key, number) -> what the model takes after x and t, each with that number
# of rows.
Draw = Callable[[jax.Array, int], tuple[jax.Array, ...]]


def none(key: jax.Array, number: int) -> tuple[jax.Array, ...]:
  """Draws for an unconditional model: no conditions."""
  del key, number
  return ()


def classes(count: int) -> Draw:
  """Labels below `count`, each equally likely."""
  return lambda key, number: (jax.random.randint(key, (number,), 0, count),)
