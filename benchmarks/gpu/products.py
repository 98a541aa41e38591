"""Stage kernels: Hopper's kernels by benchmarks/hopper, a case at a time.

The claims of hopper_checks first, then each case against XLA and against the
limits that this device showed in this call. Then other blocks for the cases in
which the kernel does worst, and layers by XLA where the kernel may be slower:
both are printed as the rows that msfp_jax/kernels/mosaic_gpu/measured.py would
have to hold. Each is a measurement of its own, so that a kernel that takes the
process with it costs one of them.
"""

from collections.abc import Iterable, Iterator
import dataclasses
import functools
import itertools
from typing import Any

from absl import app
import jax.numpy as jnp

from benchmarks import hopper_absent
from benchmarks import hopper_cases
from benchmarks import hopper_checks
from benchmarks import hopper_measure
from benchmarks import hopper_rivals
from benchmarks import hopper_sweep
from benchmarks import machine
from benchmarks.gpu import arguments
from benchmarks.gpu import record as record_lib
from benchmarks.hopper_cases import Case
from benchmarks.hopper_cases import Method
from msfp_jax.kernels.mosaic_gpu import blocks as blocks_lib
from msfp_jax.kernels.mosaic_gpu import measured

_TOYS = (Case('toy more', 24, 64, 64, more=True),
         Case('toy conv', 1, 64, 16, 8),
         Case('toy QuaRTZ', 16, 64, 64, flag_group=16))
# Seconds without which a case, or one more of its kernels, is not begun; and
# those that cases leave for the sweep.
_LEAST, _LEAST_OF_ONE, _OF_SWEEP = 25.0, 8.0, 75.0


