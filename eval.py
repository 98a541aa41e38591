"""Evaluates a workdir of train.py: samples, metrics, results.json, pictures.

  python eval.py --config=configs/digits.py:w4a4 --workdir=runs/w4a4

Kept short: the logic is in msfp_jax, where it can be imported and tested.
"""

from absl import app
from absl import flags
from ml_collections import config_flags

from msfp_jax import cli
from msfp_jax import evaluate

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'The experiment: configs/NAME.py[:variant].',
    lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'The folder train.py wrote.')
flags.mark_flags_as_required(['config', 'workdir'])


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  results = cli.guard(lambda: evaluate.run(_CONFIG.value, _WORKDIR.value))
  print(evaluate.table(results))


if __name__ == '__main__':
  cli.run(main)
