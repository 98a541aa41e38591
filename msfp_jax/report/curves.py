"""The section with training curves, from metrics.jsonl."""

from collections.abc import Mapping
import json
import pathlib
import re

import numpy as np

from msfp_jax.report import numbers
from msfp_jax.report import section as section_lib
from msfp_jax.report import svg
from msfp_jax.report.section import Source

_MAX_POINTS = 120
# What stands in one drawing: its title, and which scalars it shows. Others
# have a drawing each; timesteps are no result.
_DRAWINGS = {
    'loss': 'loss|mse', 'gradients (L2 norm)': 'l2_grads.*',
    'learning rate': '.*learning_rate.*', 'share of each bank': r'bank_\d+',
}
_HIDDEN = 't'
# What the names in the log mean.
_MEANINGS = {
    'finetune/loss': 'loss weighted with gamma_t, with what `direction` adds',
    'finetune/mse': "MSE of the noise to the teacher's, not weighted"}

Curves = dict[str, tuple[np.ndarray, np.ndarray]]


def read(path: pathlib.Path) -> Curves:
  """Reads a metrics.jsonl as {scalar: (steps `[N]`, values `[N]`)}.

  Lines that are damaged, as the last of a killed training, are left out.
  """
  if not path.is_file():
    return {}
  found = {}
  with open(path, encoding='utf-8') as file:
    # Line by line, as a training may still write: its last line may be half
    # there.
    for line in file:
      try:
        row = json.loads(line)
        step = row.pop('step')
      except (ValueError, KeyError, AttributeError):
        continue
      for name, value in row.items():
        if value is not None:
          found.setdefault(name, []).append((step, value))
  return {name: tuple(np.asarray(pairs, np.float64).T)
          for name, pairs in found.items()}


def binned(steps: np.ndarray, values: np.ndarray, period: int = 1,
           max_points: int = _MAX_POINTS) -> tuple[np.ndarray, ...]:
  """Centre, mean, least and largest value of groups of consecutive steps.

  Args:
    steps: `[N]`, ascending.
    values: `[N]`.
    period: groups are as long as this or a multiple, so that what repeats
      with it averages out; the last may be shorter.
    max_points: groups at most.

  Returns:
    Four arrays `[G]`.
  """
  # The fewest whole periods a group that leave no more groups than asked for.
  length = period * -(-len(steps) // (period * max_points))
  starts = np.arange(0, len(steps), length)
  groups = [np.split(a, starts[1:]) for a in (steps, values)]
  centre = np.array([part.mean() for part in groups[0]])
  return (centre, *(np.array([reduce(part) for part in groups[1]])
                    for reduce in (np.mean, np.min, np.max)))


def grouped(curves: Curves) -> dict[str, Curves]:
  """Sorts the curves of one run into drawings, {title: curves}."""
  found = {}
  for name, curve in curves.items():
    short = name.rpartition('/')[2]
    title = next((title for title, pattern in _DRAWINGS.items()
                  if re.fullmatch(pattern, short)), short)
    if short != _HIDDEN:
      found.setdefault(title, {})[name] = curve
  # Known drawings in their order, then others as the log has them.
  order = [*_DRAWINGS, *found]
  return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def section(source: Source) -> section_lib.Section | None:
  workdir = pathlib.Path(source.workdir)
  drawn = []
  for run, path, period in (
      ('fine-tuning', workdir / 'metrics.jsonl',
       source.experiment.plan.num_steps),
      ('pre-training', workdir / 'pretrain/metrics.jsonl', 1)):
    for title, curves in grouped(read(path)).items():
      drawn.append(_figure(f'curves-{len(drawn)}', run, title, {
          name: (len(curve[0]), binned(*curve, period))
          for name, curve in curves.items()}))
  if not drawn:
    return None
  text = ('Scalars that training logged, by update. Lines are means over '
          'consecutive updates; bands go from the least to the largest value '
          'among these. One update of fine-tuning is one timestep: there, '
          'means are over whole trajectories.')
  return section_lib.figures('curves', 'Training curves', 'Training', text,
                             drawn)


def _figure(id: str, run: str, title: str,
            curves: Mapping[str, tuple[int, tuple[np.ndarray, ...]]]
            ) -> section_lib.Figure:
  """Draws {scalar: (updates, what `binned` returned)}."""
  points = {name: groups for name, (_, groups) in curves.items()}
  updates = max(count for count, _ in curves.values())
  said = '; '.join(
      f'{_name(name)} from {numbers.significant(mean[0])} to '
      f'{numbers.significant(mean[-1])}'
      for name, (_, mean, _, _) in points.items())

  def paint(figure):
    axes = figure.add_subplot()
    lowest = min(low.min() for _, _, low, _ in points.values())
    for i, (name, (centre, mean, low, high)) in enumerate(points.items()):
      colour = svg.SERIES[i % len(svg.SERIES)]
      # Bands of many series would cover each other.
      if len(points) <= 2 and lowest > 0:
        axes.fill_between(centre, low, high, color=colour, alpha=0.18,
                          linewidth=0)
      axes.plot(centre, mean, color=colour, label=_name(name),
                linestyle=svg.DASHES[i % 4], markersize=3.5,
                marker=svg.MARKERS[i % 4] if len(centre) <= 40 else '')
    if lowest > 0:
      svg.log_axis(axes, 'y')
    axes.set_xlabel('update')
    axes.set_ylabel(title)
    axes.set_xlim(0, updates)
    svg.legend_above(axes, 1)

  return section_lib.Figure(
      svg.draw(id, 230 + 15 * len(points),
               f'{run}, {updates:,} updates: {said}.', paint),
      f'{run.capitalize()}: {title} over {updates:,} updates; {said}.')


def _name(name: str) -> str:
  return _MEANINGS.get(name, name.rpartition('/')[2].replace('_', ' '))
