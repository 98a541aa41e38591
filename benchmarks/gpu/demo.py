"""Stage demo: what `make demo` runs, timed.

Both commands resume in their workdir, so that a second call goes on. Products
of float32 are in TF32, as GPUs take by default.
"""

from collections.abc import Sequence
import pathlib
import subprocess
import sys
import time
from typing import Any

from absl import app

from benchmarks.gpu import arguments
from benchmarks.gpu import runner

_CONFIG = ('--config=configs/digits.py:demo',)
_DRY = ('--config=configs/cifar10.py:smoke', '--config.model.ch_mult=(1,)',
        '--config.finetune.num_updates=0', '--config.eval.rows=fp')


def timed(program: str, config: Sequence[str], workdir: pathlib.Path) -> float:
  """Runs train.py or eval.py; returns its seconds.

  Raises:
    SystemExit: it failed.
  """
  start = time.monotonic()
  code = subprocess.run([
      sys.executable, program, *config, f'--workdir={workdir}']).returncode
  if code:
    raise SystemExit(f'{program} ended with {code}')
  return time.monotonic() - start


def main(unused_argv) -> None:
  folder = arguments.folder()
  path = folder / runner.FOUND
  found: dict[str, Any] = runner.read(path)
  config = _DRY if arguments.DRY.value else _CONFIG
  start = time.monotonic()
  for program in ('train.py', 'eval.py'):
    if program in found:
      continue
    if time.monotonic() - start > arguments.SECONDS.value:
      raise SystemExit(runner.MORE)
    found[program] = timed(program, config, folder / 'run')
    results = runner.read(folder / 'run' / 'results.json')
    runner.write(path, found | {
        'config': ' '.join(config), 'precision_of_float32': 'tensorfloat32',
        'results': results})


if __name__ == '__main__':
  app.run(main)
