"""What 4 bits leave of inputs behind GELU, by every recipe.

  python -m benchmarks.gelu_inputs [--heads=3] [--draws=3] [--names=NAME,...]

Prints Markdown tables: how the inputs of three kinds of random weights are
distributed (`gelu_cases` says which), the signal-to-noise ratio in dB of a
layer's input, of its output, and of its output by an exact input, and the
second layer of FLUX's single blocks, a part of whose input is attention's, as
two layers and as one. Calibration sees one batch, and another one is measured.
Means and standard deviations are over draws of weights.
"""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import math
import statistics
from typing import NamedTuple

from absl import flags
import jax.numpy as jnp
import numpy as np

from benchmarks import formats
from benchmarks import gelu_cases
from benchmarks.gelu_cases import Case
from msfp_jax.base import markdown
from msfp_jax.base import progress as progress_lib
from msfp_jax.quant import calibrate
from msfp_jax.quant import recipes
from msfp_jax.quant import suppress
from msfp_jax.quant.around import Around
from msfp_jax.quant.around import hadamard
from msfp_jax.quant.fit import Fit
from msfp_jax.quant.fit import Fitted
from msfp_jax.quant.fit import restored
from msfp_jax.quant.recipes import Recipe
from msfp_jax.quant.spec import LayerSpec
from msfp_jax.run import cli

_HEADS = flags.DEFINE_integer(
    'heads', 3, 'Of 128 channels; FLUX.1 has 24.', lower_bound=1)
_DRAWS = flags.DEFINE_integer('draws', 3, 'Of weights.', lower_bound=2)
_NAMES = flags.DEFINE_list('names', [], 'Recipes; all of them if empty.')

BITS = 4
# What deepcompressor adds to inputs behind GELU, so that none is negative.
SHIFT = 0.171875
# {row: (recipe, what is added to inputs behind GELU)}; recipes as they are, and
# what others do with the same inputs.
SHIFTED = 'svdquant shifted'
ROWS: dict[str, tuple[Recipe, float]] = {
    **{name: (recipe, 0.0) for name, recipe in recipes.RECIPES.items()},
    SHIFTED: (recipes.RECIPES['svdquant'], SHIFT),
    'quartz signed': (
        recipes.quartz(unsigned=suppress.first_stage()), 0.0),
    'quartz by 64': (recipes.quartz(
        signed=suppress.first_stage(shared='group', group=64),
        unsigned=suppress.first_stage(False, 'group', 64)), 0.0)}


class Outcome(NamedTuple):
  """A layer before and after quantization, float64.

  Attributes:
    x: its input `[B, N, I]`.
    x_back: the same, quantized.
    y: its output `[B, N, O]`, without the bias.
    y_back: that of quantized input and weights.
    y_weights: that of the exact input and quantized weights.
    bits: of an element of the input, scales and shifts counted.
  """

  x: np.ndarray
  x_back: np.ndarray
  y: np.ndarray
  y_back: np.ndarray
  y_weights: np.ndarray
  bits: float


def decibels(exact: np.ndarray, back: np.ndarray) -> float:
  """10 log10(sum of squares / sum of squared errors); inf without errors."""
  exact, back = np.float64(exact), np.float64(back)
  noise = ((exact - back)**2).sum()
  return 10 * math.log10((exact**2).sum() / noise) if noise else math.inf


def run(layer: LayerSpec, x: np.ndarray, kernel: np.ndarray,
        shift: float = 0.0) -> Outcome:
  """A layer's input and output in full precision, and quantized.

  Args:
    layer: quantizers, and what stands around the product.
    x: float32 `[B, N, I]`.
    kernel: float32 `[I, O]`.
    shift: is added to x before all else; what it adds to the output of the
      quantized weights is taken off, as a bias can do.
  """
  around = layer.around or Around()
  moved = around.input(x + np.float32(shift))
  offset = np.float64(around.input(jnp.full(x.shape[-1:], np.float32(shift))))
  back = np.float64(restored(layer.act, moved, -1)) - offset
  given = np.float64(moved) - offset
  weights = np.float64(restored(
      layer.weight, jnp.asarray(around.residual(kernel)), -2))
  # In 16 bits, and no part of what is quantized.
  branch = 0 if around.down is None else given @ np.float64(around.low_rank())
  exact = np.float64(x)
  return Outcome(exact, _unmoved(around, back), exact @ np.float64(kernel),
                 back @ weights + branch, given @ weights + branch,
                 formats.bits_of(layer.act, x.shape[-1]))