class Products:
  """The measurements of the stage.

  `dry`: on a CPU, which has no kernels. They are lowered, and XLA computes the
  same in their place; two ways without kernels stand for XLA and the kernel.
  """

  def __init__(self, record: record_lib.Record, cases: Iterable[Case],
               dry: bool):
    self._record = record
    self._cases = tuple(cases)
    self._dry = dry
    self._least = 0.01 if dry else hopper_measure.LEAST
    self._limits = None
    self._wanted = [case.name for case in self._cases]
    # Of the case at hand: each of its kernels meets the same numbers.
    self._drawn = functools.lru_cache(1)(hopper_cases.draw)
    self._truths = functools.lru_cache(1)(
        lambda case: hopper_measure.truths(case, self._drawn(case)))

  def run(self) -> int:
    """Measures what is missing; returns the exit status."""
    if not self._dry:
      self._limits = self._measure('limits', lambda: dataclasses.asdict(
          machine.measure()))
      self._measure('claims', claims)
    # The sweep has its time, then come the cases that were left, and with them
    # others may be the worst.
    self._time_cases(_LEAST + _OF_SWEEP)
    self._sweep()
    self._time_cases(_LEAST)
    self._sweep()
    swept = self._swept()
    print(*hopper_sweep.table(swept), sep='\n')
    won = [row for row in itertools.starmap(
        hopper_sweep.winner, swept.items()) if row]
    self._conclude('blocks', won)
    with measured.trying(*won):  # what wins with these blocks is not lost
      self._conclude('slower', hopper_rivals.rows(self._compare()))
    return self._record.status(self._wanted)

  def _measure(self, name, function, least=0.0):
    if name not in self._wanted:
      self._wanted.append(name)
    return self._record.measure(
        name, function, least=0.0 if self._dry else least)

  def _value(self, name):
    return self._record.found.get(name, {}).get('value')

  def _conclude(self, table, rows):
    written = hopper_sweep.literal(rows)
    print(f'{table.upper()} of mosaic_gpu/measured.py:\n{written}', flush=True)
    self._record.conclude(table, written)

  def _roofline(self):
    limits = self._limits
    return limits and (limits['flops']['bf16'], limits['flops']['int8'],
                       limits['bandwidth'])

  def _methods(self, case: Case) -> Iterator[Method]:
    methods = hopper_cases.methods(case)
    return (stand_in(case, method) if self._dry else method
            for method in methods)

  def _time_cases(self, least: float) -> None:
    for case in self._cases:
      self._measure(case.name, lambda case=case: self._rows(case), least)

  def _rows(self, case: Case) -> list[dict[str, Any]]:
    """All ways to compute a case; errors are notes.

    Raises:
      RuntimeError: the device answered no more after one of them.
    """
    found = list(hopper_measure.run_case(
        case, self._roofline(), self._methods(case), self._least))
    if not record_lib.answers():
      raise RuntimeError(f'it ended with {[row.get("note") for row in found]}')
    return found

  def _sweep(self) -> None:
    """Tries blocks for the cases that are the worst by now."""
    rows = {case.name: self._value(case.name) or () for case in self._cases}
    for case in hopper_sweep.worst(self._cases, rows):
      for blocks in hopper_sweep.blocks(case):
        self._measure(_tried(case, blocks),
                      functools.partial(self._try, case, blocks), _LEAST_OF_ONE)

  def _swept(self) -> dict[Case, dict[blocks_lib.Blocks, dict[str, Any]]]:
    """What blocks took, of all cases that were swept in this call or before.

    A case that later ones have pushed out of the worst keeps its winner.
    """
    found = {case: {blocks: self._value(_tried(case, blocks))
                    for blocks in hopper_sweep.blocks(case)}
             for case in self._cases}
    found = {case: {blocks: row for blocks, row in rows.items()
                    if row is not None} for case, rows in found.items()}
    return {case: rows for case, rows in found.items() if rows}

  def _try(self, case: Case, blocks: blocks_lib.Blocks) -> dict[str, Any]:
    method = hopper_sweep.method(case, blocks)
    if self._dry:
      method = stand_in(case, method)
    return hopper_measure.measure(
        case, method, self._drawn(case), self._truths(case), self._roofline(),
        self._least) | hopper_sweep.there()

  def _compare(self) -> Iterator[hopper_rivals.Outcome]:
    """Runs layers by XLA too where the kernel may be slower than that."""
    ways = ('xla', 'reference') if self._dry else hopper_rivals.WAYS
    for case in self._cases:
      known = hopper_rivals.doubtful(case, self._value(case.name) or ())
      for kind, doubted in known.items():
        # By other blocks it is another measurement.
        blocks = measured.choose(hopper_rivals.work(case, kind))
        compared = self._measure(
            f'{case.name} as a layer, {hopper_rivals.name(kind)}, '
            f'{hopper_sweep.name(blocks)}',
            functools.partial(
                hopper_rivals.compare, case, kind, ways, self._least),
            _LEAST_OF_ONE) if doubted else None
        yield hopper_rivals.Outcome.of(case, kind, doubted, compared)


def _tried(case: Case, blocks: blocks_lib.Blocks) -> str:
  """The name of a case's measurement with these blocks."""
  return f'{case.name}: {hopper_sweep.name(blocks)}'


def claims() -> dict[str, bool]:
  """Whether the kernels' arithmetic is what docs/kernels.md says."""
  return {claim: bool(holds) for claim, holds in hopper_checks.check()}


def stand_in(case: Case, method: Method) -> Method:
  """XLA's way in place of a kernel, which is lowered all the same."""
  if not method.packed:
    return method
  hopper_absent.lower(case, method)
  return Method(method.name, 'int8', functools.partial(
      hopper_cases.xla, sums=jnp.int32))


def main(unused_argv) -> None:
  record = record_lib.Record(arguments.folder(), arguments.SECONDS.value)
  dry = arguments.DRY.value
  raise SystemExit(Products(
      record, _TOYS if dry else hopper_cases.CASES, dry).run())


if __name__ == '__main__':
  app.run(main)
