"""The section with every layer's error by method: a picture made of a table.

A table, not a drawing: names of layers stay in sight while a phone scrolls
sideways, the numbers can be read aloud and copied, and colours are the page's.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from msfp_jax.report.section import Section
from msfp_jax.report.section import Source

# Of results.json: {part: {layer: dB}}, see `run/layer_error.py`.
_FIELD, _OUTPUT = 'sqnr', 'output'
_ALONE = {'weight': 'weights alone', 'input': 'input alone'}
# Percent of a colour in the paper: so that ink stays readable on it.
_STRONGEST = 55


def section(source: Source) -> Section | None:
  rows = [row for row in source.results['rows']
          if row.get(_FIELD, {}).get(_OUTPUT)]
  if not rows:
    return None
  found = {row['name']: row[_FIELD] for row in rows}
  # In the model's order; rows may lack those that they leave as they are.
  layers = list(dict.fromkeys(
      layer for parts in found.values() for layer in parts[_OUTPUT]))
  values = np.asarray([value for parts in found.values()
                       for value in parts[_OUTPUT].values()])
  middle = float(np.median(values))
  # Colours are spent where most layers are; the few beyond are as strong.
  reach = max(float(np.quantile(np.abs(values - middle), 0.9)), 1e-3)
  colour = lambda value: shade(value, middle, reach)
  means = [float(np.mean(list(parts[_OUTPUT].values())))
           for parts in found.values()]
  return Section('heat', 'Error of every layer by method', 'Error by layer',
                 'heat_map.html', {
      'methods': list(found),
      'rows': [{'layer': layer, 'cells': [
          _cell(parts, layer, colour) for parts in found.values()]}
          for layer in layers],
      'means': [{'text': f'{mean:.1f}', 'style': colour(mean)}
                for mean in means],
      'middle': f'{middle:.1f}', 'label': _label(found, means)})


def shade(value: float, middle: float, reach: float) -> str:
  """A cell's background: blue above the middle, orange below, in CSS.

  Args:
    value: of the cell.
    middle: which has no colour.
    reach: how far from it the colour is the strongest.
  """
  share = min(abs(value - middle) / reach, 1.0)
  name = 'blue' if value > middle else 'orange'
  return (f'background: color-mix(in srgb, var(--{name}) '
          f'{round(_STRONGEST * share)}%, var(--paper))')


def _cell(parts: Mapping[str, Mapping[str, float]], layer: str,
          colour: Any) -> dict[str, str]:
  value = parts[_OUTPUT].get(layer)
  if value is None:
    return {'text': '', 'title': 'not quantized, or without error', 'style': ''}
  alone = [f'{name} {parts[part][layer]:.1f} dB'
           for part, name in _ALONE.items() if layer in parts.get(part, {})]
  return {'text': f'{value:.0f}', 'style': colour(value),
          'title': ', '.join([f'{value:.1f} dB', *alone])}


def _label(found: Mapping[str, Mapping[str, Mapping[str, float]]],
           means: list[float]) -> str:
  """The picture in words."""
  names = list(found)
  best = int(np.argmax(means))
  worst = min((value, layer, name) for name, parts in found.items()
              for layer, value in parts[_OUTPUT].items())
  text = (f'Highest on average: {names[best]}, {means[best]:.1f} dB. '
          if len(names) > 1 else '')
  return (f'{text}Lowest: {worst[2]} on {worst[1]}, {worst[0]:.1f} dB.')
