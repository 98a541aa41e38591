"""What is done to every layer: LayerSpec, QuantSpec, recipes and roles.

Recipes and roles are data: a new one is one entry here.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from msfp_jax.base import files
from msfp_jax.quant import numbers as formats_lib
from msfp_jax.quant import quantizers
from msfp_jax.quant import search

_FORMAT = 'msfp-jax/spec/1'
FULL_PRECISION = 32

# Role of each layer of the UNet, by the first pattern its whole name matches.
ROLES = {
    'conv_in': r'conv_in',
    'conv_out': r'conv_out',
    'temb': r'temb\.dense\.\d+',
    'temb_proj': r'.*\.temb_proj',
    'shortcut': r'.*\.nin_shortcut',
    'downsample': r'down\.\d+\.downsample\.conv',
    'upsample': r'up\.\d+\.upsample\.conv',
    'attention': r'.*\.attn[._]\d+\.(.+\.)?(q|k|v|proj_in|proj_out)',
    'feed_forward': r'.*\.ff\.(proj|out)',
    'conv': r'.*\.conv[12]',
}
# Layers of the UNet whose input follows SiLU: the paper's AALs, by structure.
SILU_INPUTS = r'temb\.dense\.1|.*\.temb_proj|.*\.conv[12]|conv_out'

# Role -> bits of weights and activations, whatever the rest has.
EXCEPTIONS = {
    'all-4': {'conv_in': 8, 'conv_out': 8, 'temb': 8},
    'skip-8': {'conv_in': 8, 'conv_out': 8, 'temb': 8, 'shortcut': 8,
               'downsample': 8, 'upsample': 8},
}


@dataclasses.dataclass(frozen=True)
class Candidates:
  """One list of quantizers to search: formats, and zero points or None."""

  signed: bool
  zero_points: str | None = None  # 'silu', 'range' (see search.search)
  integer: bool = False  # only the uniform grid

  def search(self, x: np.ndarray, bits: int,
             channel_axis: int | None = None) -> search.SearchResult:
    """The best of these for a tensor; see `search.search`."""
    formats = formats_lib.formats_of_width(bits, self.signed)
    if self.integer:
      formats = (quantizers.int_format(bits),)
    zero_points = self.zero_points
    if zero_points == 'silu':
      zero_points = search.SILU_ZERO_POINTS
    return search.search(x, formats, channel_axis=channel_axis,
                         zero_points=zero_points)


SIGNED = Candidates(signed=True)
UNSIGNED = Candidates(signed=False, zero_points='silu')
INTEGER = Candidates(signed=False, zero_points='range', integer=True)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Which quantizers are tried where; the least error wins."""

  weights: tuple[Candidates, ...]
  nal: tuple[Candidates, ...]
  aal: tuple[Candidates, ...]


RECIPES = {
    # "Mixup-sign": signed for NALs, signed or unsigned for AALs.
    'msfp': Recipe((SIGNED,), (SIGNED,), (SIGNED, UNSIGNED)),
    'signed_fp': Recipe((SIGNED,), (SIGNED,), (SIGNED,)),
    'int': Recipe((INTEGER,), (INTEGER,), (INTEGER,)),
}


def parse_bits(text: str) -> tuple[int, int]:
  """'w4a4' -> (4, 4): bits of weights and activations, 3 to 8 or 32.

  Raises:
    ValueError: anything else.
  """
  match = re.fullmatch(r'w(\d+)a(\d+)', text)
  bits = tuple(map(int, match.groups())) if match else ()
  if not bits or not all(3 <= b <= 8 or b == FULL_PRECISION for b in bits):
    raise ValueError(f'bits {text!r}: must be such as w4a4, with 3 to 8 bits '
                     'each, or 32 for full precision')
  return bits


def recipe(name: str) -> Recipe:
  if name not in RECIPES:
    raise ValueError(f'recipe {name!r}: must be one of {sorted(RECIPES)}')
  return RECIPES[name]


def role_of(layer: str, roles: Mapping[str, str] | None = None) -> str:
  """The role of a layer.

  Raises:
    ValueError: no rule covers the layer.
  """
  for role, pattern in (ROLES if roles is None else roles).items():
    if re.fullmatch(pattern, layer):
      return role
  raise ValueError(f'no rule covers layer {layer!r}: add its role to '
                   'spec.ROLES, or pass roles={role: pattern}')


