"""Blocks of other sizes, for the cases in which Hopper's kernel does worst.

The winners are rows for the table that the kernel reads
(msfp_jax/kernels/mosaic_gpu/measured.py), printed as they are to stand there.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import importlib.metadata
from typing import Any

import jax

from benchmarks import hopper_cases
from benchmarks.hopper_cases import Case
from benchmarks.hopper_cases import Method
from msfp_jax.kernels import slower
from msfp_jax.kernels.mosaic_gpu import blocks as blocks_lib
from msfp_jax.kernels.mosaic_gpu import measured

WORST = 3  # cases that are swept
_DEEPER, _OTHERS = 2, 3  # blocks beside the chosen ones: other depths, others
# What is less is noise, and no reason to leave the choice of the formula.
GAIN = 1.03

Row = Mapping[str, Any]


def there() -> dict[str, str]:
  """The card and the software, as rows of tables name them."""
  versions = [f'{name} {importlib.metadata.version(name)}'
              for name in ('jax', 'jaxlib')]
  return {'device': jax.devices()[0].device_kind,
          'versions': ', '.join(versions)}


def worst(cases: Iterable[Case], rows: Mapping[str, Sequence[Row]],
          count: int = WORST) -> list[Case]:
  """The cases in which the kernel is worst against XLA's bf16, worst first.

  Args:
    cases: to choose from.
    rows: of each that was measured, by its name, as hopper.run_case has them.
    count: of cases; those without a right result of both have no ratio, and
      are not chosen.
  """
  found = []
  for case in cases:
    for row in rows.get(case.name, ()):
      if (row['method'] == hopper_cases.of_kernel(case).name
          and row.get('us') and row.get('bf16_us') and 'note' not in row):
        found.append((row['bf16_us'] / row['us'], case.name, case))
  return [case for *_, case in sorted(found, key=lambda f: f[:2])[:count]]


def blocks(case: Case) -> list[blocks_lib.Blocks]:
  """The blocks that are tried: first the formula's choice, then others."""
  # All compile for an H200. Of the 66 of all cases 5, none of them chosen
  # by the formula, spill up to 4 registers: times tell whether that matters.
  work = hopper_cases.work(case)
  chosen, *others = blocks_lib.ranked(work)
  fits = lambda b: blocks_lib.why_not(
      b, work.row_length, work.taps, work.out_dtype, work.groups) is None
  dtype = 'float32' if chosen.split > 1 else work.out_dtype
  deeper = (dataclasses.replace(
      chosen, depth=depth, stages=blocks_lib.most_stages(
          chosen.rows, depth, dtype, work.groups))
            for depth in blocks_lib.DEPTHS if depth != chosen.depth)
  return [chosen, *[b for b in deeper if fits(b)][:_DEEPER],
          *others[:_OTHERS]]


def method(case: Case, blocks: blocks_lib.Blocks) -> Method:
  """The kernel with these blocks."""
  kernel = hopper_cases.of_kernel(case)
  return dataclasses.replace(
      kernel, name=name(blocks),
      function=functools.partial(kernel.function, blocks=blocks))


def name(blocks: blocks_lib.Blocks) -> str:
  """Of a row, for people."""
  return (f'{blocks.rows}x{blocks.depth}, {blocks.stages} stages, '
          f'split {blocks.split}')


def winner(case: Case, rows: Mapping[blocks_lib.Blocks, Row]
           ) -> measured.Tuned | None:
  """The row of the table that a case has earned, if any.

  Args:
    case: that was swept.
    rows: measured ones by their blocks, each with what `there` says; only
      right results of the card and the software of the chosen blocks count.
  """
  chosen = rows.get(blocks(case)[0])
  if not chosen or 'note' in chosen:
    return None
  same = {cut: row for cut, row in rows.items() if 'note' not in row and all(
      row[key] == chosen[key] for key in ('device', 'versions'))}
  best = min(same, key=lambda cut: same[cut]['us'])
  speedup = chosen['us'] / same[best]['us']
  if speedup < GAIN:
    return None
  return measured.Tuned(hopper_cases.work(case), best, chosen['device'],
                        chosen['versions'], round(speedup, 2))


def table(swept: Mapping[Case, Mapping[blocks_lib.Blocks, Row]]
          ) -> Iterator[str]:
  """Lines that show what was measured of every case, a row for each try."""
  yield '| case | blocks | us | times faster than chosen | note |'
  yield '|---|---|---|---|---|'
  for case, rows in swept.items():
    base = rows.get(blocks(case)[0], {}).get('us')
    for cut, row in rows.items():
      us = row.get('us')
      ratio = f'{base / us:.2f}' if base and us and 'note' not in row else ''
      yield (f'| {case.name} | {name(cut)} | {us or 0:.1f} | {ratio} | '
             f'{row.get("note", "")} |')


# How the file of the tables names what its rows are made of.
_PREFIXES = {measured.__name__: '', slower.__name__: 'slower.',
             blocks_lib.__name__: 'blocks_lib.'}


def literal(rows: Sequence[Any]) -> str:
  """Rows of a table in Python, as measured.py would have them."""
  if not rows:
    return '()'
  return '(\n' + ''.join(f'    {_written(row, 4)},\n' for row in rows) + ')'


def _written(value: Any, indent: int) -> str:
  if not dataclasses.is_dataclass(value):
    return repr(value)
  kind = type(value)
  call = _PREFIXES[kind.__module__] + kind.__name__
  parts = [f'{field.name}={_written(getattr(value, field.name), indent + 4)}'
           for field in dataclasses.fields(value)
           if getattr(value, field.name) != field.default]
  line = f'{call}({", ".join(parts)})'
  if indent + len(line) < 70 and '\n' not in line:
    return line
  inner = ',\n'.join(' ' * (indent + 4) + part for part in parts)
  return f'{call}(\n{inner})'
