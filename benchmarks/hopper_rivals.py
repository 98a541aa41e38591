"""Where XLA computes a packed layer faster than Hopper's kernel does.

What a kernel competes with is XLA's way to compute the same packed layer, which
decodes the weights first. XLA's products of weights that were decoded before
take less than that: where the kernel is not slower than these, it has won. The
others are measured as `kernels.run` would run them, by either way. What was
lost makes rows for a table (msfp_jax/kernels/mosaic_gpu/measured.py), by which
`choice.pick` leaves it to XLA.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import hopper_cases
from benchmarks import hopper_measure
from benchmarks import hopper_sweep
from benchmarks.hopper_cases import Case
from msfp_jax import kernels
from msfp_jax.kernels import slower
from msfp_jax.kernels.mosaic_gpu import blocks as blocks_lib
from msfp_jax.quant import geometry as geometry_lib
from msfp_jax.quant.block import Block
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.quantizers import Static
from msfp_jax.quant.suppress import Suppressed

WAYS = ('xla', 'mosaic_gpu')
# Scales of the inputs and what else a row may bring is no kind of its own.
_OF_KINDS = {'groups', 'inputs', 'flags'}
# Of two ways that round sums alike, results differ by what bf16 rounds.
_MOST_APART = 2.0**-7


def kinds(case: Case) -> dict[str, slower.Kind]:
  """The kinds of products that a case's rows measure, by the row's name."""
  found, geometry = {}, geometry_of(case)
  for method in hopper_cases.methods(case):
    if method.packed and method.carrier == 'int8' and (
        method.more.keys() <= _OF_KINDS):
      options = getattr(method.function, 'keywords', {})
      found[method.name] = slower.Kind(
          'conv' if geometry else 'matmul', method.carrier,
          *(options.get(name, 0)
            for name in ('group', 'input_group', 'flag_group')),
          *((case.w_shape[:-2], geometry.strides) if geometry else ()))
  return found


def name(kind: slower.Kind) -> str:
  """Of a row, for people."""
  parts = {'weights': kind.group, 'inputs': kind.input_group,
           'FLAGs': kind.flag_group}
  return ', '.join(f'{part} in groups of {size}'
                   for part, size in parts.items() if size) or 'no groups'


def work(case: Case, kind: slower.Kind) -> blocks_lib.Work:
  """What the kernel cuts into blocks for `layer`."""
  return hopper_cases.work(case, kind.group, kind.input_group)


def operation(case: Case, kind: slower.Kind) -> slower.Operation:
  """What `choice.pick` calls it."""
  return slower.Operation(kind, case.pixels, case.length, case.n)


def doubtful(case: Case, rows: Sequence[Mapping[str, Any]]
             ) -> dict[slower.Kind, bool]:
  """Whether the kernel may be slower than XLA with weights decoded before.

  Args:
    case: that was measured.
    rows: of it, as hopper_measure.run_case has them.

  Returns:
    {kind: that}, of those that the kernel computed right. Where XLA did not,
    nothing says that the kernel has won.
  """
  # A row with a note is no time of this: its result is wrong, or XLA computed
  # something else.
  us = {row['method']: row['us'] for row in rows
        if row.get('us') and 'note' not in row}
  base = [us[name] for name in us if name.startswith('XLA')]
  return {kind: not base or us[name] > min(base)
          for name, kind in kinds(case).items() if name in us}


def layer(case: Case, kind: slower.Kind) -> tuple[QLayer, jax.Array]:
  """A packed layer of a case's size as the kernel reads it, and its input."""
  rng = np.random.default_rng(0)
  w = rng.standard_normal(case.w_shape, np.float32)
  x = jnp.asarray(rng.standard_normal(case.x_shape, np.float32), jnp.bfloat16)
  fmt = hopper_cases.E2M1
  groups = lambda size: Block(fmt, group=size) if size else None
  if kind.flag_group:
    weights = Suppressed(Block(hopper_cases.INT8, 'channel'),
                         group=kind.flag_group)
  else:
    weights = groups(kind.group) or Block(fmt, 'channel')
  inputs = groups(kind.input_group) or Static(fmt, np.float32(3 / fmt.max))
  weight = weights.quantize_banks(w[None]).packed()
  return kernels.prepare(
      QLayer(weight, inputs, None), 'mosaic_gpu').at(0), x


