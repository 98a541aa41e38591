"""Packs a checkpoint of any size, a layer in memory at a time.

  python -m msfp_jax.packed SRC DST.safetensors [--recipe=nvfp4] [--bits=w4a4]
      [--exceptions=ends-8] [--spec=FILE] [--config=FILE] [--noema]
      [--sampler=NAME] [--num_steps=20]
      [--lora=FILE=0.8 ...]

SRC is what `msfp_jax.convert` takes: a file, a folder of diffusers, its shards.
The same command again goes on where a killed one stopped.
"""

from collections.abc import Sequence

from absl import flags

from msfp_jax import convert
from msfp_jax.base import files
from msfp_jax.packed import streamed
from msfp_jax.quant import recipes
from msfp_jax.quant import spec as spec_lib
from msfp_jax.run import cli
from msfp_jax.run import source_flags

_RECIPE = flags.DEFINE_string(
    'recipe', 'nvfp4', 'One that sees nothing of the inputs.')
_BITS = flags.DEFINE_string(
    'bits', 'w4a4', 'Of weights and inputs, 3 to 8; a32 leaves inputs in full '
    'precision.')
_EXCEPTIONS = flags.DEFINE_string(
    'exceptions', 'ends-8', 'Which layers have other bits.')
_SPEC = flags.DEFINE_string(
    'spec', None, 'A spec.json, in place of recipe, bits and exceptions.')
_SAMPLER = flags.DEFINE_string(
    'sampler', None, 'Such as ddim or dpm_solver; by default the checkpoint\'s '
    'own.')
_STEPS = flags.DEFINE_integer('num_steps', 20, 'Of the sampler.')
_LORAS = flags.DEFINE_multi_string(
    'lora', [], 'A LoRA that is merged into the weights: FILE, or '
    'FILE=STRENGTH. May be repeated.')


def main(argv: Sequence[str]) -> None:
  source, target = source_flags.source_and_target(argv)
  cli.guard(lambda: _pack(source, target))


def _pack(source, target):
  if _SPEC.value is not None and (said := [
      name for name in ('recipe', 'bits', 'exceptions')
      if flags.FLAGS[name].present]):
    raise ValueError(f'--spec says what {said} say: leave these out')
  if _SPEC.value is not None:
    how = {'spec': spec_lib.QuantSpec.load(_SPEC.value)}
  else:
    bits, act_bits = recipes.parse_bits(_BITS.value)
    how = {'recipe': _RECIPE.value, 'bits': bits, 'act_bits': act_bits,
           'exceptions': _EXCEPTIONS.value}
  if _SAMPLER.value is None:
    how['num_steps'] = _STEPS.value
  else:
    files.check_target(target)  # before a source is looked for, or downloaded
    how['plan'] = convert.load_plan(
        source, source_flags.CONFIG.value, _STEPS.value,
        ema=source_flags.EMA.value, name=_SAMPLER.value)
  streamed.pack_streamed(
      source, target, **how,
      config=source_flags.CONFIG.value, ema=source_flags.EMA.value,
      loras=[_file_and_strength(text) for text in _LORAS.value])


def _file_and_strength(text):
  """'FILE=0.8' as ('FILE', 0.8); without a number the strength is 1."""
  file, _, number = text.rpartition('=')
  try:
    return file, float(number)
  except ValueError:
    return text, 1.0


if __name__ == '__main__':
  cli.run(main)
