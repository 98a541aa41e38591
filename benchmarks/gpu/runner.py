"""Runs one stage as a process, and leaves its JSON however it ends.

Imports nothing but the standard library: it must outlive whatever a device
does to the programs that use it.
"""

from collections.abc import Sequence
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import time
from typing import Any

from benchmarks.gpu.stages import GRACE
from benchmarks.gpu.stages import Stage

MORE = 3  # the exit status of a stage that stopped in time, with more to do
FOUND = 'found.json'  # what a stage writes itself, in its folder
# How a stage may have ended, in its JSON.
FINISHED, STOPPED, TIMED_OUT, DIED = 'finished', 'stopped', 'timed out', 'died'


def read(path: pathlib.Path) -> dict[str, Any]:
  """A JSON file; {} where there is none, or what a crash left of one."""
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return {}


def write(path: pathlib.Path, content: Any) -> None:
  """Writes JSON, whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.tmp')
  temporary.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
  os.replace(temporary, path)


def done(folder: pathlib.Path, stages: Sequence[Stage]) -> set[str]:
  """The names of the stages that an earlier call finished."""
  return {stage.name for stage in stages
          if read(folder / f'{stage.name}.json').get('status') == FINISHED}


def run(stage: Stage, folder: pathlib.Path, limit: float,
        flags: Sequence[str] = (), environment: dict[str, str] | None = None,
        grace: float = GRACE) -> str:
  """Runs a stage for `limit` seconds at most; returns how it ended.

  Leaves `folder`/NAME.json: status, the tries and how long they took, and what
  the stage found, also of a stage that was killed. What it prints is appended
  to `folder`/NAME.log. Whatever it started ends with it.

  Args:
    stage: what is run, with --folder and --seconds, before which it should
      leave by itself.
    folder: of all stages' results.
    limit: seconds; `grace` before their end it gets SIGTERM, then SIGKILL.
    flags: more of them.
    environment: of the process; this one's own, where not given.
    grace: seconds.
  """
  own = folder / stage.name
  own.mkdir(parents=True, exist_ok=True)
  path = folder / f'{stage.name}.json'
  tries = [*read(path).get('tries', []), {'limit': round(limit, 1)}]
  start = time.monotonic()

  def say(status: str) -> None:
    tries[-1] |= {'status': status,
                  'seconds': round(time.monotonic() - start, 1)}
    write(path, {'stage': stage.name, 'status': status, 'tries': tries,
                 'found': read(own / FOUND)})

  say('running')
  command = [*stage.command, f'--folder={own}',
             f'--seconds={max(1.0, limit - 2 * grace):.0f}', *flags]
  with open(folder / f'{stage.name}.log', 'ab') as log:
    log.write(f'== {stage.name}, try {len(tries)}\n'.encode())
    log.flush()
    child = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        env=environment, start_new_session=True)
    status = DIED
    try:
      status = _wait(child, limit - grace)
    finally:
      # Also where this program is asked to stop.
      _stop(child, grace)
      tries[-1]['returncode'] = child.returncode
      say(status)
  return status


def _wait(child: subprocess.Popen, limit: float) -> str:
  try:
    code = child.wait(max(0.0, limit))
  except subprocess.TimeoutExpired:
    return TIMED_OUT
  return {0: FINISHED, MORE: STOPPED}.get(code, DIED)


def _stop(child: subprocess.Popen, grace: float) -> None:
  """Ends a process and what it started, first with a word and then without."""
  for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, None)):
    # The group outlives the process if what that started is still running.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(child.pid, number)
    with contextlib.suppress(subprocess.TimeoutExpired):
      child.wait(patience)


def tail(path: pathlib.Path, count: int = 5) -> list[str]:
  """The last lines of a log."""
  with contextlib.suppress(OSError):
    return path.read_text(errors='replace').splitlines()[-count:]
  return []
