"""Stage tests: runs the tests marked `gpu` on the device.

Failures are listed and end nothing. Float32 products are made in float32
(JAX_DEFAULT_MATMUL_PRECISION), not in TF32, which GPUs would take; what asks
for another precision has it. Warnings of the versions found are no errors.
"""

import collections
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

from absl import app

from benchmarks.gpu import arguments
from benchmarks.gpu import outcomes
from benchmarks.gpu import runner

PROCESSES = 6  # which share the device
_DRY = ('tests/test_device.py', '-k', 'E2M1')


def marked() -> list[str]:
  """The test files that have the marker: the others take time to collect."""
  tests = pathlib.Path('tests')
  return sorted(str(path) for path in tests.rglob('test_*.py')
                if 'pytest.mark.gpu' in path.read_text(encoding='utf-8'))


def command(dry: bool) -> list[str]:
  """The call of pytest that runs the tests of a GPU; `dry`: a few of them."""
  parallel = importlib.util.find_spec('xdist') and not dry
  return [sys.executable, '-m', 'pytest', '-m',
          'gpu and not slow and not long', '-q', '-W', 'default',
          '-p', 'no:cacheprovider', '-p', 'benchmarks.gpu.outcomes',
          '--tb=short',
          *(('-n', str(PROCESSES), '--dist', 'loadscope') if parallel else ()),
          *(_DRY if dry else marked())]


def summary(found: dict[str, dict]) -> dict[str, Any]:
  """Counts outcomes; names what failed and what ended its process."""
  counts = collections.Counter(row['outcome'] for row in found.values())
  named = lambda outcome: {test: row.get('error', '') for test, row in
                           sorted(found.items()) if row['outcome'] == outcome}
  return {'float32': 'TF32 is off', 'counts': dict(counts),
          'failed': named('failed'), 'ended the process': named('began')}


def main(unused_argv) -> None:
  folder = arguments.folder()
  written, known = folder / 'outcomes.jsonl', folder / 'known.jsonl'
  known.write_text('')
  if written.is_file():
    shutil.copy(written, known)
  environment = os.environ | {
      outcomes.KNOWN: str(known), outcomes.WRITTEN: str(written),
      'JAX_DEFAULT_MATMUL_PRECISION': 'float32',
      # Or the first of the processes would take the memory of all.
      'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
  child = subprocess.Popen(command(arguments.DRY.value), env=environment)
  late = False
  try:
    child.wait(arguments.SECONDS.value)
  except subprocess.TimeoutExpired:
    late = True
    child.terminate()
    child.wait()
    outcomes.forget_unfinished(written, known)
  found = outcomes.read(written)
  result = summary(found)
  runner.write(folder / runner.FOUND, result)
  print(result['counts'], *result['failed'], sep='\n', flush=True)
  if late:
    raise SystemExit(runner.MORE)
  # 0: all passed; 1: some did not; 5: none was left. Else pytest itself failed.
  raise SystemExit(0 if found and child.returncode in (0, 1, 5)
                   else child.returncode or 1)


if __name__ == '__main__':
  app.run(main)
