"""Reads CIFAR-10's training images, in both of its published forms."""

import pathlib
from typing import Any

import numpy as np

from msfp_jax.base import pickles
from msfp_jax.base.pickle_names import shown

_BINARY = [f'data_batch_{i}.bin' for i in range(1, 6)]
_PYTHON = [f'data_batch_{i}' for i in range(1, 6)]
_PIXELS = 3 * 32 * 32
_IMAGES = 10_000  # of a file


def read(path: str) -> np.ndarray:
  """Reads the 50,000 training images, uint8 `[50000, 32, 32, 3]`.

  Args:
    path: the folder with data_batch_1.bin ... 5.bin (the binary version) or
      data_batch_1 ... 5 (the Python version, whose pickles are read as data).

  Raises:
    FileNotFoundError: neither is there.
    ValueError: a file is damaged.
  """
  root = pathlib.Path(path).expanduser()
  for names, parse in ((_BINARY, _parse_binary), (_PYTHON, _parse_python)):
    if all((root / name).is_file() for name in names):
      batches = [_parse(root / name, parse) for name in names]
      # Both have colour planes: all reds, then greens, then blues.
      return np.concatenate(batches).reshape(-1, 3, 32, 32).transpose(
          0, 2, 3, 1)
  raise FileNotFoundError(
      f'no CIFAR-10 at {root}: get cifar-10-binary.tar.gz or '
      'cifar-10-python.tar.gz from www.cs.toronto.edu/~kriz/cifar.html, unpack '
      'it, and pass the folder with the data_batch files as --config.data.path')


def _parse(file, parse):
  try:
    rows = parse(file)
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{file} is no batch of CIFAR-10: {error}') from error
  if rows.shape != (_IMAGES, _PIXELS):
    raise ValueError(f'{file} is no batch of CIFAR-10: it holds {rows.shape} '
                     f'bytes, expected {(_IMAGES, _PIXELS)}')
  return rows


def _parse_binary(file: pathlib.Path) -> np.ndarray:
  """Reads the binary form: rows of a label and 3,072 pixels."""
  content = np.fromfile(file, np.uint8)
  if len(content) != _IMAGES * (_PIXELS + 1):
    raise ValueError(f'{len(content)} bytes, expected '
                     f'{_IMAGES * (_PIXELS + 1)}: truncated?')
  return content.reshape(_IMAGES, _PIXELS + 1)[:, 1:]


def _parse_python(file: pathlib.Path) -> np.ndarray:
  """Reads the Python form: a pickled dict whose 'data' is an array."""
  with open(file, 'rb') as opened:
    content = pickles.read_pickle(opened, _CALLS)
  if not isinstance(content, dict):
    raise ValueError(f'a pickle of {shown(content)}, expected a dict')
  rows = content['data'] if 'data' in content else content[b'data']
  if not isinstance(rows, _Array):
    raise ValueError(f"its 'data' is {shown(rows)}, expected an array")
  return rows.array()


class _Dtype(pickles.Buildable):

  def __init__(self, name: Any):
    self.name = _bytes(name)

  def build(self, state: Any) -> None:
    """Ignores the state: byte order and fields, which bytes do not have."""


class _Array(pickles.Buildable):
  """A pickled NumPy array of bytes."""

  def __init__(self, *unused: Any):
    self.state = None

  def build(self, state: Any) -> None:
    self.state = state

  def array(self) -> np.ndarray:
    # The state of ndarray.__setstate__: (version, shape, dtype, order, bytes).
    _, shape, dtype, fortran, content = self.state
    if not isinstance(dtype, _Dtype) or dtype.name != b'u1' or fortran:
      kind = shown(getattr(dtype, 'name', dtype))
      raise ValueError(f'pixels of type {kind}, fortran order '
                       f'{shown(fortran)}')
    return np.frombuffer(_bytes(content), np.uint8).reshape(shape)


def _bytes(value: bytes | str) -> bytes:
  """Bytes as they are; Python 2 wrote them as strings of these characters."""
  return value.encode('latin1') if isinstance(value, str) else value


_CALLS = {
    pickles.Global('numpy', 'dtype'): lambda name, *unused: _Dtype(name),
    **{pickles.Global(f'numpy.{core}.multiarray', '_reconstruct'): _Array
       for core in ('core', '_core')},
}
