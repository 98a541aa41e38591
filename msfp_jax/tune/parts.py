"""Gradient accumulation: a batch in parts, one after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from msfp_jax.base import devices


class IndivisibleError(ValueError):
  """A step cannot be computed in parts of its batch."""


def check(where: str, batch_size: int, accumulate: int) -> None:
  """Raises ValueError unless a batch has that many parts of equal size.

  Args:
    where: the fields belong to, such as 'config.finetune'.
    batch_size: rows in all.
    accumulate: parts.
  """
  if batch_size % accumulate:
    raise ValueError(f'{where}.accumulate={accumulate}: must divide '
                     f'batch_size={batch_size}')


# part of a batch -> (what is averaged over the parts, what has a row for each
# of its rows).
Work = Callable[[Any], tuple[Any, Any]]


def run(work: Work, batch: Any, num_parts: int, layout: devices.Layout
        ) -> tuple[Any, Any]:
  """work(batch) in the memory of one part, up to roundings.

  Args:
    work: on a batch of any size; what it averages must be means over its rows,
      such as a loss and its gradients.
    batch: arrays `[B, ...]`; B is a multiple of num_parts.
    num_parts: 1 computes all at once.
    layout: of the batch; each device keeps the rows that it has.

  Returns:
    The means over all rows, and the rows in order.
  """
  if num_parts == 1:
    return work(batch)
  # Row i goes to part i % num_parts: so every device has as many rows of each
  # part, where it has some of the batch, and none is sent anywhere.
  #
  #   device     0 0 0 0 1 1 1 1
  #   part       0 1 0 1 0 1 0 1
  parts = jax.tree.map(lambda x: layout.constrain(
      jnp.moveaxis(x.reshape(-1, num_parts, *x.shape[1:]), 1, 0),
      layout.batch_second), batch)
  means, _ = jax.eval_shape(work, jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), means)

  def body(total, part):
    means, rows = work(part)
    return jax.tree.map(jnp.add, total, means), rows

  total, rows = jax.lax.scan(body, zeros, parts)
  return (jax.tree.map(lambda x: x / num_parts, total),
          jax.tree.map(lambda x: layout.constrain(
              jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), layout.batch),
              rows))
