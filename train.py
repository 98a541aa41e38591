"""Quantizes and fine-tunes a diffusion model.

  python train.py --config=configs/digits.py:w4a4 --workdir=runs/w4a4

The same command again resumes. Kept short: the logic is in msfp_jax, where it
can be imported and tested.
"""

import shlex
import sys

from absl import app
from absl import flags
from ml_collections import config_flags

from msfp_jax.run import cli
from msfp_jax.run import train

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'The experiment: configs/NAME.py[:variant].',
    lock_config=True)
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Folder for everything that this run writes.')
flags.mark_flags_as_required(['config', 'workdir'])


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  command = shlex.join(['python', *sys.argv])
  cli.guard(lambda: train.run(_CONFIG.value, _WORKDIR.value, command))


if __name__ == '__main__':
  cli.run(main)
