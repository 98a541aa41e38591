"""What a training step needs of its devices' memory, before it is run."""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import functools
import pathlib
from typing import Any

from absl import logging
import jax
import numpy as np

from msfp_jax.base import devices
from msfp_jax.base import errors
from msfp_jax.tune import parts
from msfp_jax.tune import remat
from msfp_jax.tune import step as step_lib

# Where Linux says what is free; limit and use of the group of processes that
# this one belongs to.
_FREE = pathlib.Path('/proc/meminfo')
_GROUP = pathlib.Path('/sys/fs/cgroup')
_OUT = 'RESOURCE_EXHAUSTED'  # how XLA's errors begin that are about memory


@dataclasses.dataclass(frozen=True)
class Need:
  """Bytes of one device, as the compiler says.

  Attributes:
    kept: what is there from step to step: weights, state, data.
    temporary: beside it while the step runs: activations, gradients.
  """

  kept: int
  temporary: int

  @property
  def total(self) -> int:
    """All of it."""
    return self.kept + self.temporary

  def __str__(self):
    return (f'{_gigabytes(self.total)} of each device: '
            f'{_gigabytes(self.kept)} of weights, state and data, '
            f'{_gigabytes(self.temporary)} while it runs')


@dataclasses.dataclass(frozen=True)
class Remedy:
  """Flags by which a step may fit.

  Attributes:
    flags: to be added to the command.
    build: makes that step, of the same states.
  """

  flags: str
  build: Callable[[], step_lib.Step]


def need_of(compiled: jax.stages.Compiled) -> Need | None:
  """What a program needs; None where the compiler does not say."""
  found = compiled.memory_analysis()
  if found is None:
    return None
  # What is donated is counted among arguments and results, and is there once.
  return Need(
      found.argument_size_in_bytes + found.output_size_in_bytes
      - found.alias_size_in_bytes,
      found.temp_size_in_bytes + found.generated_code_size_in_bytes)


def refusal(error: jax.errors.JaxRuntimeError) -> str:
  """What a chip's compiler says of a program that cannot fit; '' of others."""
  text = str(error)
  return text.splitlines()[0] if _OUT in text else ''


def check(name: str, step: step_lib.Step, state: Any, *, limit: float = 0.0,
          remedies: Iterable[Remedy] = ()) -> None:
  """Compiles a step and logs what it needs; refuses it where that lacks.

  Args:
    name: of what is trained, for the log.
    step: is compiled for the state, and stays so.
    state: its abstract form, with its sharding.
    limit: bytes that each device has; 0: as it says itself.
    remedies: of what may fit, the best first; looked at only if this step does
      not. Each is compiled.

  Raises:
    errors.MemoryLackError: it needs more than there is; the message has both,
      and the first of the remedies that fits.
  """
  # One judgement: a process that went on alone would wait for the others.
  there = devices.least(limit or available(step.held))
  if devices.is_first():
    logging.info('%s: compiling its step, which can take a minute or more',
                 name)
  need, said = _needed(step, state)
  if need is not None:
    logging.info('%s: a step needs %s%s', name, need,
                 f'; there are {_gigabytes(there)}' if there else '')
    said = f'needs {need}, and {_gigabytes(there)} are there'
  elif not said:
    logging.info('%s: the compiler does not say what a step needs', name)
    need = Need(0, 0)
  if not _fit(need, there):
    raise errors.MemoryLackError(
        f'{name}: a step {said}. '
        f'{_first_that_fits(name, state, there, remedies)}; '
        'another limit is given by --config.mesh.memory=GB')


def remedies(name: str, settings: Any, layout: devices.Layout,
             build: Callable[[Any], step_lib.Step]) -> Iterator[Remedy]:
  """What makes a step smaller, the cheapest in time first.

  First rematerialisation, then the batch in more and more parts, by itself
  and with that.

  Args:
    name: of the config's part that `settings` are.
    settings: with the fields batch_size, accumulate and remat.
    layout: over which batches are split.
    build: settings -> their step.
  """
  known = remat.WAYS[remat.WAYS.index(settings.remat) + 1:]
  ways = [{'remat': how} for how in known]
  rows = settings.batch_size // (layout.num_parts if layout.splits else 1)
  for count in range(settings.accumulate + 1, rows + 1):
    if rows % count == 0:
      ways += [more | {'accumulate': count}
               for more in ({}, *({'remat': how} for how in known[-1:]))]
  for way in ways:
    changed = dataclasses.replace(settings, **way)
    yield Remedy(
        ' '.join(f'--config.{name}.{field}={value}'
                 for field, value in way.items()),
        functools.partial(build, changed))


def _fit(need: Need | None, there: float) -> bool:
  """Whether a need is met in all processes."""
  return devices.all_say(
      need is not None and (not there or need.total <= there))


def _needed(step, state):
  """(need or None, what the compiler said if it found that it does not fit)."""
  try:
    return need_of(step.compile(state)), ''
  except jax.errors.JaxRuntimeError as error:
    if not (said := refusal(error)):
      raise
    return None, f'does not fit ({said})'


def _first_that_fits(name, state, there, remedies):
  for remedy in remedies:
    logging.info('%s: compiling it with %s, to see whether that fits', name,
                 remedy.flags)
    try:
      need, _ = _needed(remedy.build(), state)
    except (remat.NoBlocksError, parts.IndivisibleError):
      continue
    if _fit(need, there):
      return f'It fits with {remedy.flags} ({_gigabytes(need.total)})'
  return ('No other way to compute it fits either: take more devices with '
          '--config.mesh.model, or a smaller model')


def available(held: Iterable[jax.Array] = ()) -> int:
  """Bytes of each device that a program can have; 0 where it is not known.

  Args:
    held: arrays of the program, which are there already and in use by it.
  """
  device = jax.local_devices()[0]
  ours = sum(_on_one_device(leaf) for leaf in held)
  stats = device.memory_stats() or {}
  if 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats.get('bytes_in_use', 0) + ours
  if device.platform != 'cpu':
    return 0
  # Devices of a CPU have its memory together.
  free = _free()
  return free and free // jax.local_device_count() + ours


def _on_one_device(leaf: jax.Array) -> int:
  return int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)
             * leaf.dtype.itemsize)


def _free() -> int:
  """Bytes of the host that are free, or can be made so; 0: not known."""
  try:
    lines = _FREE.read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines
                if line.startswith('MemAvailable:'))
  except (OSError, StopIteration):  # not Linux
    return 0
  try:
    limit, used = (int((_GROUP / f'memory.{kind}').read_text())
                   for kind in ('max', 'current'))
    stat = dict(line.split() for line in (
        _GROUP / 'memory.stat').read_text().splitlines())
    # Files that were read or written stay in memory while there is room.
    used -= sum(int(stat.get(kind, 0)) for kind in (
        'inactive_file', 'active_file', 'slab_reclaimable'))
    free = max(1, min(free, limit - used))
  except (OSError, ValueError):  # no group, or one without a limit
    pass
  return free


def _gigabytes(count: float) -> str:
  return f'{count / 1e9:.3g} GB'
