"""A GPU's quarter of an hour: all that is measured on it, by one command.

  python -m benchmarks.gpu --budget=840 --output=gpu [--pieces=back]
      [--resume=FOLDER] [--data=sheets:FOLDER] [--wheels=FOLDER]

Runs the stages that `--plan` prints, in order of worth, each as a process with
a limit of time of its own. Each leaves NAME.json and NAME.log in --output,
however it ends; one whose results lie there from an earlier call is skipped,
and of one that did not finish what it has measured is not measured again.
Compiled programs are kept in --output/cache. `--dry` does all of it on a CPU,
at toy sizes.

What comes back: with --pieces, after each stage all that a later call needs is
in files of at most 15 MiB in that folder (results; teacher; cache), and
--resume=FOLDER begins with what such files hold.

What goes there: this repository, and

- wheels of what the machine lacks, which need no installing: pure Python is
  read from them as they are. Beside JAX, Flax and optax, machines are likely to
  lack three, 0.3 MB together:

      pip download --no-deps -d wheels clu ml_collections tensorboardX

- for the last stage, images: `python -m benchmarks.gpu.sheets` makes of 20,000
  of CIFAR-10's 33 MB. Without --data that stage is left out.

Products of float32 are in TF32 on a GPU unless a program says otherwise: the
tests run without TF32, and every row of the other stages says what it has.
"""

import os
import pathlib
import signal
import sys
import time

from absl import app
from absl import flags

from benchmarks.gpu import pieces
from benchmarks.gpu import runner
from benchmarks.gpu import stages as stages_lib

_BUDGET = flags.DEFINE_float('budget', 840.0, 'Seconds for everything.')
_OUTPUT = flags.DEFINE_string('output', 'runs/gpu', 'The folder of results.')
_PIECES = flags.DEFINE_string('pieces', None, 'Where files that travel go.')
_RESUME = flags.DEFINE_string('resume', None, 'Where such files lie.')
_DATA = flags.DEFINE_string('data', None, "Images of the teacher's.")
_WHEELS = flags.DEFINE_string('wheels', None, 'A folder of wheels to use.')
_ONLY = flags.DEFINE_list('only', None, 'Names of stages.')
_PLAN = flags.DEFINE_bool('plan', False, 'Print the plan, and run nothing.')
_DRY = flags.DEFINE_bool('dry', False, 'Toy sizes, on a CPU.')

ROOT = pathlib.Path(__file__).parents[2]
CACHE = 'cache'
_CACHE_BYTES = 2 * pieces.SIZE  # of compiled programs, in pieces
_TRIES = 3  # of a stage that dies, in one call


def environment(folder: pathlib.Path, wheels: str | None, dry: bool
                ) -> dict[str, str]:
  """What stages find in their environment beside what is there.

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
  } | ({'JAX_PLATFORMS': 'cpu'} if dry else {})


def flags_of(stage: stages_lib.Stage) -> list[str]:
  return [*(['--dry'] if _DRY.value else []),
          *([f'--data={_DATA.value}']
            if stage.name == 'teacher' and _DATA.value else [])]


def keep(folder: pathlib.Path, target: str | None) -> None:
  """Writes the pieces, which then are what a later call needs."""
  if not target:
    return
  target = pathlib.Path(target)
  results = [*folder.glob('*.json'), *folder.glob('*.log'),
             *folder.glob('*/*.json'), *folder.glob('*/*.jsonl'),
             *folder.glob('teacher/state/*.png')]
  groups = {
      'results': (results, True),
      'teacher': ([*folder.glob('teacher/state/*.safetensors')], False),
      # The largest took longest to compile.
      'cache': (pieces.largest(
          [f for f in (folder / CACHE).rglob('*') if f.is_file()],
          _CACHE_BYTES), False)}
  for group, (files, compress) in groups.items():
    if files:
      size = pieces.split(group, files, folder, target, compress)
      print(f'pieces of {group}: {size / 1e6:.1f} MB', flush=True)


def run_stage(stage: stages_lib.Stage, folder: pathlib.Path, left) -> str:
  """Runs a stage, again if it died with something new measured."""
  status = 'no time left'
  for _ in range(_TRIES):
    limit = stages_lib.seconds(stage, left())
    if not limit:
      break
    print(f'== {stage.name}: {stage.about}; {limit:.0f} s at most', flush=True)
    before = runner.read(folder / stage.name / runner.FOUND)
    status = runner.run(
        stage, folder, limit, flags_of(stage),
        environment(folder, _WHEELS.value, _DRY.value))
    print(f'== {stage.name}: {status}; {left():.0f} s left', flush=True)
    if status != runner.DIED:
      break
    print(*runner.tail(folder / f'{stage.name}.log'), sep='\n', flush=True)
    if runner.read(folder / stage.name / runner.FOUND) == before:
      break
  return status


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  start = time.monotonic()
  folder = pathlib.Path(_OUTPUT.value).absolute()
  if _RESUME.value:
    print(f'goes on from {pieces.join(pathlib.Path(_RESUME.value), folder)}')
  stages = stages_lib.choose(_ONLY.value)
  if not (_DATA.value or _DRY.value):
    stages = tuple(s for s in stages if s.name != 'teacher')
  done = runner.done(folder, stages)
  print(*stages_lib.plan(stages, done, _BUDGET.value), sep='\n', flush=True)
  if _PLAN.value:
    return
  os.chdir(ROOT)
  # Asked to stop, it leaves what there is.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  left = lambda: _BUDGET.value - (time.monotonic() - start)
  ended = {}
  for stage in stages:
    if stage.name in done:
      continue
    try:
      ended[stage.name] = run_stage(stage, folder, left)
    finally:
      keep(folder, _PIECES.value)
  print(*(f'{name}: {status}' for name, status in ended.items()), sep='\n')


if __name__ == '__main__':
  app.run(main)
