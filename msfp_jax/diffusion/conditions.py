"""What conditional models are asked for, drawn at random."""

from collections.abc import Callable

import jax

# (key, number) -> what the model takes after x and t, each with that number
# of rows.
Draw = Callable[[jax.Array, int], tuple[jax.Array, ...]]


def none(key: jax.Array, number: int) -> tuple[jax.Array, ...]:
  """Of an unconditional model."""
  del key, number
  return ()


def classes(count: int) -> Draw:
  """Labels below `count`, each equally likely."""
  return lambda key, number: (jax.random.randint(key, (number,), 0, count),)
