"""Quantizers and arrays as JSON, for specs and headers of files."""

import base64
import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from msfp_jax.quant import flaws as flaws_lib
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant.around import Around
from msfp_jax.quant.block import Block
from msfp_jax.quant.dual_scale import DualScale
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qtensor import QTensor
from msfp_jax.quant.quantizers import fields_of
from msfp_jax.quant.quantizers import flaws_of
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Quantizer
from msfp_jax.quant.quantizers import Static
from msfp_jax.quant.suppress import Suppressed

# Imported, so that Quantizer.KINDS knows them when a file names them.
BUILT_IN = (Full, Static, Block, DualScale, Suppressed)
# Longer arrays are written as base64: numbers as text take thrice the room.
_READABLE = 4096
_DTYPES = {np.dtype(dtype).name: np.dtype(dtype) for dtype in (
    np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.int8, np.uint8,
    ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu)}
# Arrays of packed weights; all but the first two may be absent. And what else
# there is to know, with the value that is left out.
_ARRAYS = ('data', 'scale', 'zero_point', 'shift', 'outer')
_SIZES = {'length': None, 'group': 0, 'shift_group': 0}


def quantizer_to_dict(quantizer: Quantizer) -> dict[str, Any]:
  """{'kind': its class, field: value}; fields at their default left out."""
  row = {'kind': type(quantizer).__name__}
  for name, value in fields_of(quantizer).items():
    row[name] = _to_json(value)
  return row


def quantizer_from_dict(row: dict[str, Any]) -> Quantizer:
  """The inverse.

  Raises:
    ValueError: an unknown kind or field, or values that no quantizer has.
  """
  fields = dict(row)
  kind = fields.pop('kind')
  if kind not in Quantizer.KINDS:
    raise ValueError(
        f'a quantizer of kind {kind!r}, which is none of '
        f'{sorted(Quantizer.KINDS)}: import the module that defines it')
  cls = Quantizer.KINDS[kind]
  types = _types_of(cls)
  if odd := sorted(set(fields) - set(types)):
    raise ValueError(f'fields {odd}, which quantizers of kind {kind} lack')
  made = cls(**{name: _field_from_json(kind, name, types[name], value)
                for name, value in fields.items()})
  if flaws := flaws_of(made):
    raise ValueError(f'a quantizer of kind {kind} with {", ".join(flaws)}')
  return made


def around_to_dict(around: Around) -> dict[str, Any]:
  """The fields that the layer has."""
  found = {name: array_to_json(value) for name in ('smooth', 'down', 'up')
           if (value := getattr(around, name)) is not None}
  return found | ({'rotation': around.rotation} if around.rotation else {})


def around_from_dict(row: dict[str, Any]) -> Around:
  """The inverse. Raises ValueError for other fields, or values of no use."""
  fields = dict(row)
  rotation = fields.pop('rotation', 0)
  if odd := sorted(set(fields) - {'smooth', 'down', 'up'}):
    raise ValueError(f'fields {odd} around a layer')
  around = Around(**{name: array_from_json(value)
                     for name, value in fields.items()}, rotation=rotation)
  if flaws := around.flaws():
    raise ValueError('around a layer, ' + ', '.join(flaws))
  return around


def weights_to_dict(weight: QTensor) -> dict[str, Any]:
  """Packed weights; what is absent or 0 left out."""
  row = {'fmt': str(weight.fmt)}
  if weight.wide is not None:
    row['wide'] = str(weight.wide)
  row |= {name: value for name, usual in _SIZES.items()
          if (value := getattr(weight, name)) != usual}
  return row | {name: array_to_json(part) for name in _ARRAYS
                if (part := getattr(weight, name)) is not None}


