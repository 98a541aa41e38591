"""The JSON header of a packed model's file, written and read (see `file`)."""

import json
from typing import Any

import ml_dtypes
import numpy as np

from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant import serialize
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.qtensor import QTensor
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Quantizer
from msfp_jax.quant.quantizers import Static

# Rows of three layers: E2M1 with a scale and bias a channel and an input with a
# zero point; NVFP4 (the scales are tensors of the file, as they are no float32
# channel); 6 bits, a stream, with its input in full precision.
#
#   ["down.0.conv1","E2M1",32,"sb",["UE2M2",0.25,-0.2785]]
#   ["down.0.conv1","E2M1",32,"",
#    {"kind":"Block","fmt":"E2M1","group":16,"scale_type":"e4m3",
#     "two_level":true},
#    {"group":16,"types":{"scale":"float8_e4m3fn"}}]
#   ["down.0.conv1","E3M2",32,"s",[],{"shape":[1,3,3,32,8]}]
#
# What a layer may have for every output channel in float32, by its letter.
SCALE, ZERO_POINT, BIAS = 's', 'z', 'b'
# Types that tensors of a file are viewed as, beside float32.
TYPES = {np.dtype(dtype).name: np.dtype(dtype) for dtype in (
    ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16,
    np.float16)}


def dumps(content: Any) -> str:
  """The shortest JSON."""
  return json.dumps(content, separators=(',', ':'))


def layer_to_row(name: str, layer: QLayer) -> list[Any]:
  """[name, format, I, letters, input, more where there is more].

  `more` holds what plain layers do not have: 'shape' of codes that are a
  stream of bits, 'group', 'shift_group', 'wide', 'rotation', and 'types' of
  tensors that are stored as bytes.
  """
  weight = layer.weight
  letters = ''.join(letter for letter, has in (
      (SCALE, is_per_output(weight, weight.scale)),
      (ZERO_POINT, is_per_output(weight, weight.zero_point)),
      (BIAS, layer.bias is not None)) if has)
  more: dict[str, Any] = {
      key: value for key in ('group', 'shift_group')
      if (value := getattr(weight, key))}
  if weight.wide is not None:
    more['wide'] = str(weight.wide)
  if layer.around.rotation:
    more['rotation'] = layer.around.rotation
  if is_stream(weight.fmt):
    # A stream is flat. In memory axis -2 may be halved; the stream is of all
    # codes.
    more['shape'] = list(weight.data.shape)
    more['shape'][-2] = weight.length
  types = {key: part.dtype.name for key, part in parts_of(layer).items()
           if part.dtype.name in TYPES}
  if types:
    more['types'] = types
  row = [name, str(weight.fmt), weight.length, letters,
         input_to_row(layer.input)]
  return [*row, more] if more else row


def is_per_output(weight: QTensor, part: Any) -> bool:
  """Whether a scale is one float32 for every output channel of all banks."""
  axes, outputs = np.ndim(weight.data) - 2, weight.data.shape[-1]
  # With fewer axes than the codes: without one of banks.
  return (part is not None and part.dtype == np.float32
          and part.shape == (1,) * axes + (outputs,))


def is_stream(fmt: FPFormat) -> bool:
  """Whether codes are stored as a stream of bits: neither 4 nor 8 each."""
  # 4 and 8 bits are the same in memory and in a file, so that they load without
  # a pass over them. A byte a code would make 5 to 7 bits as large as 8, and
  # half a byte 3 bits as large as 4.
  return fmt.bits not in (4, 8)


def parts_of(layer: QLayer) -> dict[str, np.ndarray]:
  """{name: array} of all in a layer that is neither codes nor in `channels`."""
  weight, around = layer.weight, layer.around
  found = {'scale': weight.scale, 'zero_point': weight.zero_point,
           'outer': weight.outer, 'shift': weight.shift,
           'smooth': around.smooth, 'down': around.down, 'up': around.up}
  return {name: np.asarray(part) for name, part in found.items()
          if part is not None and not (
              name in ('scale', 'zero_point') and is_per_output(weight, part))}


def stored_layout(fmt: FPFormat) -> layout_lib.Layout:
  """The layout in memory of what is read."""
  return layout_lib.packed_layout(fmt)


def input_to_row(quantizer: Quantizer) -> list[Any] | dict[str, Any]:
  """[] in full precision, [format, scale, zero point] with one scale."""
  if quantizer.is_full:
    return []
  if type(quantizer) is not Static or np.ndim(quantizer.scale):
    return serialize.quantizer_to_dict(quantizer)
  # As text a float32 is shortest, and survives.
  # float(str(.)) and not float(.), which would write 17 digits for 8.
  short = lambda value: float(str(np.float32(value)))
  zero_point = quantizer.zero_point
  zero = [] if zero_point is None else [short(zero_point)]
  return [str(quantizer.fmt), short(quantizer.scale), *zero]


def input_from_row(row: list[Any] | dict[str, Any]) -> Quantizer:
  """The inverse.

  Raises:
    ValueError: no such scale or zero point, or an unknown kind of quantizer.
  """
  if isinstance(row, dict):
    return serialize.quantizer_from_dict(row)
  if not row:
    return Full()
  fmt, *values = row
  with np.errstate(over='ignore'):  # infinite, and refused, in float32
    found = np.float32(values)
  scale, *zero = found
  if not (np.isfinite(found).all() and scale > 0 and len(zero) < 2):
    raise ValueError(f'scale and zero point {values} of an input')
  return Static(FPFormat.parse(fmt), scale, zero[0] if zero else None)


def row_from_first(row: list[Any]) -> list[Any]:
  """A layer's row of version 1: its input's row was not a list of its own."""
  name, fmt, length, letters, *act = row
  return [name, fmt, length, letters, act]


def weight_from_row(row: list[Any], data: np.ndarray,
                    parts: dict[str, np.ndarray]) -> QTensor:
  """The weights of a layer.

  Args:
    row: as `layer_to_row` made it.
    data: codes, in the layout of `stored_layout`.
    parts: 'scale', and 'zero_point', 'outer', 'shift' where there are.
  """
  more = row[5] if len(row) > 5 else {}
  wide = more.get('wide')
  return QTensor(
      data, parts['scale'], parts.get('zero_point'), parts.get('shift'),
      parts.get('outer'), fmt=FPFormat.parse(row[1]), length=row[2], axis=-2,
      group=more.get('group', 0), shift_group=more.get('shift_group', 0),
      layout=stored_layout(FPFormat.parse(row[1])),
      wide=None if wide is None else FPFormat.parse(wide))
