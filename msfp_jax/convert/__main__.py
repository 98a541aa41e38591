"""Converts a checkpoint of another code base into ours.

  python -m msfp_jax.convert SRC DST.safetensors [--config=FILE] [--noema]
"""

from collections.abc import Sequence

from absl import app
from absl import flags
from absl import logging
from clu import parameter_overview

from msfp_jax.convert import load
from msfp_jax.convert import native
from msfp_jax.run import cli

_CONFIG = flags.DEFINE_string(
    'config', None, 'config.json or CompVis yaml that describes the model.')
_EMA = flags.DEFINE_bool(
    'ema', None, 'Take the moving average where the file has one; by default '
    'yes, unless the yaml says otherwise.')


def main(argv: Sequence[str]) -> None:
  if len(argv) != 3:
    raise app.UsageError('expected SRC and DST, got '
                         f'{len(argv) - 1} arguments')
  _, source, target = argv
  cli.guard(lambda: convert(source, target))


def convert(source: str, target: str) -> None:
  """Loads SRC, strictly, and writes DST, whole or not at all."""
  if not target.endswith('.safetensors'):
    raise ValueError(f'DST is {target}: it must end in .safetensors')
  model, params = load.load_pretrained(source, _CONFIG.value, _EMA.value)
  origin = load.load_origin(source, _CONFIG.value, _EMA.value)
  native.save_pretrained(target, model, params, origin, source=source)
  parameter_overview.log_parameter_overview(params)
  logging.info('wrote %s', target)


if __name__ == '__main__':
  cli.run(main)
