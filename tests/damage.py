"""Damage to small files of every kind, and what a reader may make of it.

A reader raises an error that ends a command with its message alone
(`base.errors.EXPECTED`) and names the file; or it loads what the whole file
holds; or, of a kind whose values nothing seals, something of the same build.
"""

import collections
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import pathlib
import signal
import sys
import time
from typing import Any

import jax
import numpy as np

from msfp_jax.base import errors

_SECONDS = 2  # that a reader may take beyond what the whole file takes it
_MEMORY = 2**31  # bytes that it may ask for
# Half of the damage is where the structure of a small file is.
_HEAD = _TAIL = 1500


class HangError(BaseException):
  """A reader that does not come to an end."""


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of file.

  Attributes:
    write: writes one into an empty folder, and what it needs beside it;
      returns the file that is damaged.
    read: (file) -> all that is read of it, tensors and all.
    sealed: whether a damaged one never loads as anything else.
    build: what of a loaded one is the same in spite of other values; by
      default names, shapes and types.
  """

  write: Callable[[pathlib.Path], pathlib.Path]
  read: Callable[[pathlib.Path], Any]
  sealed: bool = False
  build: Callable[[Any], Any] | None = None


def content_of(value: Any) -> Any:
  """A loaded value as nested tuples and bytes, which compare exactly."""
  return _walk(value, lambda leaf: (leaf.dtype.name, leaf.shape,
                                    leaf.tobytes()), repr)


def build_of(value: Any) -> Any:
  """Names, shapes and types alone."""
  return _walk(value, lambda leaf: (leaf.dtype.name, leaf.shape),
               lambda leaf: type(leaf).__name__)


def _walk(value, array, other):
  if isinstance(value, jax.Array | np.ndarray | np.generic):
    return array(np.asarray(value))
  if dataclasses.is_dataclass(value):
    value = {field.name: getattr(value, field.name)
             for field in dataclasses.fields(value)}
  if isinstance(value, collections.abc.Mapping):
    return tuple((str(key), _walk(value[key], array, other))
                 for key in sorted(value, key=str))
  if isinstance(value, list | tuple):
    return tuple(_walk(part, array, other) for part in value)
  return other(value)


def damages(content: bytes, count: int, cut: bool, seed: int = 0
            ) -> Iterator[bytes]:
  """Bits flipped one at a time, or the end cut off; the same for a seed."""
  rng = np.random.default_rng(seed)
  for i in range(count):
    first, end = [(0, len(content)), (0, len(content)), (0, _HEAD),
                  (len(content) - _TAIL, len(content))][i % 4]
    place = int(rng.integers(max(0, first), min(len(content), end)))
    if cut:
      yield content[:place]
    else:
      damaged = bytearray(content)
      damaged[place] ^= 1 << int(rng.integers(8))
      yield bytes(damaged)


@contextlib.contextmanager
def bounds() -> Iterator[None]:
  """Ends a reader that hangs, and refuses memory beyond all need; on Linux."""
  import resource  # which Windows does not have

  def hang(*unused):
    raise HangError(f'no end after {_SECONDS} s')

  if sys.platform != 'linux':
    yield
    return
  before = signal.signal(signal.SIGALRM, hang)
  limits = resource.getrlimit(resource.RLIMIT_AS)
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
  most = pages * resource.getpagesize() + _MEMORY
  try:
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, 10 * _SECONDS)
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.signal(signal.SIGALRM, before)


def try_all(kind: Kind, folder: pathlib.Path, count: int, cut: bool,
            seed: int = 0) -> collections.Counter:
  """Damages a file `count` times, and checks what its reader makes of it.

  Returns:
    How many were refused ('errors') and loaded: 'same', and 'other' values.

  Raises:
    AssertionError: all damages that were neither refused nor loaded as they
      may be.
  """
  file = kind.write(folder)
  content = file.read_bytes()
  build = kind.build or build_of
  whole = kind.read(file)
  expected, structure = content_of(whole), build(whole)
  found, wrong = collections.Counter(), []
  for number, damaged in enumerate(damages(content, count, cut, seed)):
    file.write_bytes(damaged)
    start = time.perf_counter()
    try:
      with bounds():
        loaded = kind.read(file)
    except errors.EXPECTED as error:
      found['errors'] += 1
      text = str(error)
      if str(folder) not in text:
        wrong.append(f'{number}: {error!r} does not name the file')
    except (Exception, HangError) as error:
      wrong.append(f'{number}: {type(error).__name__}: {str(error)[:300]} '
                   f'{place(error)}')
    else:
      if content_of(loaded) == expected:
        found['same'] += 1
      elif kind.sealed:
        wrong.append(f'{number}: loaded as something else')
      elif build(loaded) != structure:
        wrong.append(f'{number}: loaded as {str(build(loaded))[:300]}')
      else:
        found['other'] += 1
    if time.perf_counter() - start > _SECONDS:
      wrong.append(f'{number}: took {time.perf_counter() - start:.1f} s')
  file.write_bytes(content)
  assert not wrong, f'{len(wrong)} of {count}:\n' + '\n'.join(wrong[:20])
  return found


def place(error: BaseException) -> str:
  """Where in this package an error came from."""
  place, trace = '', error.__traceback__
  while trace is not None:
    name = trace.tb_frame.f_code.co_filename
    if 'msfp_jax' in name:
      place = f'{pathlib.Path(name).name}:{trace.tb_lineno}'
    trace = trace.tb_next
  return place
