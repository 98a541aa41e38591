"""The section that says what was evaluated, by which command and config."""

from collections.abc import Mapping
import json
from typing import Any

import jax

from msfp_jax.metrics import registry
from msfp_jax.quant.quantizers import Quantizer
from msfp_jax.report import numbers
from msfp_jax.report.section import Section
from msfp_jax.report.section import Source

_NAMES = {'num_samples': 'images', 'is_splitting': 'splits of inception scores'}


def section(source: Source) -> Section:
  facts = _flat({key: value for key, value in source.results.items()
                 if key != 'rows'})
  config = source.experiment.config
  facts['timesteps'] = _timesteps(source)
  facts['JAX'] = jax.__version__
  return Section('overview', 'What this is', 'Overview', 'overview.html', {
      'facts': [(name, _text(value)) for name, value in facts.items()
                if value not in ('', None)],
      'text': f'{_outcome(source)}{_layers(source)}',
      'command': source.command, 'config': json.dumps(config, indent=2)})


def _flat(fields: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Flattens nested fields, to names such as 'reference: vectors'."""
  found = {}
  for key, value in fields.items():
    name = prefix + _NAMES.get(key, key.replace('_', ' '))
    if isinstance(value, Mapping):
      found |= _flat(value, f'{name}: ')
    elif key == 'more_features':
      for network in value:
        found |= _flat(network, f'{network["features"]}: ')
    else:
      found[name] = value
  return found


def _text(value: Any) -> str:
  if isinstance(value, str | int | float | bool):
    return f'{value:,}' if type(value) is int else str(value)
  return json.dumps(value)


def _timesteps(source: Source) -> str:
  t = source.experiment.plan.timesteps
  first, last = numbers.timestep(t[0]), numbers.timestep(t[-1])
  return f'{first} to {last}, {len(t)} steps'


def _outcome(source: Source) -> str:
  """Says how the model shown in detail did: first metric and size."""
  rows = {row['name']: row for row in source.results['rows']}
  full, row = rows.get('fp'), rows.get(source.row)
  if full is None or row is None or row is full:
    return ''
  metrics = {name: column for name, column in registry.columns(
      source.results).items() if isinstance(column, registry.Metric)}
  # The first of the row's own: rows begin with the distance to the data.
  metric = next((key for key in row if key in full and key in metrics), None)
  distance = '' if metric is None else (
      f'{metric} {metrics[metric].format(row[metric])} '
      f'(full precision {metrics[metric].format(full[metric])}), ')
  return (f'Shown in detail is {source.row}: {distance}'
          f'{row["bytes"]:,} bytes ({full["bytes"]:,}). ')


def _is_unsigned(quantizer: Quantizer) -> bool:
  fmt = getattr(quantizer, 'fmt', None)
  return fmt is not None and not fmt.signed


def _layers(source: Source) -> str:
  """Says which layers the model shown in detail quantizes."""
  layers = source.layers.values()
  kinds = [layer.kind for layer in layers]
  unsigned = sum(_is_unsigned(layer.act) for layer in layers
                 if layer.kind == 'AAL')
  quantized = sum(layer.quantized for layer in layers)
  if not quantized:
    return 'Nothing is quantized.'
  return (f'{quantized} of its {len(kinds)} layers are quantized. '
          f'AALs: {kinds.count("AAL")}, {unsigned} of them in an unsigned '
          f'format; NALs: {kinds.count("NAL")}.')