def _unmoved(around, x):
  """The inverse of `around.input`, in float64."""
  if size := around.rotation:
    matrix = np.float64(hadamard(jnp.eye(size), size))
    x = (x.reshape(*x.shape[:-1], -1, size) @ matrix).reshape(x.shape)
  return x if around.smooth is None else x * np.float64(around.smooth)


@dataclasses.dataclass(frozen=True)
class _Once(Fit):
  """A fit of one layer's weights, which all recipes that have it share."""

  of: Fit
  found: dict[Fit, Fitted] = dataclasses.field(compare=False)

  @property
  def needs(self):
    return self.of.needs

  def __call__(self, seen, bits, axis):
    if self.of not in self.found:
      self.found[self.of] = self.of(seen, bits, axis)
    return self.found[self.of]


def outcomes(case: Case, names: Sequence[str]
             ) -> Iterator[tuple[str, Outcome]]:
  """Yields (row of ROWS, what it makes of a layer), one in memory at a time."""
  weights: dict[Fit, Fitted] = {}
  seen = gelu_cases.seen_of(case.given)
  follows = calibrate.is_aal(seen.minimum, seen.maximum)
  for name in names:
    recipe, shift = ROWS[name]
    shift *= follows
    if recipe.around is None:  # else each has its own W'
      recipe = dataclasses.replace(recipe, weight=_Once(recipe.weight, weights))
    layer = calibrate.fit_layer(
        recipe, '', gelu_cases.seen_of(case.given + np.float32(shift)),
        case.kernel, BITS, BITS)
    yield name, run(layer, case.x, case.kernel, shift)


# {(row, column): a figure a draw}.
Figures = dict[tuple[str, str], list[float]]


def add_feed_forward(figures: Figures, case: Case, kind: str,
                     names: Sequence[str]) -> None:
  """Adds input and output of the feed-forward layer's second layer."""
  for name, one in outcomes(case, names):
    figures[name, 'bits'].append(one.bits)
    figures[name, f'{kind}: input'].append(decibels(one.x, one.x_back))
    figures[name, f'{kind}: output'].append(decibels(one.y, one.y_back))
    figures[name, f'{kind}: weights alone'].append(
        decibels(one.y, one.y_weights))


def add_single(figures: Figures, attention: Case, gelu: Case,
               names: Sequence[str]) -> None:
  """Adds the second layer of a single block, as two layers and as one."""
  cases = (attention, gelu, gelu_cases.joined(attention, gelu))
  for each in zip(*(outcomes(case, names) for case in cases), strict=True):
    (name, first), (_, second), (_, whole) = each
    widths = first.x.shape[-1], second.x.shape[-1]
    columns = {
        'two: bits': np.average([first.bits, second.bits], weights=widths),
        "attention's output": decibels(first.y, first.y_back),
        "GELU's output": decibels(second.y, second.y_back),
        'two: output': decibels(
            first.y + second.y, first.y_back + second.y_back),
        'one: bits': whole.bits,
        'one: output': decibels(whole.y, whole.y_back)}
    for column, value in columns.items():
      figures[name, column].append(value)


def table(figures: Figures) -> str:
  """Rows by columns, in the order of the figures; means ± deviations."""
  names, columns = (list(dict.fromkeys(part)) for part in zip(
      *figures, strict=True))
  return markdown.table(['', *columns], [
      [name, *[_cell(figures[name, column], column) for column in columns]]
      for name in names])


def _cell(values, column):
  mean = f'{statistics.fmean(values):.2f}'
  return mean if 'bits' in column else (
      f'{mean} ± {statistics.stdev(values):.2f}')


def main(argv):
  del argv
  names = _NAMES.value or list(ROWS)
  if unknown := sorted(set(names) - set(ROWS)):
    raise ValueError(f'--names={unknown}: must be of {list(ROWS)}')
  inputs, behind, single = (collections.defaultdict(list) for _ in range(3))
  progress = progress_lib.Progress(
      'layers', _DRAWS.value * len(gelu_cases.KINDS), compiles=True)
  done = 0
  for seed in range(_DRAWS.value):
    for kind in gelu_cases.KINDS:
      cases = gelu_cases.cases(_HEADS.value, kind, seed)
      case = cases[gelu_cases.FEED_FORWARD]
      for column, value in gelu_cases.statistics(case).items():
        inputs[kind, column].append(value)
      add_feed_forward(behind, case, kind, names)
      if kind == gelu_cases.UNEVEN:
        add_single(single, cases[gelu_cases.ATTENTION_HALF],
                   cases[gelu_cases.GELU_HALF], names)
      progress.update(done := done + 1)
  print('\n\n'.join(map(table, (inputs, behind, single))))


if __name__ == '__main__':
  cli.run(lambda argv: cli.guard(lambda: main(argv)))
