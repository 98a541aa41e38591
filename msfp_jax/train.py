"""Quantizes and fine-tunes a diffusion model.

  python -m msfp_jax.train --config=configs/digits.py:w4a4 --workdir=runs/w4a4

The same command again resumes. Kept short: the logic is in msfp_jax/run, where
it can be imported and tested.
"""

from absl import app
from absl import flags

from msfp_jax.run import cli
from msfp_jax.run import cluster
from msfp_jax.run import config_files
from msfp_jax.run import train

_CONFIG = config_files.define()
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Folder for everything that this run writes.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  cli.need(config=_CONFIG.value, workdir=_WORKDIR.value)
  cli.guard(lambda: cluster.join(_CONFIG.value))
  cli.guard(lambda: train.run(_CONFIG.value, _WORKDIR.value, cli.command()))


if __name__ == '__main__':
  cli.run(main)
