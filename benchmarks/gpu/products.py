"""Stage kernels: Hopper's kernels by benchmarks/hopper, a case at a time.

The claims of hopper_checks first, then each case against XLA and against the
limits that this device showed in this call. Each is a measurement of its own,
so that a kernel that takes the process with it costs one case.
"""

import dataclasses
import itertools
from typing import Any
from unittest import mock

from absl import app

from benchmarks import hopper
from benchmarks import hopper_cases
from benchmarks import hopper_checks
from benchmarks import machine
from benchmarks.gpu import arguments
from benchmarks.gpu import record as record_lib

# On a CPU, which has no kernels: XLA's ways alone.
_TOYS = (hopper_cases.Case('toy', 16, 64, 64),
         hopper_cases.Case('toy conv', 1, 16, 16, 8))
_LEAST = 25.0  # seconds, of a case


def claims() -> dict[str, bool]:
  """Whether the kernels' arithmetic is what docs/kernels.md says."""
  return {claim: bool(holds) for claim, holds in hopper_checks.check()}


def rows(case: hopper_cases.Case, limits: dict[str, Any] | None
         ) -> list[dict[str, Any]]:
  """All ways to compute a case; errors are notes.

  Raises:
    RuntimeError: the device answered no more after one of them.
  """
  roofline = limits and (limits['flops']['bf16'], limits['flops']['int8'],
                         limits['bandwidth'])
  found = list(hopper.run_case(case, roofline))
  if not record_lib.answers():
    raise RuntimeError(f'it ended with {[row.get("note") for row in found]}')
  return found


def _methods_of_xla(case: hopper_cases.Case):
  # They come first, and of the others toys have none.
  return itertools.takewhile(lambda m: not m.packed, _all_methods(case))


_all_methods = hopper_cases.methods


def run(record: record_lib.Record, cases, dry: bool) -> int:
  """Measures all cases; returns the exit status."""
  limits = None
  if not dry:
    limits = record.measure(
        'limits', lambda: dataclasses.asdict(machine.measure()))
    record.measure('claims', claims)
  for case in cases:
    record.measure(case.name, lambda case=case: rows(case, limits),
                   least=0 if dry else _LEAST)
  return record.status(
      [*(() if dry else ('limits', 'claims')), *(c.name for c in cases)])


def main(unused_argv) -> None:
  record = record_lib.Record(arguments.folder(), arguments.SECONDS.value)
  if arguments.DRY.value:
    with mock.patch.object(hopper_cases, 'methods', _methods_of_xla):
      raise SystemExit(run(record, _TOYS, dry=True))
  raise SystemExit(run(record, hopper_cases.CASES, dry=False))


if __name__ == '__main__':
  app.run(main)
