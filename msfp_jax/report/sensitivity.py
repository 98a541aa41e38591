"""The section that tells what every layer and step costs the images."""

from collections.abc import Mapping
from typing import Any

from msfp_jax.report import sortable
from msfp_jax.report.section import Section
from msfp_jax.report.section import Source

_TITLE = 'What each layer and step costs'
_FIELD = 'sensitivity'  # of a row of results.json, see `run/sensitivity.py`
_NAMED = 10  # of the best and the worst layers
_KINDS = {'layers': 'layer', 'steps': 'step', 'groups': 'group'}
# Heading, and what it means.
COLUMNS = (
    ('#', 'place in the order of execution, of the kind'),
    ('part', 'a layer, a step of the sampler, or the inputs or weights of all '
     'layers or of those of a role'),
    (sortable.KIND, 'layer, step, or group: a role, or one side'),
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
  return Section('sensitivity', _TITLE, 'Sensitivity', 'sensitivity.html', {
      'text': _text(name, found), 'table': sortable.table(
          'sensitivity', _TITLE, 'rows', COLUMNS, table(found),
          list(_KINDS.values()), '{:.2f}'.format)})


def table(found: Mapping[str, Any]) -> list[list[Any]]:
  """The values by part and column."""
  return [[i, part, kind, cost.get('alone'), cost.get('restored'),
           _gain(cost, found)]
          for field, kind in _KINDS.items()
          for i, (part, cost) in enumerate(found[field].items(), 1)]


def _gain(cost: Mapping[str, float], found: Mapping[str, Any]) -> float | None:
  """What a part back in full precision brings; None where that ran away."""
  if 'restored' not in cost:
    return None
  return cost['restored'] - found['quantized']


def _text(name: str, found: Mapping[str, Any]) -> str:
  """What the table says, in sentences."""
  sides = ' and '.join(
      f'{found["groups"][side]["alone"]:.1f} dB with its {side} alone'
      for side in ('weights', 'inputs') if 'alone' in found['groups'][side])
  text = (f'PSNR of {name} to full precision, over {found["images"]} images '
          'from the same noise, without a correction of drift: '
          f'{found["quantized"]:.1f} dB with all of it quantized'
          f'{f", {sides}" if sides else ""}. ')
  gains = {layer: gain for layer, cost in found['layers'].items()
           if (gain := _gain(cost, found)) is not None}
  order = sorted(gains, key=gains.get, reverse=True)
  # Of few layers all are among the first.
  text += _said('The layers that cost most', order[:_NAMED], gains)
  if len(order) > _NAMED:
    text += ' ' + _said('Those that cost least', order[_NAMED:][-_NAMED:],
                        gains)
  return text


def _said(begin: str, layers: list[str], gains: Mapping[str, float]) -> str:
  named = ', '.join(f'{layer} ({gains[layer]:+.2f} dB)' for layer in layers)
  return f'{begin}, by what one of them in full precision brings: {named}.'
