"""Rotary position embedding over several axes (Su et al. 2021)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Table(NamedTuple):
  """The angles by which the pairs of channels of every token are turned.

  Attributes:
    cos: float32 `[N, D / 2]`.
    sin: likewise.
  """

  cos: jax.Array
  sin: jax.Array


def joint_positions(text: int, rows: int, columns: int) -> np.ndarray:
  """Positions of a sequence of text, then an image by rows.

  Args:
    text: number of its tokens, all of which stand at the origin: what orders
      them is in their embedding.
    rows: of the image's tokens.
    columns: likewise.

  Returns:
    int64 `[text + rows * columns, 3]`: 0, row, column.
  """
  found = np.zeros((text + rows * columns, 3), np.int64)
  found[text:, 1:] = np.indices((rows, columns)).reshape(2, -1).T
  return found


def make_table(positions: np.ndarray, dims: Sequence[int],
               theta: float = 10000.0) -> Table:
  """The table of the angles position * theta^(-2 k / dim).

  Args:
    positions: `[N, axes]`.
    dims: how many of a head's channels tell each axis; even.
    theta: the base of the frequencies.
  """
  # In float64, as a float32 frequency times a position of some hundreds is off
  # by more than what a product loses.
  angles = np.concatenate([
      np.outer(positions[:, axis], theta ** (-np.arange(0, dim, 2) / dim))
      for axis, dim in enumerate(dims)], axis=-1)
  # Of JAX: a view of a NumPy array would be a constant of its own in every
  # block, 2 MB each.
  return Table(jnp.asarray(np.cos(angles), jnp.float32),
               jnp.asarray(np.sin(angles), jnp.float32))


def rotate(x: jax.Array, table: Table) -> jax.Array:
  """Turns each pair of neighbouring channels by its token's angle.

  Args:
    x: queries or keys, `[B, N, heads, D]`.
    table: of N tokens and D channels.

  Returns:
    Like x, turned in float32.
  """
  # The pairs are channels (0, 1), (2, 3), ...; other models pair k with
  # k + D / 2.
  even, odd = x[..., ::2], x[..., 1::2]
  cos, sin = table.cos[:, None], table.sin[:, None]  # the same for all heads
  return jnp.stack([even * cos - odd * sin, odd * cos + even * sin],
                   axis=-1).reshape(x.shape).astype(x.dtype)
