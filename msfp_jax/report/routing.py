"""The section with the router's choices over timesteps (figure 7)."""

from collections.abc import Mapping
import itertools

from matplotlib import patches
from matplotlib import path as path_lib
import numpy as np

from msfp_jax.report import numbers
from msfp_jax.report import section as section_lib
from msfp_jax.report import svg
from msfp_jax.report.section import Source

_MAX_HEIGHT = 900
# Of the banks in the map: not everyone sees the colours.
_HATCHES = ('', '////', '....', '----')


def choices_of(source: Source) -> dict[str, np.ndarray]:
  """The bank of every step, int `[S]`, by layer that has several."""
  deployed = source.deployed
  # One bank is no choice, and a row of one colour.
  return {name: np.asarray(choice) for name, choice in deployed.choices.items()
          if deployed.layers[name].num_banks > 1}


def bank_shares(choices: Mapping[str, np.ndarray]) -> np.ndarray:
  """The share of the layers that use each bank at each step, `[banks, S]`."""
  table = np.stack(list(choices.values()))
  return np.stack([(table == bank).mean(axis=0)
                   for bank in range(int(table.max()) + 1)])


def section(source: Source) -> section_lib.Section | None:
  choices = choices_of(source)
  if not choices:
    return None
  t = source.experiment.plan.timesteps
  table = np.stack(list(choices.values()))
  # Differs anywhere from its first step.
  changing = int((table != table[:, :1]).any(axis=1).sum())
  text = (
      f'The timestep-aware router picks one LoRA bank a layer at every step. '
      f'{changing} of the {len(choices)} layers with banks use more than one '
      'over the trajectory. After figure 7 of the paper.')
  return section_lib.figures(
      'routing', 'The router\'s choices', 'Router', text,
      [_shares(t, choices), _map(t, choices, changing)])


def _colours(count: int) -> list[str]:
  return [svg.SERIES[i % len(svg.SERIES)] for i in range(count)]


def _axes(figure, t):
  axes = figure.add_subplot()
  axes.grid(False)
  # Steps are equally wide cells, whatever their timesteps; five of them, by
  # their middles, say which t they are.
  places = sorted({round(i) for i in np.linspace(0, len(t) - 1, 5)})
  axes.set_xticks([i + 0.5 for i in places],
                  [numbers.timestep(t[i]) for i in places])
  axes.set_xlim(0, len(t))
  axes.set_xlabel('timestep t (sampling goes from left to right)')
  return axes


def _shares(t: np.ndarray, choices: Mapping[str, np.ndarray]
            ) -> section_lib.Figure:
  found = bank_shares(choices)
  said = '; '.join(
      f'bank {bank}: {100 * row[0]:.0f}% at t = {numbers.timestep(t[0])}, '
      f'{100 * row[-1]:.0f}% at t = {numbers.timestep(t[-1])}, '
      f'{100 * row.mean():.0f}% on average'
      for bank, row in enumerate(found))

  def paint(figure):
    axes = _axes(figure, t)
    edges = np.arange(len(t) + 1)
    for bank, (row, colour) in enumerate(zip(
        found, _colours(len(found)), strict=True)):
      axes.stairs(100 * row, edges, color=colour, linewidth=2,
                  linestyle=svg.DASHES[bank % 4], label=f'bank {bank}',
                  baseline=None)
    axes.grid(True, axis='y')
    axes.set_ylabel('% of the layers')
    axes.set_ylim(-2, 102)
    svg.legend_above(axes, 4)

  return section_lib.Figure(
      svg.draw('routing-shares', 230,
               f'Share of each bank by timestep. {said}.', paint),
      'Layers that use each bank, in percent of the layers with banks, by '
      f'timestep. {said}.')


def _map(t: np.ndarray, choices: Mapping[str, np.ndarray], changing: int
         ) -> section_lib.Figure:
  # Rows get lower where there are many: the map stays on a screen or so.
  pitch = min(10.0, _MAX_HEIGHT / len(choices))
  banks = 1 + max(int(choice.max()) for choice in choices.values())

  def paint(figure):
    axes = _axes(figure, t)
    for bank, colour in enumerate(_colours(banks)):
      if outline := _outline(choices, bank):
        axes.add_patch(patches.PathPatch(
            outline, facecolor=colour, edgecolor=svg.PAPER, linewidth=0,
            hatch=_HATCHES[bank % len(_HATCHES)], label=f'bank {bank}'))
    # Names of blocks that are too low for their text are left out.
    groups = [(name, len(list(rows))) for name, rows in itertools.groupby(
        map(_group, choices))]
    starts = np.cumsum([0] + [size for _, size in groups])
    axes.hlines(starts[1:-1], 0, len(t), color=svg.INK, linewidth=0.6)
    wide = [i for i, (_, size) in enumerate(groups) if size * pitch >= 13]
    axes.set_yticks([(starts[i] + starts[i + 1]) / 2 for i in wide],
                    [groups[i][0] for i in wide])
    axes.tick_params(left=False)
    axes.set_ylim(len(choices), 0)
    svg.legend_above(axes, 4)

  label = (f'Bank of each of {len(choices)} layers at each of {len(t)} '
           f'timesteps. {changing} layers change their bank on the way.')
  return section_lib.Figure(
      svg.draw('routing-map', 90 + pitch * len(choices), label, paint),
      'The bank of every layer (rows, in order of execution; lines part the '
      f'blocks of the model) at every timestep. {changing} of {len(choices)} '
      'layers change their bank on the way.')


def _group(layer: str) -> str:
  """The block that a layer is in: 'down.0' of 'down.0.block.1.conv1'."""
  head, *rest = layer.split('.')
  return f'{head}.{rest[0]}' if rest and rest[0].isdigit() else head


def _outline(choices: Mapping[str, np.ndarray], bank: int
             ) -> path_lib.Path | None:
  """Outlines a bank by rectangles over the steps of each row that use it."""
  #   choices of a row   0 0 0 1 1 0     bank 0:  [0, 3) and [5, 6)
  #
  # One path of rectangles a bank: a rectangle for each cell would be thousands
  # of elements in the page.
  boxes = []
  for row, choice in enumerate(choices.values()):
    start = 0
    for value, run in itertools.groupby(choice.tolist()):
      end = start + len(list(run))
      if value == bank:
        boxes.append(path_lib.Path(
            [(start, row), (end, row), (end, row + 1), (start, row + 1),
             (start, row)], closed=True))
      start = end
  return path_lib.Path.make_compound_path(*boxes) if boxes else None
