"""Converts a checkpoint of another code base into ours.

  python -m msfp_jax.convert SRC DST.safetensors [--config=FILE] [--noema]
      [--dtype=bfloat16]
"""

from collections.abc import Sequence

from absl import flags
from absl import logging
from clu import parameter_overview

from msfp_jax.base import files
from msfp_jax.convert import load
from msfp_jax.convert import native
from msfp_jax.run import cli
from msfp_jax.run import source_flags

_DTYPE = flags.DEFINE_enum(
    'dtype', 'float32', list(native.DTYPES),
    'Of the tensors in DST: bfloat16 and float16 halve the file, and round.')


def main(argv: Sequence[str]) -> None:
  source, target = source_flags.source_and_target(argv)
  cli.guard(lambda: convert(source, target))


def convert(source: str, target: str) -> None:
  """Loads SRC, strictly, and writes DST, whole or not at all."""
  if not target.endswith('.safetensors'):
    raise ValueError(f'DST is {target}: it must end in .safetensors')
  files.check_target(target)
  config, ema = source_flags.CONFIG.value, source_flags.EMA.value
  model, params = load.load_pretrained(source, config, ema)
  origin = load.load_origin(source, config, ema)
  # What a file of ours tells of itself goes along.
  native.save_pretrained(
      target, model, params, origin, dtype=_DTYPE.value,
      **{'source': source, **native.about_of(source)})
  parameter_overview.log_parameter_overview(params)
  logging.info('wrote %s', target)


if __name__ == '__main__':
  cli.run(main)
