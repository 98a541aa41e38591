"""What devices exchange in a compiled program, by the program's own text."""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import math
import re

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all',
         'collective-permute')
# What is not counted, and must not go unseen.
_OTHERS = ('ragged-all-to-all', 'collective-broadcast', 'send', 'recv')
# `  ROOT %name = TYPE all-reduce-start(...), attributes`. What ends with -done
# waits for what began, and exchanges nothing more.
_EXCHANGE = re.compile(
    rf' = (.*?) ({"|".join((*KINDS, *_OTHERS))})(-start)?\(')
# TPUs have sums of which each device keeps a part as a computation of its own.
_SCATTERED = re.compile(r' = (.*?) fusion\(.*\bcalls=%?all-reduce-scatter\b')
_SHAPE = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
# `%name (parameters) -> type {`, `ENTRY %name (...) -> ... {`
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.-]+) \(.*\{$')
_CALLS = re.compile(
    r'\b(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)')
_BRANCHES = re.compile(
    r'\b(?:branch|called)_computations=\{([^}]*)\}')
# Turns of a loop: as XLA says, or by its condition, `i < constant(7)`.
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r'\bcondition=%?([\w.-]+)')
_BOUND = re.compile(r' = [su]\d+\[\]\S* constant\((\d+)\)')
# Who exchanges with whom: lists of devices; of 2 groups of 4, [2,4]<=[8]; or
# by axes of a mesh, mesh['a'=2,'b'=4] {'b'}, perhaps with the order of devices.
_GROUPS = re.compile(
    r'replica_groups=(\S.*?)(?:, (?!device_ids=)[a-z_]+=|$)')
_LISTS = re.compile(r'\{\{([\d,]+)\}')
_COUNTS = re.compile(r'\[\d+,(\d+)\]<=')
_MESH = re.compile(
    r"mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{(.*?)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange.

  Attributes:
    kind: one of KINDS.
    size: bytes of what a device has of it afterwards.
    group: devices that exchange with each other.
    times: that it happens in a run of the program.
  """

  kind: str
  size: int
  group: int
  times: int

  @property
  def sent(self) -> float:
    """Bytes that a device sends, without what it passes on for others."""
    others = self.group - 1
    return self.times * self.size * {
        # What n devices gather, or give each other, has n parts, of which one
        # sends n - 1. What they sum has n too, of which one keeps its own and
        # sends the others; where all keep all, twice.
        'all-reduce': 2 * others / self.group,
        'all-gather': others / self.group,
        'reduce-scatter': others,
        'all-to-all': others / self.group,
        'collective-permute': 1}[self.kind]


def of(text: str, num_devices: int) -> list[Collective]:
  """The exchanges of a program.

  Args:
    text: of `jax.stages.Compiled.as_text`.
    num_devices: that it runs on.

  Of branches all count.

  Raises:
    ValueError: what is not understood: a loop with exchanges whose turns the
      compiler does not say, other exchanges than KINDS, other groups, no text
      of a program.
  """
  bodies, entry = _computations(text)
  if not entry:
    raise ValueError('no program: its text has no ENTRY')
  return list(_walk(bodies, entry, 1, num_devices))


def counts(found: Iterable[Collective]) -> dict[str, int]:
  """{kind: how often they happen in a run}."""
  return {kind: sum(one.times for one in found if one.kind == kind)
          for kind in KINDS}


def summary(found: Mapping[str, float]) -> str:
  """Counts as a text, such as '3 all-reduce, 1 all-gather'."""
  return ', '.join(f'{count:.0f} {kind}' for kind, count in found.items()
                   if count) or 'none'


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """({name: lines}, the name of the one that begins)."""
  bodies, entry, lines = {}, '', []
  for line in text.splitlines():
    if not line.startswith((' ', '}')) and (begins := _COMPUTATION.match(line)):
      lines = bodies[begins[2]] = []
      entry = begins[2] if begins[1] else entry
    else:
      lines.append(line)
  return bodies, entry


def _walk(bodies: Mapping[str, list[str]], name: str, times: int,
          num_devices: int) -> Iterator[Collective]:
  if name not in bodies:
    raise ValueError(f'the text calls {name!r}, which it does not have')
  for line in bodies[name]:
    if exchange := _EXCHANGE.search(line):
      kind = exchange[2]
      if kind in _OTHERS:
        raise ValueError(f'{kind} is not counted: {line.strip()[:200]}')
      yield Collective(kind, _size(exchange[1], kind, bool(exchange[3])),
                       _group(line, kind, num_devices), times)
    called = _CALLS.findall(line)
    for branches in _BRANCHES.findall(line):
      called += [branch.strip(' %') for branch in branches.split(',')]
    inside = [one for callee in called
              for one in _walk(bodies, callee, times, num_devices)]
    if scattered := _SCATTERED.search(line):
      inside = [dataclasses.replace(
          one, kind='reduce-scatter', size=_size(scattered[1], '', False))
                for one in inside]
    turns = 1
    if inside and ' while(' in line:
      turns = _turns(line, bodies)
    for one in inside:
      yield dataclasses.replace(one, times=one.times * turns)


def _turns(line: str, bodies: Mapping[str, list[str]]) -> int:
  """How often a loop runs, of which this is the line.

  Where only its condition says so, it is taken to count from 0 by ones, as
  loops of `lax` and of XLA's partitioner do.
  """
  if known := _TRIPS.search(line):
    return int(known[1])
  condition = _CONDITION.search(line)
  lines = bodies.get(condition[1], []) if condition else []
  bounds = [int(bound[1]) for text in lines if (bound := _BOUND.search(text))]
  if len(bounds) == 1 and any('direction=LT' in text for text in lines):
    return bounds[0]
  raise ValueError('a loop with exchanges, of whose turns the compiler does '
                   f'not say how many there are: {line.strip()[:200]}')


def _size(text: str, kind: str, starts: bool) -> int:
  """Bytes of a result's type."""
  shapes = _SHAPE.findall(text)
  if starts and kind != 'all-reduce':
    # Operands, as many results, and for some a counter or two.
    shapes = [(dtype, size) for dtype, size in shapes
              if (dtype, size) not in (('u32', ''), ('s32', ''))]
    shapes = shapes[len(shapes) // 2:]
  return sum(_bits(dtype) * math.prod(map(int, filter(None, size.split(','))))
             for dtype, size in shapes) // 8


def _bits(dtype: str) -> int:
  """f32, s4, bf16, f8e4m3fn, pred."""
  number = re.match(r'[a-z]+(\d+)', dtype)
  return int(number[1]) if number else 8


def _group(line: str, kind: str, num_devices: int) -> int:
  """Devices that exchange with each other."""
  if kind == 'collective-permute':
    return 2
  found = _GROUPS.search(line)
  if not found or found[1] == '{}':
    return num_devices
  if lists := _LISTS.match(found[1]):
    return len(lists[1].split(','))
  if counts_ := _COUNTS.match(found[1]):
    return int(counts_[1])
  if mesh := _MESH.match(found[1]):
    sizes = dict(axis.split('=') for axis in mesh[1].split(','))
    return math.prod(int(sizes[axis.strip()]) for axis in mesh[2].split(','))
  raise ValueError(f'groups that are not understood: {found[1][:200]}')
