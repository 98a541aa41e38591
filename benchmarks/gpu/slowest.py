"""The operations of a program that take the most time, from a profile."""

import collections
from collections.abc import Callable, Iterator
import pathlib
import tempfile
from typing import Any

import jax

# Operations that only run others, which are counted themselves.
_AROUND = ('while', 'call', 'conditional')


def operations(work: Callable[[], Any], count: int = 3) -> list[dict[str, Any]]:
  """Profiles a call; returns the `count` slowest operations.

  Args:
    work: a program that is compiled already.
    count: of operations.

  Returns:
    Rows with `operation` (XLA's name and the kernel's), `ms` of all its runs,
    `runs`, and `share` of what the device did; [] where the profiler sees no
    operation.
  """
  jax.block_until_ready(work())
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(work())
    spent, runs = collections.Counter(), collections.Counter()
    for path in pathlib.Path(folder).rglob('*.xplane.pb'):
      data = jax.profiler.ProfileData.from_file(str(path))
      for name, seconds in _events(data):
        spent[name] += seconds
        runs[name] += 1
  total = sum(spent.values())
  return [{'operation': name, 'ms': seconds * 1e3, 'runs': runs[name],
           'share': seconds / total}
          for name, seconds in spent.most_common(count) if total]


def _events(data: Any) -> Iterator[tuple[str, float]]:
  """Yields the operations of a device, else those of the host's threads."""
  planes = [p for p in data.planes if p.name.startswith('/device:')]
  for plane in planes or data.planes:
    lines = list(plane.lines)
    # Other lines sum up the same time again, by module and step.
    streams = [line for line in lines if line.name.startswith('Stream')]
    for line in streams or lines:
      for event in line.events:
        operation = dict(event.stats).get('hlo_op')
        if operation and operation.split('.')[0] in _AROUND:
          continue
        if operation and not event.name.startswith('end: '):
          same = event.name == operation
          yield (operation if same else f'{operation}: {event.name[:80]}',
                 event.duration_ns * 1e-9)
        elif planes and streams:  # copies, and what has lost its name
          yield event.name[:80], event.duration_ns * 1e-9
