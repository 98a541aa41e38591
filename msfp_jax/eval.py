"""Evaluates a workdir of train.py: samples, metrics, results.json, report.

  python -m msfp_jax.eval --config=configs/digits.py:w4a4 --workdir=runs/w4a4

The same command again goes on where an interruption left it. Reference
statistics, in the form that other tools read too, are made by

  python -m msfp_jax.eval --make_stats=celeba:FOLDER --output=celeba64.npz

of a folder of images, an .npz, or a data set as NAME:PATH, and used by
--config.eval.reference=celeba64.npz.

Kept short: the logic is in msfp_jax/run, where it can be imported and tested.
"""

from absl import app
from absl import flags

from msfp_jax.base import devices
from msfp_jax.run import cli
from msfp_jax.run import cluster
from msfp_jax.run import config_files
from msfp_jax.run import evaluate
from msfp_jax.run import references as make_stats

_CONFIG = config_files.define()
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'The folder that train.py wrote.')
_MAKE_STATS = flags.DEFINE_string(
    'make_stats', None, 'Images to take statistics of, instead of evaluating: '
    'a folder, an .npz, or NAME:PATH of a data set.')
_OUTPUT = flags.DEFINE_string('output', None, 'The .npz of --make_stats.')
_FEATURES = flags.DEFINE_string(
    'features', 'inception', 'Of --make_stats, as config.eval.features.')
_INCEPTION = flags.DEFINE_string(
    'inception', '', 'Of --make_stats, as config.eval.inception.')
_PREPROCESSING = flags.DEFINE_string(
    'preprocessing', 'tf', 'Of --make_stats, as config.eval.preprocessing.')
_VECTORS = flags.DEFINE_integer(
    'vectors', 10_000, 'Of --make_stats, as config.eval.vectors.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  if _MAKE_STATS.value is not None:
    cli.need(output=_OUTPUT.value)
    print(cli.guard(lambda: make_stats.run(
        _MAKE_STATS.value, _OUTPUT.value, _FEATURES.value,
        weights=_INCEPTION.value, preprocessing=_PREPROCESSING.value,
        num_vectors=_VECTORS.value)))
    return
  cli.need(config=_CONFIG.value, workdir=_WORKDIR.value)
  cli.guard(lambda: cluster.join(_CONFIG.value))
  results = cli.guard(lambda: evaluate.run(
      _CONFIG.value, _WORKDIR.value, cli.command()))
  if devices.is_first():
    print(evaluate.table(results))


if __name__ == '__main__':
  cli.run(main)
