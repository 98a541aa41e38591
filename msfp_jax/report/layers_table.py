"""The section with every layer's class, formats, scales and error."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.quantizers import Quantizer
from msfp_jax.report import numbers
from msfp_jax.report import sortable
from msfp_jax.report.section import Section
from msfp_jax.report.section import Source

# Heading, and what it means.
COLUMNS = (
    ('#', 'place in the order of execution'),
    ('layer', 'name of the layer'),
    ('role', 'what the layer is; exceptions from the bits go by it'),
    (sortable.KIND, 'AAL: its input follows SiLU or the like; NAL: any other'),
    ('input', 'number format of the input; U is unsigned'),
    ('scale', 'of the input; the largest level is scale times the format\'s '
     'maximum'),
    ('zero point', 'of the input; only unsigned formats have one'),
    ('MSE', 'mean squared error of the quantized input, at calibration'),
    ('gain', 'MSE of the best signed format over that of the one chosen, at '
     'calibration; 1 where signed was chosen'),
    ('weight', 'number format of the weight'),
    ('weight MSE', 'mean squared error of the quantized weight, at '
     'calibration'),
)


def gain(layer: spec_lib.LayerSpec) -> float | None:
  """The error of the best signed input over the chosen one's, or None."""
  # Measured at calibration: the report searches nothing again.
  signed = layer.stats.get('act_signed_mse')
  chosen = layer.stats.get('act_mse')
  return signed / chosen if signed is not None and chosen else None


def rows(layers: Mapping[str, spec_lib.LayerSpec]) -> list[list[Any]]:
  """The values by layer and column; None where there is nothing."""
  found = []
  for i, (name, layer) in enumerate(layers.items(), 1):
    act, weight = layer.act, layer.weight
    found.append([
        i, name, layer.role, layer.kind, _format_of(act),
        _shown(act, 'scale'), _shown(act, 'zero_point'),
        layer.stats.get('act_mse'), gain(layer), _format_of(weight),
        layer.stats.get('weight_mse')])
  return found


def _format_of(quantizer: Quantizer) -> str | None:
  return None if quantizer.is_full else quantizer.describe()['format']


def _shown(quantizer: Quantizer, field: str) -> float | str | None:
  """A number where there is one for the whole tensor, else a phrase."""
  value = getattr(quantizer, field, None)
  if value is not None and np.ndim(value) == 0:
    return float(np.asarray(value))
  return quantizer.describe().get(field)


def section(source: Source) -> Section | None:
  layers = source.layers
  if not any(layer.quantized for layer in layers.values()):
    return None
  gains = [gain(layer) for layer in layers.values() if layer.kind == 'AAL']
  gains = [value for value in gains if value is not None]
  return Section('layers', f'Layers of {source.row}', 'Layers', 'layers.html', {
      'table': sortable.table(
          'layers', 'Layers', 'layers', COLUMNS, rows(layers),
          sorted({layer.kind for layer in layers.values()}),
          numbers.significant),
      'median_gain': numbers.ratio(float(np.median(gains))) if gains else ''})
