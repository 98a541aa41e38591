"""Evaluates a workdir of train.py: samples, metrics, results.json, report.

  python eval.py --config=configs/digits.py:w4a4 --workdir=runs/w4a4

The same command again goes on where an interruption left it. Reference
statistics, in the form that other tools read too, are made by

  python eval.py --make_stats=celeba:img_align_celeba --output=celeba64.npz

of a folder of images, an .npz, or a data set as NAME:PATH, and used by
--config.eval.reference=celeba64.npz. Where the package is installed and this
file is not at hand, the command is `python -m msfp_jax.eval`.
"""

from absl import flags

from msfp_jax import eval as evaluation
from msfp_jax.run import cli

flags.adopt_module_key_flags(evaluation)

if __name__ == '__main__':
  cli.run(evaluation.main)
