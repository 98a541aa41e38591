"""One layer of a packed model's file: its tensors, written and read."""

import math
from typing import Any

import jax
import numpy as np

from msfp_jax.packed import header as header_lib
from msfp_jax.packed.reader import Reader
from msfp_jax.quant import flaws
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant.around import Around
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.qtensor import SHIFT_BITS

_LETTERS = {header_lib.SCALE: 'scale', header_lib.ZERO_POINT: 'zero_point'}


def tensors_of(name: str, layer: QLayer) -> dict[str, np.ndarray]:
  """{LAYER.codes, and LAYER.PART of every part}."""
  weight = layer.weight
  codes = np.asarray(weight.data)
  if header_lib.is_stream(weight.fmt):
    # `codes()` first: in memory two of 3 bits share a byte.
    codes = layout_lib.pack_bits(np.asarray(weight.codes()), weight.fmt.bits)
  found = {f'{name}.codes': codes}
  for key, part in header_lib.parts_of(layer).items():
    if key == 'shift':
      part = layout_lib.pack_bits(np.uint8(part), SHIFT_BITS)
    elif part.dtype.name in header_lib.TYPES:
      # NumPy has none of these types; the header names them.
      part = part.view(np.uint8)
    found[f'{name}.{key}'] = part
  return found


def shapes_of(name: str, layer: QLayer) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and types of what `tensors_of` returns, and nothing computed."""
  weight = layer.weight
  shape = np.shape(weight.data)
  if header_lib.is_stream(weight.fmt):
    shape = (_stream_size(
        (*shape[:-2], weight.length, shape[-1]), weight.fmt.bits),)
  found = {f'{name}.codes': jax.ShapeDtypeStruct(shape, np.uint8)}
  for key, part in header_lib.parts_of(layer).items():
    shape, dtype = part.shape, part.dtype
    if key == 'shift':
      shape, dtype = (_stream_size(shape, SHIFT_BITS),), np.uint8
    elif dtype.name in header_lib.TYPES:
      shape, dtype = (*shape[:-1], shape[-1] * dtype.itemsize), np.uint8
    found[f'{name}.{key}'] = jax.ShapeDtypeStruct(shape, dtype)
  return found


def _stream_size(shape, bits):
  return -(-math.prod(shape) * bits // 8)


def channels_of(layer: QLayer) -> list[np.ndarray]:
  """A layer's arrays of one number an output channel, in its letters' order."""
  weight = layer.weight
  found = [part for part in (weight.scale, weight.zero_point)
           if header_lib.is_per_output(weight, part)]
  if layer.bias is not None:
    found.append(layer.bias)
  return [np.asarray(part, np.float32).ravel() for part in found]


def check_size(row: list[Any], reader: Reader) -> None:
  """Checks that a row speaks of no more codes than the file has room for.

  What stands for a tensor that does not fit takes no memory, but what is
  computed from it would.

  Raises:
    ValueError: it does, or of no number of them.
  """
  sizes = [row[2]]
  if len(row) > 5 and 'shape' in row[5]:
    sizes.append(math.prod(row[5]['shape']))
  if odd := [size for size in sizes if type(size) is not int
             or not 0 < size <= 8 * max(1, reader.nbytes)]:
    raise ValueError(f'{row[0]}: {odd[0]} codes, in a file whose tensors have '
                     f'{reader.nbytes} bytes')


def outputs_of(row: list[Any], reader: Reader, first: bool) -> int:
  """Output channels of a layer; see `read_codes`, without reading any."""
  if first or not header_lib.is_stream(FPFormat.parse(row[1])):
    return reader.shape_of(f'{row[0]}.codes')[-1]
  return _shape_of(row)[-1]


def _shape_of(row):
  """The shape of codes that lie in the file as a stream of bits."""
  # Written by others, perhaps damaged: checked before a size follows from it.
  shape = tuple(row[5]['shape'])
  if len(shape) < 3 or shape[-2] != row[2] or min(shape) < 1:
    raise ValueError(f'{row[0]}: codes of shape {shape}')
  return shape


def read_codes(row: list[Any], reader: Reader, first: bool) -> np.ndarray:
  """Codes `[h, *window, rows, O]`, in the layout of `stored_layout`.

  Args:
    row: of the header.
    reader: of the file.
    first: whether it is of version 1, which knew no streams of bits.
  """
  name, fmt, length = row[0], FPFormat.parse(row[1]), row[2]
  if first or not header_lib.is_stream(fmt):
    return reader.take_codes(
        f'{name}.codes', -(-length // 2) if fmt.bits <= 4 else length)
  codes = reader.take_stream(f'{name}.codes', fmt.bits, _shape_of(row))
  return layout_lib.pack_halves(codes) if fmt.bits <= 4 else codes


def read_layer(row: list[Any], codes: np.ndarray, channels: np.ndarray,
               reader: Reader, is_read: bool) -> QLayer:
  """The layer of a header's row.

  Args:
    row: of the header.
    codes: of `read_codes`.
    channels: `[letters, O]`.
    reader: of the file.
    is_read: whether `channels` are the file's, and not what stands for them
      where they are missing.
  """
  name, length, letters = row[0], row[2], row[3]
  more = row[5] if len(row) > 5 else {}
  per_output = {letter: channels[i] for i, letter in enumerate(letters)}
  wide = (1,) * (codes.ndim - 2) + (-1,)
  parts = {key: per_output[letter].reshape(wide)
           for letter, key in _LETTERS.items() if letter in per_output}
  types = more.get('types', {})
  banks, window, outputs = codes.shape[0], codes.shape[1:-2], codes.shape[-1]
  groups = lambda group: -(-length // group) if group else 1
  for key, group in (('scale', 'group'), ('zero_point', 'group'),
                     ('shift', 'shift_group')):
    # A layer always has a scale: where neither table nor tensor holds it,
    # taking it is what reports that it is missing.
    if key in parts or (key != 'scale' and not reader.has(f'{name}.{key}')):
      continue
    shape = (banks, *window, groups(more.get(group, 0)), outputs)
    parts[key] = reader.take_scales(f'{name}.{key}', types.get(key), shape)
  if reader.has(f'{name}.outer'):
    parts['outer'] = reader.take(
        f'{name}.outer', np.float32, (banks, *(1,) * (codes.ndim - 1)))
  weight = header_lib.weight_from_row(row, codes, parts)
  if is_read:
    reader.problems += [f'layer {name}: {flaw}' for flaw in [
        *flaws.value_flaws(weight), *flaws.shift_flaws(weight)]]
  around = _read_around(name, more, reader, (*window, length), outputs)
  return QLayer(
      weight,
      header_lib.input_from_row(row[4]), per_output.get(header_lib.BIAS),
      around)


def _read_around(name, more, reader, inputs, outputs):
  """Reads the `Around` of a layer; `inputs` is `[*window, I]`."""
  types, found = more.get('types', {}), {}
  if reader.has(f'{name}.smooth'):
    found['smooth'] = reader.take(f'{name}.smooth', np.float32, inputs[-1:])
  if reader.has(f'{name}.down'):
    for key, shape in (('down', (*inputs, None)), ('up', (None, outputs))):
      found[key] = reader.take_typed(f'{name}.{key}', types.get(key), shape)
    if found['down'].shape[-1] != found['up'].shape[0]:
      reader.problems.append(
          f'{name}.down of rank {found["down"].shape[-1]}, {name}.up of '
          f'{found["up"].shape[0]}')
  around = Around(**found, rotation=more.get('rotation', 0))
  reader.problems += [f'{name}.{flaw}' for flaw in around.flaws(inputs[-1])]
  return around
