"""QuantSpec: how every layer of a model is quantized, and its JSON file."""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from msfp_jax.base import files
from msfp_jax.base import seal
from msfp_jax.quant import serialize
from msfp_jax.quant.around import Around
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Quantizer
from msfp_jax.quant.quantizers import Static
from msfp_jax.quant.rounded import Rounded

_FAMILY = 'msfp-jax/spec/'
_FORMAT, _FIRST_FORMAT = _FAMILY + '2', _FAMILY + '1'
# Of differences between steps: a reader that does not know of these must not
# take it for one of inputs.
_OF_DIFFERENCES = _FAMILY + '3'
AAL, NAL = 'AAL', 'NAL'
# Why specs of differences go with no more than one bank.
ONE_BANK = ('differences between steps add up over products of one set of '
            'weights: set num_banks=1')


@dataclasses.dataclass(frozen=True)
class LayerSpec:
  """How one layer is quantized.

  Attributes:
    role: what the layer is (see `roles.FAMILIES`).
    kind: AAL or NAL; empty where calibration had no need to look.
    weight: the quantizer of its weights.
    act: the quantizer of its input.
    around: what stands around the product; None for nothing.
    stats: measured at calibration, for people: 'act_min', 'act_max',
      'act_mse', 'act_signed_mse' (best signed), 'weight_mse'; where GPTQ
      rounded the weights also 'output_mse' and 'nearest_output_mse', of the
      output by these weights and by the nearest levels.
    rounded: the weights themselves, where their levels are others than the
      nearest; None where they follow from `weight`.
  """

  role: str
  kind: str
  weight: Quantizer = Full()
  act: Quantizer = Full()
  around: Around | None = None
  stats: Mapping[str, float] = dataclasses.field(default_factory=dict)
  rounded: Rounded | None = None

  @property
  def quantized(self) -> bool:
    """Whether weights or input have fewer bits than in full precision."""
    return not (self.weight.is_full and self.act.is_full)


@dataclasses.dataclass(frozen=True)
class QuantSpec:
  """A LayerSpec for every quantizable layer of a model, in its order.

  Attributes:
    recipe: its name.
    layers: by their names.
    differences: whether inputs are quantized as what they differ by from the
      sampler's step before.
  """

  recipe: str
  layers: dict[str, LayerSpec]
  differences: bool = False

  def to_json(self) -> str:
    """A line per layer; floats survive the way there and back exactly."""
    # A layer's line, here broken into four:
    #
    #   {"layer": "down.0.block.0.conv1", "role": "conv", "class": "AAL",
    #    "act": {"kind": "Static", "fmt": "UE2M2", "scale": {"value": 0.25}},
    #    "stats": {"act_min": -0.2784, ...},
    #    "weight": {"kind": "Static", "fmt": "E2M1", "scale": {"shape": ...}}}
    #
    # A line each, so that a diff of two specs shows the layers that differ.
    rows = [json.dumps({'layer': name} | _layer_to_dict(layer))
            for name, layer in self.layers.items()]
    content = {'format': _OF_DIFFERENCES if self.differences else _FORMAT,
               'recipe': self.recipe}
    head = json.dumps(content | {seal.KEY: _digest(
        content | {'layers': [*map(json.loads, rows)]})})[:-1]
    return head + ', "layers": [\n' + ',\n'.join(rows) + '\n]}\n'

  @classmethod
  def from_json(cls, text: str) -> 'QuantSpec':
    """The inverse of `to_json`; specs of version 1 load too.

    Raises:
      ValueError: anything else.
    """
    try:
      # A damaged file may fail in any of these ways; callers get one error.
      content = json.loads(text)
      read = {_FORMAT: _layer_from_dict, _OF_DIFFERENCES: _layer_from_dict,
              _FIRST_FORMAT: _layer_from_first}.get(content['format'])
      if read is None:
        raise ValueError(f'format {content["format"]!r}, expected {_FORMAT!r}')
      seal.check('this spec', content.pop(seal.KEY, None),
                 lambda: _digest(content), 'calibrate again; if it was '
                 f'changed on purpose, delete {seal.KEY!r} from it')
      layers = {row['layer']: _checked(read(row)) for row in content['layers']}
      return cls(content['recipe'], layers,
                 content['format'] == _OF_DIFFERENCES)
    except (AttributeError, json.JSONDecodeError, KeyError, TypeError,
            RecursionError, ValueError) as error:
      raise ValueError(f'not a quantization spec: {error!r}') from error

  def save(self, path: str | pathlib.Path) -> None:
    """Writes `to_json`, whole or not at all."""
    files.write_text(path, self.to_json())

  @classmethod
  def load(cls, path: str | pathlib.Path) -> 'QuantSpec':
    """Reads what `save` wrote; raises ValueError, which names the file."""
    try:
      return cls.from_json(pathlib.Path(path).read_text(encoding='utf-8'))
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from error


