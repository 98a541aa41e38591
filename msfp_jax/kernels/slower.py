"""Which products a chip's kernel is measured to lose, and XLA thus takes.

A kernel is picked wherever it is able, but for what a device has shown it to be
slower at than XLA's way to compute the same packed layer. That is data: rows of
`Slower` in a chip's folder, each with the device and the versions that measured
it. A kernel that is asked for by its name runs all the same.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Kind:
  """What products have in common that are as fast as each other, by size.

  Attributes:
    op: 'matmul' or 'conv'.
    carrier: of both operands.
    group: neighbours along the contraction that share a scale of the weights;
      0 where scales leave the sum.
    input_group: the same of the input.
    flag_group: neighbours that share a FLAG of QuaRTZ's weights; 0 without.
    window: of a convolution, its taps down and to the right: what a kernel
      lays out for it, and how XLA computes it, differ by window and strides.
    strides: of a convolution, likewise.
  """

  op: str
  carrier: str
  group: int = 0
  input_group: int = 0
  flag_group: int = 0
  window: tuple[int, ...] = ()
  strides: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Operation:
  """A product `[rows, length] x [length, channels]`, its window included.

  Attributes:
    kind: of it.
    rows: of the result, its pixels and images together.
    length: of the sums.
    channels: of the result.
  """

  kind: Kind
  rows: int
  length: int
  channels: int


def require_measured(row: Any, ratio: str) -> None:
  """Refuses a row of a table that no measurement can have had for a result.

  Args:
    row: with a `device` and its `versions`.
    ratio: the name of its field that tells how much faster the one way was
      than the other.

  Raises:
    ValueError: the ratio is not above 1, or the row does not say by what it was
      measured.
  """
  if not getattr(row, ratio) > 1:
    raise ValueError(f'{row}: a {ratio} must be above 1; leave the row out')
  if not (row.device and row.versions):
    raise ValueError(
        f'{row}: name the device and the versions that measured it')


@dataclasses.dataclass(frozen=True)
class Slower:
  """Products of a kind that XLA was measured to compute faster.

  Attributes:
    kind: of them.
    least: rows of the result at least.
    most: rows at most; None: any number.
    length: of the sums; None: any.
    channels: of the result; None: any.
    device: that measured it, as JAX names its kind; no other is meant.
    versions: of the software there.
    slowdown: how many times as long as XLA the kernel takes, the least of those
      measured: above 1.

  Raises:
    ValueError: with the words of `require_measured`.
  """

  kind: Kind
  least: int
  most: int | None
  length: int | None
  channels: int | None
  device: str
  versions: str
  slowdown: float

  def __post_init__(self):
    require_measured(self, 'slowdown')

  def holds(self, operation: Operation, device: str) -> bool:
    """Whether an operation on a device is one of these."""
    fits = lambda own, other: own is None or own == other
    return (device == self.device and operation.kind == self.kind
            and self.least <= operation.rows
            and (self.most is None or operation.rows <= self.most)
            and fits(self.length, operation.length)
            and fits(self.channels, operation.channels))


def loses(rows: Sequence[Slower], operation: Operation) -> bool:
  """Whether the default device has measured XLA to be faster."""
  device = jax.devices()[0].device_kind
  return any(row.holds(operation, device) for row in rows)
