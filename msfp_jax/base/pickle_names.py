"""Checks of what a foreign pickle brings: names, keys of dicts, values to show.

Parts of a pickle may be shared: forty instructions make a tuple whose text,
or hash, takes 2**40 steps. So nothing foreign is formatted or hashed but by
the bounds in this file.
"""

import dataclasses
import sys
from typing import Any


class PickleError(ValueError):
  """The pickle is damaged, or asks for what no checkpoint needs."""


@dataclasses.dataclass(frozen=True)
class Global:
  """A name that the pickle mentions, e.g. torch.FloatStorage. Never looked up.
  """

  module: str
  name: str

  def __str__(self):
    return f'{self.module}.{self.name}'


@dataclasses.dataclass(frozen=True, eq=False)
class Opaque:
  """Stands for an object that the pickle wanted made by a call of `made_by`."""

  made_by: str


# Modules of the standard library that checkpoints name for plain values.
# Any other one is refused: there is no harm in it here, but in a checkpoint
# os.system and its like mean that someone wants them run elsewhere.
_HARMLESS_MODULES = frozenset({
    '_codecs', '_collections', 'argparse', 'collections', 'copyreg',
    'copy_reg', 'dataclasses', 'datetime', 'decimal', 'enum', 'fractions',
    'functools', 'pathlib', 'types', 'typing', 'uuid', 'zoneinfo'})
_HARMLESS_BUILTINS = frozenset({
    'bool', 'bytearray', 'bytes', 'complex', 'dict', 'float', 'frozenset',
    'int', 'list', 'object', 'range', 'set', 'slice', 'str', 'tuple', 'type'})
BUILTINS = ('builtins', '__builtin__')
# Of other systems' standard libraries, or of Python 2's.
_FOREIGN_MODULES = frozenset({
    'nt', 'ntpath', 'posix', 'posixpath', 'commands', 'popen2', 'winreg',
    '_winreg', 'msvcrt', 'os2'})
_LONGEST_NAME = 255


def check_global(name: Global) -> Global:
  """Returns a name that a checkpoint may well mention.

  Raises:
    PickleError: it is a function of the standard library that has no place
      in a checkpoint, or too long for a name.
  """
  length = len(name.module) + len(name.name)
  if length > _LONGEST_NAME:
    raise PickleError(f'damaged: a name of {length} characters, expected '
                      f'at most {_LONGEST_NAME}')
  # Only the standard library's names are refused: those of other packages are
  # classes of frameworks, which are as inert here and common in checkpoints.
  module = name.module.partition('.')[0]
  if module in BUILTINS:
    refused = name.name not in _HARMLESS_BUILTINS
  else:
    known = module in sys.stdlib_module_names or module in _FOREIGN_MODULES
    refused = known and module not in _HARMLESS_MODULES
  if refused:
    raise PickleError(
        f'the pickle names {name}, which has no place in a checkpoint: loading '
        'it elsewhere may run code. Nothing was run here. Get the file from a '
        'source that you trust, best as .safetensors')
  return name


_LONGEST_KEY = 10_000  # characters
_WIDEST_KEY = 32  # entries of a tuple


def check_key(key: Any) -> Any:
  """Returns the key of a dict, if it is quick to hash and to compare.

  Raises:
    PickleError: a nested tuple or another container, or too long.
  """
  parts = key if isinstance(key, tuple) else (key,)
  if len(parts) > _WIDEST_KEY or not all(map(_is_quick, parts)):
    raise PickleError(
        f'damaged: {shown(key)} as the key of a dict, expected a short string, '
        'a number, or a flat tuple of those')
  return key


def _is_quick(part):
  # Python hashes a large integer, and prints it, in time that grows with it.
  if isinstance(part, str | bytes):
    return len(part) <= _LONGEST_KEY
  if isinstance(part, int):
    return part.bit_length() <= 64
  return not isinstance(part, tuple | list | dict | bytearray)


def shown(value: Any) -> str:
  """Formats a foreign value for a message, in bounded time and length."""
  if isinstance(value, tuple | list) and len(value) <= 8:
    inner = ', '.join(map(_shown_part, value))
    return f'[{inner}]' if isinstance(value, list) else f'({inner})'
  return _shown_part(value)


def _shown_part(value):
  if isinstance(value, Global):
    return str(value)
  if isinstance(value, int):
    quick = value.bit_length() <= 64
  elif isinstance(value, str | bytes):
    quick = len(value) <= 100
  else:
    quick = value is None or isinstance(value, float)
  return repr(value) if quick else f'<{type(value).__name__}>'


def first_words(error: Exception) -> str:
  """The beginning of an error's text, which may quote much of the file."""
  text = str(error)
  return text if len(text) <= 200 else f'{text[:200]}...'
