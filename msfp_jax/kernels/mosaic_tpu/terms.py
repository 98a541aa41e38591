"""The epilogue's rows and columns as a TPU kernel is handed them."""

from collections.abc import Callable
import dataclasses

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from msfp_jax.kernels.epilogue import Columns
from msfp_jax.kernels.epilogue import Rows

# Rows that are there become the last axis of one array and columns the first
# of another, so that a kernel has two inputs more, or none:
#
#   rows [M, 2]    (scale, total)     a block's slice [:, i] lies across
#   columns [1, N] (offset)           sublanes, [i, :] across lanes, as it is
#                                     multiplied with the sums [M, N]
#
# In memory the rows take 128 lanes, 512 bytes a row, less than most x.


@dataclasses.dataclass(frozen=True)
class Terms:
  """Which rows and columns there are, by name."""

  rows: tuple[str, ...]
  columns: tuple[str, ...]

  @classmethod
  def of(cls, rows: Rows, columns: Columns) -> 'Terms':
    present = lambda parts: tuple(
        name for name, part in parts._asdict().items() if part is not None)
    return cls(present(rows), present(columns))

  def arrays(self, rows: Rows, columns: Columns) -> list[jax.Array]:
    """Rows `[..., R]` and columns `[C, N]`, of those that there are any."""
    stack = lambda parts, names, axis: [jnp.stack(
        [getattr(parts, name) for name in names], axis)] if names else []
    return [*stack(rows, self.rows, -1), *stack(columns, self.columns, 0)]

  def specs(self, rows: Callable[[int], pl.BlockSpec],
            columns: Callable[[int], pl.BlockSpec]) -> list[pl.BlockSpec]:
    """Specs for `arrays`, made of the number of parts."""
    return [spec(len(names)) for spec, names in (
        (rows, self.rows), (columns, self.columns)) if names]

  def read(self, *refs) -> tuple[Rows, Columns]:
    """In a kernel: blocks of `arrays` as `[M, 1]` and `[1, N]`."""
    refs, rows, columns = list(refs), Rows(), Columns()
    if self.rows:
      ref = refs.pop(0)
      whole = ref[...].reshape(ref.shape[-2:])
      rows = Rows(**{name: whole[:, i:i + 1]
                     for i, name in enumerate(self.rows)})
    if self.columns:
      whole = refs.pop(0)[...]
      columns = Columns(**{name: whole[i:i + 1]
                           for i, name in enumerate(self.columns)})
    return rows, columns
