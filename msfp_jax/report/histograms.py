"""The section with the inputs of a few layers and their grids (figure 1)."""

from collections.abc import Callable, Mapping
import dataclasses

import numpy as np

from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.fit import Seen
from msfp_jax.quant.quantizers import Static
from msfp_jax.report import layers_table
from msfp_jax.report import numbers
from msfp_jax.report import section as section_lib
from msfp_jax.report import svg
from msfp_jax.report.section import Source

_LAYERS_PER_CLASS = 3
_BINS = 120
_TEXT = (
    'Inputs of layers of the full-precision model along its trajectories (the '
    'calibration sample), on a logarithmic scale, and below them the levels '
    'that the input is rounded to. An AAL follows SiLU: its negative values '
    'end at \N{MINUS SIGN}0.28, yet a signed format has nearly half of its '
    'levels below zero. Shown are the AALs that gain most from an unsigned '
    'format with a zero point, each with the best signed grid below, and the '
    'NALs with the largest error relative to their variance; different roles '
    'first, at the fewest bits. After figure 1 of the paper.')


@dataclasses.dataclass(frozen=True)
class Grid:
  """The levels that a tensor is rounded to, and what that costs.

  Attributes:
    name: of the format.
    levels: float64, ascending.
    mse: mean squared error on the values shown.
  """

  name: str
  levels: np.ndarray
  mse: float


def grid_of(quantizer: Static, values: np.ndarray) -> Grid:
  """The grid of a per-tensor quantizer, and its error on `values`."""
  # In float64, for the drawing; the error below is of the quantizer itself.
  levels = quantizer.fmt.levels() * float(quantizer.scale)
  if quantizer.zero_point is not None:
    levels = levels + float(quantizer.zero_point)
  error = np.asarray(quantizer.fake_quant(values), np.float64) - values
  return Grid(str(quantizer.fmt), levels, float(np.mean(error**2)))


def _has_grid(layer: spec_lib.LayerSpec) -> bool:
  """Whether the input has one grid for all of its values."""
  return (isinstance(layer.act, Static) and not layer.act.by_step
          and np.ndim(layer.act.scale) == 0)


def choose(layers: Mapping[str, spec_lib.LayerSpec],
           activations: Mapping[str, Seen],
           count: int = _LAYERS_PER_CLASS) -> tuple[list[str], list[str]]:
  """The layers worth looking at, among those of the fewest bits.

  Returns:
    AALs quantized unsigned with the largest gain, and NALs with the largest
    error relative to their variance; at most `count` each. The first of every
    role come first: layers of one role look alike.
  """
  quantized = {name: layer for name, layer in layers.items()
               if _has_grid(layer) and layers_table.gain(layer)}
  bits = min((layer.act.bits for layer in quantized.values()), default=0)
  # Layers kept at more bits have little to show.
  quantized = {name: layer for name, layer in quantized.items()
               if layer.act.bits == bits}
  aals = [name for name, layer in quantized.items()
          if layer.kind == 'AAL' and not layer.act.fmt.signed]
  aals.sort(key=lambda name: -layers_table.gain(quantized[name]))
  nals = [name for name, layer in quantized.items() if layer.kind == 'NAL']
  nals.sort(key=lambda name: -quantized[name].stats['act_mse'] / max(
      float(np.var(activations[name].values)), 1e-30))
  role = lambda name: layers[name].role
  return _varied(aals, role)[:count], _varied(nals, role)[:count]


def _varied(names: list[str], role: Callable[[str], str]) -> list[str]:
  """Sorts names: the first of every role, then the others."""
  # Of a dict the last entry of a key stays, so reversed it is the first name.
  # Sorting is stable: otherwise the order of names is kept.
  firsts = list({role(name): name for name in reversed(names)}.values())
  return sorted(names, key=lambda name: name not in firsts)


def section(source: Source) -> section_lib.Section | None:
  layers = source.layers
  if not any(map(_has_grid, layers.values())):
    return None
  activations = source.experiment.activations
  aals, nals = choose(layers, activations)
  drawn = [_figure(f'histogram-{i}', name, layers[name],
                   activations[name].values)
           for i, name in enumerate(aals + nals)]
  if not drawn:
    return None
  return section_lib.figures(
      'histograms', 'Activations and their grids', 'Histograms', _TEXT, drawn)


def _figure(id: str, name: str, layer: spec_lib.LayerSpec,
            values: np.ndarray) -> section_lib.Figure:
  grids = [grid_of(layer.act, values)]
  if layer.kind == 'AAL':
    signed = fit_lib.SIGNED.search(values, layer.act.bits)
    # What the layer would have without an unsigned format: the paper's
    # comparison.
    grids.append(grid_of(signed.quantizer(), values))
  costs = ' and of '.join(
      f'{grid.name} ({use}; MSE {numbers.significant(grid.mse)}; '
      f'{np.count_nonzero(grid.levels < 0)} of {len(grid.levels)} levels below '
      'zero)' for grid, use in zip(
          grids, ('in use', 'best signed'), strict=False))
  label = (
      f'Histogram of the inputs of {layer.kind} {name}: from '
      f'{numbers.significant(float(values.min()))} to '
      f'{numbers.significant(float(values.max()))}, '
      f'{100 * float(np.mean(values < 0)):.0f}% negative. Levels of {costs}.')
  caption = ('Number of sampled values over the value of the input (no unit), '
             f'{layer.kind} {name}. Levels of {costs}.')
  return section_lib.Figure(
      svg.draw(id, 230, label,
               lambda figure: _paint(figure, name, layer.kind, values, grids)),
      caption)


def _paint(figure, name: str, kind: str, values: np.ndarray,
           grids: list[Grid]) -> None:
  top, rug = figure.subplots(
      2, sharex=True, height_ratios=[5, 0.9 * len(grids)])
  # From half a value on: the axis is logarithmic, and a bin of one still shows.
  counts, edges = np.histogram(values, _BINS)
  top.stairs(counts, edges, fill=True, baseline=0.5, color=svg.BLUE, alpha=0.35)
  top.stairs(counts, edges, baseline=0.5, color=svg.BLUE, linewidth=1)
  svg.log_axis(top, 'y')
  top.set_ylim(0.5)
  top.set_title(f'{kind} {name}')
  top.tick_params(bottom=False, labelbottom=False)
  for i, (grid, colour) in enumerate(
      zip(grids, (svg.ORANGE, svg.PURPLE), strict=False)):
    rug.vlines(grid.levels, i - 0.38, i + 0.38, color=colour, linewidth=1.6)
  rug.set_yticks(range(len(grids)), [grid.name for grid in grids])
  rug.set_ylim(len(grids) - 0.5, -0.5)
  rug.grid(False)
  rug.spines['left'].set_visible(False)
  rug.tick_params(left=False)
  rug.set_xlabel('value of the input')
