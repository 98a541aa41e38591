"""Random conditions, such as labels or texts, for conditional models."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

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


def rows(tables: Sequence[jax.typing.ArrayLike]) -> Draw:
  """Rows of tables, such as embeddings of prompts, each row equally likely.

  Args:
    tables: `[P, ...]` each, a condition of the model; of an image all come
      from one row.

  Returns:
    A Draw that is a pytree of the tables: jitted functions that take it as an
    argument hold no copy of them as constants.
  """
  return jax.tree_util.Partial(_draw_rows, tuple(tables))


def as_argument(draw: Draw) -> Draw:
  """A Draw that jitted functions take as an argument, with its arrays."""
  # A Partial of one hides the arrays of the one inside: they would be constants
  # of the program, of gigabytes for the embeddings of many prompts.
  if isinstance(draw, jax.tree_util.Partial):
    return draw
  return jax.tree_util.Partial(draw)


def _draw_rows(tables, key, number):
  chosen = jax.random.randint(key, (number,), 0, len(tables[0]))
  if isinstance(chosen, jax.core.Tracer):
    return tuple(jnp.asarray(table)[chosen] for table in tables)
  # Out of NumPy's arrays, so that the rest does not go to a device.
  return tuple(jnp.asarray(table[np.asarray(chosen)]) for table in tables)