def weights_from_dict(row: dict[str, Any]) -> QTensor:
  """The inverse, in NumPy. Raises ValueError for what no weights can be."""
  sizes = _SIZES | {name: row[name] for name in _SIZES if name in row}
  parts = {name: np.asarray(array_from_json(row[name]))
           for name in _ARRAYS if name in row}
  wide = FPFormat.parse(row['wide']) if 'wide' in row else None
  fmt = FPFormat.parse(row['fmt'])
  layout = layout_lib.packed_layout(fmt)
  if odd := sorted(set(row) - {'fmt', 'wide', *_SIZES, *_ARRAYS}):
    raise ValueError(f'fields {odd}, which weights lack')
  weight = QTensor(**parts, **sizes, fmt=fmt, wide=wide, axis=-2, layout=layout)
  if found := flaws_lib.weight_flaws(weight):
    raise ValueError('weights with ' + ', '.join(found))
  return weight


def array_to_json(array: Any) -> dict[str, Any]:
  """{'shape', 'dtype' if not float32, 'values' or 'base64'}.

  Raises:
    ValueError: a type that could not be read back.
  """
  array = np.asarray(array)
  if array.dtype not in _DTYPES.values():
    raise ValueError(f'an array of {array.dtype}: must be of {sorted(_DTYPES)}')
  row: dict[str, Any] = {'shape': list(array.shape)}
  if array.dtype != np.float32:
    row['dtype'] = array.dtype.name
  if array.size > _READABLE or array.dtype != np.float32:
    # Files are little-endian, wherever they are written.
    little = array.astype(array.dtype.newbyteorder('<'))
    row['base64'] = base64.b64encode(little.tobytes()).decode()
  else:
    # As text a float32 is shortest, and survives.
    row['values'] = [float(str(value)) for value in array.ravel()]
  return row


def array_from_json(row: dict[str, Any]) -> jax.Array:
  """The inverse. Raises ValueError for anything else."""
  name = row.get('dtype', 'float32')
  if name not in _DTYPES:
    raise ValueError(f'an array of {name!r}: must be of {sorted(_DTYPES)}')
  dtype = _DTYPES[name]
  if 'base64' in row:
    flat = np.frombuffer(base64.b64decode(row['base64'], validate=True), dtype)
  else:
    # Beyond the type's range: infinite, which callers look for.
    with np.errstate(over='ignore'):
      flat = np.asarray(row['values'], dtype)
  return jnp.asarray(flat.reshape(row['shape']))


def _to_json(value: Any) -> Any:
  if isinstance(value, FPFormat):
    return str(value)
  if isinstance(value, Quantizer):
    return quantizer_to_dict(value)
  if isinstance(value, jax.Array | np.ndarray | np.generic):
    if np.ndim(value) == 0 and value.dtype == np.float32:
      return {'value': float(str(np.float32(value)))}
    return array_to_json(value)
  return value


def _types_of(cls: type) -> dict[str, Any]:
  """{field: its type}; as written where a name of it is not to be found."""
  try:
    hints = typing.get_type_hints(cls)
  except NameError:
    hints = {}
  return {field.name: hints.get(field.name, field.type)
          for field in dataclasses.fields(cls)}


def _field_from_json(kind: str, name: str, annotation: Any, value: Any) -> Any:
  """The value of a field; ValueError if it is none of the field's types."""
  # 'FPFormat | None' -> (FPFormat, None's type); a class alone has no
  # arguments.
  types = typing.get_args(annotation) or (annotation,)
  if FPFormat in types:
    return FPFormat.parse(value)
  made = _as_tuple(value)
  if isinstance(value, dict) and 'kind' in value:
    made = quantizer_from_dict(value)
  elif isinstance(value, dict):
    if 'value' in value:
      value = {'values': value['value'], 'shape': []}
    made = array_from_json(value)
  # Of annotations, those that are classes; text and generics say too little.
  known = tuple(one for one in types if isinstance(one, type))
  if len(known) == len(types) and not isinstance(made, known):
    raise ValueError(f'{name}={value!r} of a quantizer of kind {kind}')
  return made


def _as_tuple(value: Any) -> Any:
  """Lists, for which JSON takes tuples, as tuples: fields are hashable."""
  return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
