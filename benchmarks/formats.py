"""Formats of 4 bits side by side, on numbers drawn at random.

  python -m benchmarks.formats [--tokens=2048] [--cost]

Prints the signal-to-noise ratio of every format on five distributions, in dB;
with --cost how long every recipe takes to quantize an input, smoothing and
rotation included, against one pass over the same numbers. Both as Markdown
tables.
"""

from collections.abc import Iterator
import functools

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from msfp_jax.base import markdown
from msfp_jax.quant import block_formats
from msfp_jax.quant import calibrate
from msfp_jax.quant import recipes
from msfp_jax.quant.around import Around
from msfp_jax.quant.block import Block
from msfp_jax.quant.dual_scale import DualScale
from msfp_jax.quant.fit import restored
from msfp_jax.quant.fit import Seen
from msfp_jax.quant.quantizers import Quantizer
from msfp_jax.quant.quantizers import Static
from msfp_jax.quant.suppress import first_stage
from msfp_jax.quant.suppress import quartz
from msfp_jax.run import cli

_TOKENS = flags.DEFINE_integer('tokens', 2048, 'Rows of numbers.')
_COST = flags.DEFINE_bool('cost', False, 'Measures time instead.')

CHANNELS = 1024
OUTLIERS, FACTOR = CHANNELS // 100, 30
# Name -> quantizer of inputs.
FORMATS = {
    'INT4, a token': Block(block_formats.int_group(4).fmt, 'token'),
    'INT4, groups of 64': block_formats.int_group(4),
    'QuaRTZ, a token, 16, truncated': quartz(4, rounding='truncate'),
    'QuaRTZ, a token, 16': quartz(4),
    'QuaRTZ, a token, 32': quartz(4, group=32),
    'QuaRTZ, groups of 64, 16': quartz(4, first_stage(shared='group',
                                                      group=64)),
    'QuaRTZ, unsigned, a token, 16': quartz(4, first_stage(signed=False)),
    'QuaRTZ, unsigned, groups of 64, 16': quartz(
        4, first_stage(False, 'group', 64)),
    'MXFP4, floor': block_formats.mxfp4(4),
    'MXFP4, even': block_formats.mxfp4(4, 'even'),
    'MXFP4, optimal': block_formats.mxfp4(4, 'optimal'),
    'NVFP4': block_formats.nvfp4(4),
}


def distributions(rows: int, seed: int = 3) -> dict[str, np.ndarray]:
  """{name: float32 `[rows, CHANNELS]`}, independent numbers.

  In the last the same 1 % of channels of all rows are 30 times as large;
  `seed` draws which. How many of these share a group moves that column by up to
  0.8 dB.
  """
  shape, rng = (rows, CHANNELS), np.random.default_rng(0)
  normal = rng.standard_normal(shape)
  channels = np.random.default_rng(seed).choice(CHANNELS, OUTLIERS, False)
  scaled = rng.standard_normal(shape)
  scaled[:, channels] *= FACTOR
  twice = 2 * rng.standard_normal(shape)
  found = {'gauss': normal, 'laplace': rng.laplace(size=shape),
           't3': rng.standard_t(3, shape), 'SiLU(2g)': twice / (
               1 + np.exp(-twice)), 'outlier channels': scaled}
  return {name: np.float32(x) for name, x in found.items()}


def sqnr(quantizer: Quantizer, x: np.ndarray) -> float:
  """10 log10(sum x^2 / sum (x - Q(x))^2) of one image, in float64."""
  back = np.float64(restored(quantizer, x[None], -1)[0])
  exact = np.float64(x)
  return float(10 * np.log10((exact**2).sum() / ((exact - back)**2).sum()))


def table(rows: int) -> list[list[str]]:
  """A row a format: name, bits of an element with its scales, dB."""
  data = distributions(rows)
  return [[name, f'{bits_of(quantizer):.2f}',
           *[f'{sqnr(quantizer, x):.2f}' for x in data.values()]]
          for name, quantizer in FORMATS.items()]


