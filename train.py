"""Quantizes and fine-tunes a diffusion model.

  python train.py --config=configs/digits.py:w4a4 --workdir=runs/w4a4

The same command again resumes. Where the package is installed and this file is
not at hand, the command is `python -m msfp_jax.train`.
"""

from absl import flags

from msfp_jax import train
from msfp_jax.run import cli

flags.adopt_module_key_flags(train)

if __name__ == '__main__':
  cli.run(train.main)