def check_steps(inputs: Mapping[str, Quantizer], num_steps: int) -> None:
  """Looks whether inputs that differ by step do so for a sampler's steps.

  JAX takes the last entry for an index beyond it, and says nothing.

  Args:
    inputs: {layer: the quantizer of its input}.
    num_steps: of the sampler.

  Raises:
    ValueError: names the layer.
  """
  for name, quantizer in inputs.items():
    if quantizer.num_steps not in (None, num_steps):
      raise ValueError(
          f'layer {name}: its input has a quantizer for each of '
          f'{quantizer.num_steps} steps, and the plan has {num_steps}: '
          'calibrate with this plan')


def _checked(layer: LayerSpec) -> LayerSpec:
  """A layer of a file; raises ValueError for what is no text or statistics."""
  if not (isinstance(layer.role, str) and isinstance(layer.kind, str)
          and isinstance(layer.stats, dict)):
    raise ValueError(f'a layer of role {layer.role!r}, kind {layer.kind!r} and '
                     f'statistics {layer.stats!r}')
  return layer


def _digest(content: Any) -> str:
  """Of what a spec's JSON holds, however it is written."""
  return seal.digest_of(content, {})


def _layer_to_dict(layer: LayerSpec) -> dict[str, Any]:
  row = {'role': layer.role, 'kind': layer.kind,
         'act': serialize.quantizer_to_dict(layer.act),
         'stats': dict(layer.stats)}
  if layer.around is not None:
    row['around'] = serialize.around_to_dict(layer.around)
  # The weights last: their arrays are the longest part of a line.
  row['weight'] = serialize.quantizer_to_dict(layer.weight)
  if layer.rounded is not None:
    row['rounded'] = {
        'of': layer.rounded.digest,
        **serialize.weights_to_dict(layer.rounded.weight)}
  return row


def _layer_from_dict(row: dict[str, Any]) -> LayerSpec:
  around, rounded = row.get('around'), row.get('rounded')
  if rounded is not None:
    rounded = Rounded(serialize.weights_from_dict(
        {key: value for key, value in rounded.items() if key != 'of'}),
                      rounded['of'])
  return LayerSpec(
      row['role'], row['kind'],
      serialize.quantizer_from_dict(row['weight']),
      serialize.quantizer_from_dict(row['act']),
      None if around is None else serialize.around_from_dict(around),
      row['stats'], rounded)


def _layer_from_first(row: dict[str, Any]) -> LayerSpec:
  """Reads a layer of version 1, which knew static quantizers and None alone."""
  return LayerSpec(
      row['role'], row['class'], _static_from_first(row['weight']),
      _static_from_first(row['act']), None, row['stats'])


def _static_from_first(row: Any) -> Quantizer:
  if row is None:
    return Full()
  array = lambda key: serialize.array_from_json(
      {'values': row[key], 'shape': row['shape']})
  scale = np.asarray(row['scale'], np.float64)
  if not (np.isfinite(scale) & (scale > 0)).all():
    raise ValueError(f'a scale of {row["format"]} is not finite and positive')
  if not np.isfinite(row.get('zero_point', 0.0)).all():
    raise ValueError(f'a zero point of {row["format"]} is not finite')
  return Static(FPFormat.parse(row['format']), array('scale'),
                array('zero_point') if 'zero_point' in row else None)
