"""One call: stages in turn, and after each the pieces of what is kept."""

from collections.abc import Callable
import dataclasses
import os
import pathlib
import shutil
import subprocess
import time

from benchmarks.gpu import pieces
from benchmarks.gpu import runner
from benchmarks.gpu import stages as stages_lib

ROOT = pathlib.Path(__file__).parents[2]
CACHE = 'cache'
_TRIES = 3  # of a stage that dies, in one call
# Of a dry call, which computes little: most of its time, XLA compiles.
_DRY = {'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': '--xla_backend_optimization_level=0'}


@dataclasses.dataclass
class Session:
  """What a call has to do, and with what.

  Attributes:
    stages: in their order.
    folder: of the results.
    budget: seconds from `start` on.
    environment: of all stages.
    flags: of a stage, beside those of `runner`.
    target: the folder of pieces; None: none are written.
    piece: bytes of one of them at most.
    cache: bytes of compiled programs in them at most.
    grace: as of `runner.run`.
    start: of the call, on the monotonic clock.
  """

  stages: tuple[stages_lib.Stage, ...]
  folder: pathlib.Path
  budget: float
  environment: dict[str, str]
  flags: Callable[[stages_lib.Stage], list[str]] = lambda stage: []
  target: pathlib.Path | None = None
  piece: int = pieces.SIZE
  cache: int = 2 * pieces.SIZE - pieces.MIB  # two pieces, with names
  grace: float = stages_lib.GRACE
  start: float = dataclasses.field(default_factory=time.monotonic)

  def left(self) -> float:
    """Seconds of the budget."""
    return self.budget - (time.monotonic() - self.start)

  def plan(self) -> list[str]:
    """Lines that say what `run` would do now."""
    return stages_lib.plan(
        self.stages, runner.done(self.folder, self.stages), self.left())

  def run(self) -> dict[str, str]:
    """Runs what no earlier call has finished: {stage: how it ended}."""
    done, ended = runner.done(self.folder, self.stages), {}
    for stage in self.stages:
      if stage.name not in done:
        try:
          ended[stage.name] = self._run(stage)
        finally:  # also where the call is asked to stop
          self.keep()
    return ended

  def _run(self, stage: stages_lib.Stage) -> str:
    """Runs a stage, again if it died with something new measured."""
    status = 'no time left'
    for _ in range(_TRIES):
      limit = stages_lib.seconds(stage, self.left())
      if not limit:
        break
      print(f'== {stage.name}: {stage.about}; {limit:.0f} s at most',
            flush=True)
      before = self._found(stage)
      status = runner.run(stage, self.folder, limit, self.flags(stage),
                          self.environment, self.grace)
      print(f'== {stage.name}: {status}; {self.left():.0f} s left', flush=True)
      for name, row in self._found(stage).get('measurements', {}).items():
        if 'error' in row:
          print(f'   {name}: {row["error"]}', flush=True)
      if status != runner.DIED:
        break
      print(*runner.tail(self.folder / f'{stage.name}.log'), sep='\n',
            flush=True)
      if self._found(stage) == before:
        break
    return status

  def _found(self, stage: stages_lib.Stage) -> dict:
    return runner.read(self.folder / stage.name / runner.FOUND)

  def forget(self, names: list[str]) -> None:
    """Drops what there is of stages, so that they are run anew."""
    for stage in stages_lib.choose(names) if names else ():
      shutil.rmtree(self.folder / stage.name, ignore_errors=True)
      (self.folder / f'{stage.name}.json').unlink(missing_ok=True)

  def keep(self) -> None:
    """Writes the pieces, which are what a later call needs."""
    if not self.target:
      return
    glob = lambda *patterns: [
        path for pattern in patterns for path in self.folder.glob(pattern)]
    groups = {
        'results': (glob('*.json', '*.log', '*/*.json', '*/*.jsonl',
                         'demo/run/*.json', '*/state/*.png'), True),
        'teacher': (glob('*/state/*.safetensors'), False),
        # The largest took longest to compile.
        'cache': (pieces.largest(
            [path for path in (self.folder / CACHE).rglob('*')
             if path.is_file()], self.cache), False)}
    for group, (files, compress) in groups.items():
      if files:
        size = pieces.split(group, files, self.folder, self.target, compress,
                            self.piece)
        print(f'pieces of {group}: {size / 1e6:.1f} MB', flush=True)


def environment(folder: pathlib.Path, wheels: str | None, dry: bool
                ) -> dict[str, str]:
  """What stages find in their environment.

  Args:
    folder: of the results, which holds the compiled programs.
    wheels: a folder of wheels that they import from, or None.
    dry: whether they must not use a device.

  Raises:
    FileNotFoundError: there are no wheels in the folder named.
  """
  found = []
  if wheels:
    found = sorted(map(str, pathlib.Path(wheels).absolute().glob('*.whl')))
    if not found:
      raise FileNotFoundError(f'no *.whl in {wheels}')
  earlier = os.environ.get('PYTHONPATH')
  return os.environ | {
      'PYTHONPATH': os.pathsep.join(
          [str(ROOT), *found, *([earlier] if earlier else [])]),
      'JAX_COMPILATION_CACHE_DIR': str(folder / CACHE),
      # What is smaller is compiled faster than it is read and sent.
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '1',
  } | (_DRY if dry else {})


def upload(**paths: str | None) -> dict[str, int]:
  """The bytes of what the machine must be sent, by what it is.

  Args:
    **paths: files and folders beside what is committed here; None: there is no
      such thing.

  Raises:
    FileNotFoundError: one of them is not there.
  """
  names = subprocess.run(
      ['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True,
      check=False).stdout.decode().split('\0')
  files = {'repository': [ROOT / name for name in names if name]}
  for name, path in paths.items():
    if path:
      if not os.path.exists(path):
        raise FileNotFoundError(f'{name}: there is no {path}')
      files[name] = [pathlib.Path(path), *pathlib.Path(path).rglob('*')]
  return {name: sum(file.stat().st_size for file in found if file.is_file())
          for name, found in files.items()}


def describe_upload(sizes: dict[str, int], most: float) -> str:
  """Says what `upload` found, and whether it is `most` MiB or less."""
  total = sum(sizes.values()) / pieces.MIB
  parts = ', '.join(
      f'{name} {size / pieces.MIB:.1f}' for name, size in sizes.items())
  said = 'as --upload_mib allows' if total <= most else (
      'more than --upload_mib allows: take fewer images, or no pieces of the '
      'cache')
  return f'upload: {parts}; {total:.1f} MiB of {most:g}, {said}'
