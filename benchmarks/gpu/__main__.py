"""All that is measured on a GPU, by one command, in a limited time.

  python -m benchmarks.gpu --budget=840 --output=gpu [--pieces=back]
      [--resume=FOLDER] [--data=sheets:FOLDER] [--wheels=FOLDER]

Runs the stages that `--plan` prints, in order of worth, each as a process with
a limit of time of its own. Each leaves NAME.json and NAME.log in --output,
however it ends; one whose results lie there from an earlier call is skipped
(`--again=NAME` drops them), and of one that did not finish what it has measured
is not measured again.
Compiled programs are kept in --output/cache. kernels.log ends in the rows that
msfp_jax/kernels/mosaic_gpu/measured.py would have to hold. `--dry` does all of
it on a CPU, at toy sizes.

What is kept for a later call, on this machine or on another: with --pieces,
after each stage all that it needs is in small files in that folder (results;
teacher, of which also while it trains; cache), and --resume=FOLDER begins with
what such files hold. --piece_mib limits each of them, --cache_mib the compiled
programs among them. --plan tells how much a machine must be sent beforehand,
and whether that is within --upload_mib.

What a machine without a network needs: this repository, and

- wheels of what it lacks, which need no installing: pure Python is read from
  them as they are. Beside JAX, Flax and optax these may be three, 0.3 MB
  together:

      pip download --no-deps -d wheels clu ml_collections tensorboardX

- for the last stage, images: `python -m benchmarks.gpu.sheets` makes of 20,000
  of CIFAR-10's some 30 MB. Without --data that stage is left out.

Products of float32 are in TF32 on a GPU unless a program says otherwise: the
tests run without TF32, and every row of the other stages says what it has.
"""

import dataclasses
import os
import pathlib
import signal
import sys

from absl import app
from absl import flags

from benchmarks.gpu import pieces
from benchmarks.gpu import session as session_lib
from benchmarks.gpu import stages as stages_lib

_BUDGET = flags.DEFINE_float('budget', 840.0, 'Seconds for everything.')
_OUTPUT = flags.DEFINE_string('output', 'runs/gpu', 'The folder of results.')
_PIECES = flags.DEFINE_string('pieces', None, 'Where kept files go, in pieces.')
_PIECE = flags.DEFINE_float(
    'piece_mib', pieces.SIZE / pieces.MIB, 'MiB of a piece at most.',
    lower_bound=0.01)
_CACHE = flags.DEFINE_float(
    'cache_mib', session_lib.Session.cache / pieces.MIB,
    'MiB of compiled programs in pieces at most.', lower_bound=0.0)
_UPLOAD = flags.DEFINE_float(
    'upload_mib', 64.0, 'MiB that the machine may be sent, for --plan.',
    lower_bound=0.0)
_RESUME = flags.DEFINE_string('resume', None, 'Where such pieces lie.')
_DATA = flags.DEFINE_string('data', None, "Images of the teacher's.")
_WHEELS = flags.DEFINE_string('wheels', None, 'A folder of wheels to use.')
_AGAIN = flags.DEFINE_list('again', None, 'Stages whose results are dropped.')
_ONLY = flags.DEFINE_list('only', None, 'Names of stages.')
_PLAN = flags.DEFINE_bool('plan', False, 'Print the plan, and run nothing.')
_DRY = flags.DEFINE_bool('dry', False, 'Toy sizes, on a CPU.')


def flags_of(stage: stages_lib.Stage) -> list[str]:
  """The flags of this call that a stage gets as well."""
  given = ['--dry'] if _DRY.value else []
  if stage.name == 'teacher':
    # Its pieces are written while it runs: they outlive whatever ends it.
    given += [f'--data={_DATA.value}'] if _DATA.value else []
    given += [f'--pieces={pathlib.Path(_PIECES.value).absolute()}',
              f'--piece_mib={_PIECE.value}'] if _PIECES.value else []
  return given


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  folder = pathlib.Path(_OUTPUT.value).absolute()
  stages = stages_lib.choose(_ONLY.value)
  if not (_DATA.value or _DRY.value):
    stages = tuple(s for s in stages if s.name != 'teacher')
    print('no --data: without a teacher')
  if _DRY.value:  # where others may be using the processor
    stages = tuple(dataclasses.replace(s, limit=4 * s.limit) for s in stages)
  session = session_lib.Session(
      stages, folder, _BUDGET.value,
      session_lib.environment(folder, _WHEELS.value, _DRY.value), flags_of,
      _PIECES.value and pathlib.Path(_PIECES.value).absolute(),
      int(_PIECE.value * pieces.MIB), int(_CACHE.value * pieces.MIB))
  if _RESUME.value:
    print(f'goes on from {pieces.join(pathlib.Path(_RESUME.value), folder)}')
  session.forget(_AGAIN.value)
  print(*session.plan(), sep='\n', flush=True)
  if _PLAN.value:
    print(session_lib.describe_upload(session_lib.upload(
        wheels=_WHEELS.value, images=(_DATA.value or '').partition(':')[2],
        pieces=_RESUME.value), _UPLOAD.value))
    return
  os.chdir(session_lib.ROOT)
  # Asked to stop, it leaves what there is.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  ended = session.run()
  print(*(f'{name}: {status}' for name, status in ended.items()), sep='\n')


if __name__ == '__main__':
  app.run(main)