def bits_of(quantizer: Quantizer, channels: int = CHANNELS) -> float:
  """Bits of an element of an image `[1, 128, channels]`, scales counted."""
  shape = jax.ShapeDtypeStruct((1, 128, channels), jnp.float32)
  tensor = jax.eval_shape(quantizer.quantize, shape)
  return tensor.nbits / shape.size


def seen_of(channels: int, rows: int = 256) -> dict[str, Seen]:
  """{'nal', 'aal': what calibration would see}: normal numbers, and SiLU's."""
  normal = np.random.default_rng(0).standard_normal(
      (rows, channels), np.float32)
  found = {'nal': normal, 'aal': np.asarray(jax.nn.silu(2 * normal))}
  return {part: Seen(
      values=x.ravel(), minimum=float(x.min()), maximum=float(x.max()), rows=x,
      channel_maxima=np.abs(x).max(0)) for part, x in found.items()}


def inputs_of(recipe: recipes.Recipe, channels: int = 256, bits: int = 4
              ) -> dict[str, tuple[Around, Quantizer]]:
  """{'nal', 'aal': what a layer's input goes through}, as calibration finds it.

  Args:
    recipe: any but those of GPTQ, which leaves inputs alone.
    channels: of the layer's input.
    bits: of both sides.
  """
  kernel = np.random.default_rng(1).standard_normal((channels, 64), np.float32)
  found = {}
  for part, seen in seen_of(channels).items():
    layer = calibrate.fit_layer(recipe, '', seen, kernel, bits, bits)
    around = layer.around or Around()
    # The branch is a product, and no part of quantization.
    found[part] = around.replace(down=None, up=None), layer.act
  return found


def cost(channels: int = 256, pairs: int = 15) -> Iterator[list[str]]:
  """Rows: recipes, what inputs go through, median ratio, milliseconds."""
  # An image's pixels: 256 images of 16 x 16 by 256 channels are 64 MB.
  x = jax.random.normal(
      jax.random.key(0), (2**24 // channels // 256, 16, 16, channels))
  plain = jax.jit(lambda x: x * 0.3 + 0.25)
  timed = {}
  for name, recipe in recipes.RECIPES.items():
    for part, through in inputs_of(recipe, channels).items():
      # Scales are values, which cost alike: once for all recipes that differ in
      # nothing else.
      _, names = timed.setdefault(jax.tree.structure(through), (through, []))
      names.append(f'{name} ({part})')
  for (around, quantizer), names in timed.values():
    run = jax.jit(lambda x, around, quantizer: quantizer.fake_quant(
        around.input(x)))
    mine, base, ratio = machine.paired(
        functools.partial(run, x, around, quantizer),
        functools.partial(plain, x), pairs=pairs)
    yield [', '.join(names), shown(around, quantizer), f'{ratio:.2f}x',
           f'{mine * 1e3:.1f} / {base * 1e3:.1f}']


def shown(around: Around, quantizer: Quantizer) -> str:
  """What an input goes through, in words."""
  parts = quantizer.describe()
  # Of a scale from calibration the number says nothing here.
  known = {Static: 'static', DualScale: 'static, one a sign'}
  words = [parts['format'], known.get(type(quantizer), parts['scale'])]
  if 'zero_point' in parts:
    words.append('zero point')
  if around.smooth is not None:
    words.append('smoothed')
  if around.rotation:
    words.append(f'{around.rotation} channels rotated')
  return ', '.join(words)


def main(argv):
  del argv
  if _COST.value:
    heads, rows = ['recipe', 'inputs', 'of x * a + b', 'ms'], [*cost()]
  else:
    heads = ['format', 'bits', *distributions(1)]
    rows = table(_TOKENS.value)
  print(markdown.table(heads, rows))


if __name__ == '__main__':
  cli.run(main)