def follows_silu(layer: str) -> bool:
  """Whether a layer of the UNet is an AAL by structure."""
  return re.fullmatch(SILU_INPUTS, layer) is not None


@dataclasses.dataclass(frozen=True)
class LayerSpec:
  """How one layer is quantized.

  Attributes:
    role: what the layer is (see ROLES).
    kind: 'AAL' or 'NAL'.
    weight: its scale `[1, ..., C]`; None leaves the weight in full precision.
    act: per tensor; None leaves the input in full precision.
    stats: measured at calibration, for people: 'act_min', 'act_max',
      'act_mse', 'act_signed_mse' (best signed), 'weight_mse'.
  """

  role: str
  kind: str
  weight: quantizers.Quantizer | None
  act: quantizers.Quantizer | None
  stats: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def quantized(self) -> bool:
    """Whether anything of the layer is."""
    return self.weight is not None or self.act is not None


@dataclasses.dataclass(frozen=True)
class QuantSpec:
  """A LayerSpec for every quantizable layer of a model, in its order."""

  recipe: str
  layers: dict[str, LayerSpec]

  @property
  def act_quantizers(self) -> dict[str, quantizers.Quantizer | None]:
    return {name: layer.act for name, layer in self.layers.items()}

  def to_json(self) -> str:
    """A line per layer; floats survive the way there and back exactly."""
    rows = [json.dumps({'layer': name} | _layer_to_dict(layer))
            for name, layer in self.layers.items()]
    head = json.dumps({'format': _FORMAT, 'recipe': self.recipe})[:-1]
    return head + ', "layers": [\n' + ',\n'.join(rows) + '\n]}\n'

  @classmethod
  def from_json(cls, text: str) -> 'QuantSpec':
    """The inverse of `to_json`. Raises ValueError on anything else."""
    try:
      content = json.loads(text)
      if content['format'] != _FORMAT:
        raise ValueError(f'format {content["format"]!r}, expected {_FORMAT!r}')
      layers = {row['layer']: _layer_from_dict(row)
                for row in content['layers']}
      return cls(content['recipe'], layers)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
      raise ValueError(f'not a quantization spec: {error!r}') from error

  def save(self, path: str | pathlib.Path) -> None:
    """Writes `to_json`, whole or not at all."""
    files.write_text(path, self.to_json())

  @classmethod
  def load(cls, path: str | pathlib.Path) -> 'QuantSpec':
    return cls.from_json(pathlib.Path(path).read_text())


def _quantizer_to_dict(quantizer: quantizers.Quantizer | None) -> Any:
  if quantizer is None:
    return None
  row = {'format': str(quantizer.fmt),
         'scale': np.asarray(quantizer.scale).ravel().tolist(),
         'shape': list(np.shape(quantizer.scale))}
  if quantizer.zero_point is not None:
    row['zero_point'] = np.asarray(quantizer.zero_point).ravel().tolist()
  return row


def _quantizer_from_dict(row: Any) -> quantizers.Quantizer | None:
  if row is None:
    return None
  array = lambda key: jnp.asarray(row[key], jnp.float32).reshape(row['shape'])
  scale = np.asarray(row['scale'], np.float64)
  if not (np.isfinite(scale) & (scale > 0)).all():
    raise ValueError(f'a scale of {row["format"]} is not finite and positive')
  if not np.isfinite(row.get('zero_point', 0.0)).all():
    raise ValueError(f'a zero point of {row["format"]} is not finite')
  return quantizers.Quantizer(
      formats_lib.FPFormat.parse(row['format']), array('scale'),
      array('zero_point') if 'zero_point' in row else None)


def _layer_to_dict(layer: LayerSpec) -> dict[str, Any]:
  return {'role': layer.role, 'class': layer.kind,
          'act': _quantizer_to_dict(layer.act), 'stats': dict(layer.stats),
          'weight': _quantizer_to_dict(layer.weight)}


def _layer_from_dict(row: dict[str, Any]) -> LayerSpec:
  return LayerSpec(row['role'], row['class'],
                   _quantizer_from_dict(row['weight']),
                   _quantizer_from_dict(row['act']), row['stats'])
