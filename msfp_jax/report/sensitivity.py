"""The section that tells what every layer and step costs the images."""

from collections.abc import Mapping
from typing import Any

from msfp_jax.report.section import Section
from msfp_jax.report.section import Source

_FIELD = 'sensitivity'  # of a row of results.json, see `run/sensitivity.py`
_NAMED = 10  # of the best and the worst layers
_KINDS = {'layers': 'layer', 'steps': 'step', 'parts': 'part'}
# Heading, and what it means.
COLUMNS = (
    ('#', 'place in the order of execution, of the kind'),
    ('part', 'a layer, a step of the sampler, or the inputs or weights of all '
     'layers or of those of a role'),
    ('kind', 'layer, step or part'),
    ('alone', 'PSNR in dB with this alone quantized'),
    ('restored', 'PSNR in dB with all else quantized'),
    ('gain', 'how much higher that is than with all of it quantized'),
)


def section(source: Source) -> Section | None:
  """Of the row in detail; else of the last one that has been measured."""
  rows = {row['name']: row[_FIELD] for row in source.results['rows']
          if row.get(_FIELD)}
  if not rows:
    return None
  name = source.row if source.row in rows else list(rows)[-1]
  found = rows[name]
  return Section('sensitivity', 'What each layer and step costs',
                 'Sensitivity', 'sensitivity.html', {
      'text': _text(name, found), 'columns': COLUMNS,
      'kind_column': [column for column, _ in COLUMNS].index('kind'),
      'kinds': list(_KINDS.values()),
      'rows': [[_cell(value) for value in row] for row in table(found)]})


def table(found: Mapping[str, Any]) -> list[list[Any]]:
  """The values by part and column."""
  return [[i, part, kind, cost['alone'], cost['restored'],
           cost['restored'] - found['quantized']]
          for field, kind in _KINDS.items()
          for i, (part, cost) in enumerate(found[field].items(), 1)]


def _cell(value: Any) -> dict[str, Any]:
  if isinstance(value, float):
    return {'value': value, 'text': f'{value:.2f}', 'number': True}
  return {'value': value, 'text': str(value), 'number': isinstance(value, int)}


def _text(name: str, found: Mapping[str, Any]) -> str:
  """What the table says, in sentences."""
  whole = found['quantized']
  sides = [f'{found["parts"][side]["alone"]:.1f} dB with its {side} alone'
           for side in ('weights', 'inputs')]
  text = (f'PSNR of {name} to full precision, over {found["images"]} images '
          f'from the same noise: {whole:.1f} dB, {" and ".join(sides)}. ')
  gains = {layer: cost['restored'] - whole
           for layer, cost in found['layers'].items()}
  order = sorted(gains, key=gains.get, reverse=True)
  if len(order) < 2 * _NAMED:
    return text + _said('Most is gained by', order[:_NAMED], gains)
  return (text + _said('Most is gained by', order[:_NAMED], gains)
          + _said(' Least by', order[-_NAMED:], gains))


def _said(begin: str, layers: list[str], gains: Mapping[str, float]) -> str:
  return (f'{begin} one layer in full precision: ' + ', '.join(
      f'{layer} ({gains[layer]:+.2f} dB)' for layer in layers) + '.')