def geometry_of(case: Case) -> geometry_lib.Geometry | None:
  """Of a convolution; None for a product."""
  return geometry_lib.resolve(
      case.x_shape, case.w_shape[:-2]) if case.size else None


def compare(case: Case, kind: slower.Kind, ways: Sequence[str] = WAYS,
            least: float = hopper_measure.LEAST) -> dict[str, Any]:
  """Times a layer by XLA and by the kernel: 'us' of each, and 'slowdown'.

  Args:
    case: its size.
    kind: its scales.
    ways: the implementations, first XLA's.
    least: as for `hopper_measure.seconds`.

  Raises:
    ValueError: their results differ.
  """
  packed, x = layer(case, kind)
  geometry = geometry_of(case)
  size = sum(a.nbytes for a in jax.tree.leaves((packed, x)))
  size += 2 * math.prod(case.y_shape)
  us, results = {}, []
  for way in ways:
    run = lambda packed, x, way=way: kernels.run(
        packed, x, geometry, implementation=way)
    compiled, copies = hopper_measure.of_copies(run, (packed, x), size)
    results.append(np.asarray(compiled(copies)[-1], np.float32))
    us[way] = hopper_measure.seconds(compiled, copies, least) * 1e6
  apart = float(np.linalg.norm(results[1] - results[0])
                / np.linalg.norm(results[0]))
  if not apart <= _MOST_APART:
    raise ValueError(f'{ways} differ by {apart:.2g} of {case.name}, {kind}')
  return {'us': us, 'slowdown': us[ways[1]] / us[ways[0]],
          'apart': apart, **hopper_sweep.there()}


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What is known of an operation.

  Attributes:
    operation: of it.
    lost: whether XLA was faster, beyond noise; None: not known.
    compared: what `compare` said, where it was asked.
  """

  operation: slower.Operation
  lost: bool | None
  compared: Mapping[str, Any] | None = None

  @classmethod
  def of(cls, case: Case, kind: slower.Kind, doubted: bool,
         compared: Mapping[str, Any] | None) -> 'Outcome':
    """From what `doubtful` and `compare` said; None: not compared yet."""
    lost = None if doubted else False
    if compared is not None:
      lost = compared['slowdown'] >= hopper_sweep.GAIN
    return cls(operation(case, kind), lost, compared)

  @property
  def where(self) -> tuple[str, str]:
    """The card and the software that compared."""
    return self.compared['device'], self.compared['versions']


def rows(outcomes: Iterable[Outcome]) -> list[slower.Slower]:
  """The table's rows that cover what was lost, and nothing that was not.

  Of a kind, from some number of rows on all may have been lost, or up to one:
  that is one row. What was lost in between is a row each, of its sizes alone.
  """
  outcomes, found = list(outcomes), []
  for where in sorted({one.where for one in outcomes if one.lost}):
    # What another card has lost is not known of this one.
    here = [dataclasses.replace(one, lost=None)
            if one.lost and one.where != where else one for one in outcomes]
    key = lambda one: dataclasses.astuple(one.operation.kind)
    for _, same in itertools.groupby(sorted(here, key=key), key):
      found += _rows_of_kind(list(same), where)
  return found


def _rows_of_kind(outcomes, where):
  outcomes = sorted(outcomes, key=lambda one: -one.operation.rows)

  def row(of, least, most, length=None, channels=None):
    slowdown = min(one.compared['slowdown'] for one in of)
    return slower.Slower(of[0].operation.kind, least, most, length, channels,
                         *where, math.floor(100 * slowdown) / 100)

  many = _lost_first(outcomes)
  few = _lost_first(outcomes[len(many):][::-1])
  if many:
    yield row(many, many[-1].operation.rows, None)
  if few:
    yield row(few, 0, few[-1].operation.rows)
  for one in outcomes[len(many):len(outcomes) - len(few)]:
    if one.lost:
      size = one.operation
      yield row([one], size.rows, size.rows, size.length, size.channels)


def _lost_first(outcomes: Sequence[Outcome]) -> list[Outcome]:
  """Those at the beginning that were lost, of all with as many rows."""
  found = []
  for _, same in itertools.groupby(outcomes, lambda one: one.operation.rows):
    same = list(same)
    if not all(one.lost for one in same):
      break
    found += same
  return found
