"""The section with the errors of quantization strategies on AALs (figure 4)."""

from collections.abc import Mapping

import numpy as np

from msfp_jax.base import progress as progress_lib
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant.fit import Seen
from msfp_jax.report import numbers
from msfp_jax.report import section as section_lib
from msfp_jax.report import svg
from msfp_jax.report.section import Source

STRATEGIES = {
    'signed FP': fit_lib.SIGNED,
    'signed FP + zero point': fit_lib.Candidates(
        signed=True, zero_points='silu'),
    'unsigned FP': fit_lib.Candidates(signed=False),
    'unsigned FP + zero point': fit_lib.UNSIGNED,
}
BASE, MSFP = 'signed FP', 'unsigned FP + zero point'
# Of a layer; the least error of so many differs little from that of all.
_MAX_VALUES = 4096
_ROWS = 20  # a drawing


def search(activations: Mapping[str, Seen], bits: int
           ) -> dict[str, dict[str, float]]:
  """Searches the least error by layer and strategy.

  Args:
    activations: of the layers; of each at most 4,096 values are searched,
      spread evenly over the sample, and so over the timesteps.
    bits: of the formats.
  """
  found = {}
  progress = progress_lib.Progress('report: strategies, layers',
                                   len(activations))
  for i, (name, seen) in enumerate(activations.items(), 1):
    size = len(seen.values)
    # Spread over all of them: values lie in the order of the timesteps, and the
    # first ones are of the noisiest alone.
    places = np.linspace(0, size - 1, min(size, _MAX_VALUES)).astype(int)
    found[name] = {
        strategy: candidates.search(seen.values[places], bits).mse
        for strategy, candidates in STRATEGIES.items()}
    progress.update(i)
  return found


def section(source: Source) -> section_lib.Section | None:
  layers = source.layers
  quantized = {name: layer for name, layer in layers.items()
               if layer.kind == 'AAL' and not layer.act.is_full}
  if not quantized:
    return None
  # At the fewest bits, where formats differ most.
  bits = min(layer.act.bits for layer in quantized.values())
  activations = source.experiment.activations
  errors = search({name: activations[name] for name, layer in quantized.items()
                   if layer.act.bits == bits}, bits)
  # No error at all, as of a constant input, has no place on the axis.
  ratios = {name: {strategy: row[strategy] / row[BASE] for strategy in row}
            for name, row in errors.items() if min(row.values()) > 0}
  if not ratios:
    return None
  medians = {strategy: float(np.median([row[strategy]
                                        for row in ratios.values()]))
             for strategy in STRATEGIES}
  wins = sum(row[MSFP] < 1 for row in ratios.values())
  said = ', '.join(f'{strategy} {numbers.significant(value)}'
                   for strategy, value in medians.items())
  text = (
      f'The least mean squared error of each strategy at {bits} bits on the '
      f'inputs of the {len(ratios)} AALs of that width, relative to signed FP. '
      f'Formats, scales and zero points (-0.3 to 0) are those of the search, '
      f'on at most {_MAX_VALUES:,} sampled values a layer. Medians: {said}. '
      f'Unsigned FP with a zero point has less error than signed FP on {wins} '
      f'of {len(ratios)}. After figure 4 of the paper.')
  names = sorted(ratios, key=lambda name: ratios[name][MSFP])
  seen = [value for row in ratios.values() for value in row.values()]
  # The same for all drawings, so that they can be compared.
  limits = 0.85 * min(seen), max(seen) / 0.85
  drawn = [_figure(f'strategies-{i}', {n: ratios[n] for n in part}, limits)
           for i, part in enumerate(_parts(names))]
  return section_lib.figures(
      'strategies', 'Error by strategy across AALs', 'Strategies', text, drawn)


def _parts(names: list[str]) -> list[list[str]]:
  count = -(-len(names) // _ROWS)
  # Parts of nearly one size, none with a single layer left over.
  return [list(part) for part in np.array_split(names, count)]


def _figure(id: str, ratios: Mapping[str, Mapping[str, float]],
            limits: tuple[float, float]) -> section_lib.Figure:
  names = list(ratios)
  gains = sorted(1 / ratios[name][MSFP] for name in names)
  label = (
      f'Mean squared error relative to signed FP on {len(names)} AALs. The '
      f'gain of {MSFP} over signed FP goes from {numbers.ratio(gains[0])} to '
      f'{numbers.ratio(gains[-1])}, median '
      f'{numbers.ratio(float(np.median(gains)))}; most on {names[0]}.')
  caption = (
      'Mean squared error over that of signed FP (no unit, logarithmic; left '
      'of 1 is better), by layer, the largest gain of unsigned FP with a zero '
      f'point on top: {numbers.ratio(gains[-1])} to '
      f'{numbers.ratio(gains[0])}, median '
      f'{numbers.ratio(float(np.median(gains)))}.')

  def paint(figure):
    axes = figure.add_subplot()
    y = range(len(names))
    axes.axvline(1, color=svg.MUTED, linewidth=1.5, label=BASE)
    for strategy, colour, marker in zip(
        [name for name in STRATEGIES if name != BASE],
        (svg.GREEN, svg.ORANGE, svg.BLUE), svg.MARKERS, strict=False):
      axes.plot([ratios[name][strategy] for name in names], y, marker,
                color=colour, markersize=5, label=strategy, linestyle='none')
    axes.set_xlim(limits)
    svg.log_axis(axes, 'x')
    axes.set_yticks(y, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel('MSE relative to signed FP')
    axes.figure.legend(loc='outside upper left', ncols=1)

  return section_lib.Figure(
      svg.draw(id, 130 + 16 * len(names), label, paint), caption)
