"""Digests of files of our own: what is loaded is what was written.

A file without one is older, or somebody else's; what its reader makes of that
is its own affair.
"""

from collections.abc import Callable, Mapping
import concurrent.futures
import hashlib
import json
import os
from typing import Any

from absl import logging
import numpy as np

from msfp_jax.base import files

KEY = 'digest'  # under which a file holds it
_CONTENT = 'content'  # what it is of, in JSON
# In its place where only its length matters: that of SHA-256 in hex.
UNKNOWN = 64 * '0'
# What to do about a file of the package itself.
INSTALL_AGAIN = 'install msfp-jax again'
# A thread each; more would hold more tensors in memory at once.
_THREADS = min(4, os.cpu_count() or 1)


def digest_of(content: Any, arrays: Mapping[str, Callable[[], np.ndarray]]
              ) -> str:
  """SHA-256 of JSON-like content and arrays, in hex.

  Args:
    content: what json.dumps takes; the order of keys does not count.
    arrays: {name: a call that reads it}; names, types, shapes and values count.
      One is read at a time by each of a few threads.
  """
  names = sorted(arrays)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    parts = pool.map(lambda name: part_of(name, arrays[name]()), names)
    return whole_of(content, dict(zip(names, parts, strict=True)))


def part_of(name: str, array: np.ndarray) -> bytes:
  """One array's part of a digest: its name, type, shape and values count."""
  array = np.asarray(array)
  head = json.dumps([name, array.dtype.name, list(array.shape)])
  made = hashlib.sha256(head.encode())
  # As bytes, without a copy: not all types have a buffer of their own.
  made.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
  return made.digest()


def whole_of(content: Any, parts: Mapping[str, bytes]) -> str:
  """The digest of content and arrays whose parts are known; see `digest_of`."""
  whole = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
  for name in sorted(parts):
    whole.update(parts[name])
  return whole.hexdigest()


def check_file(path: str | os.PathLike, sha256: str, way_out: str) -> None:
  """Checks a file that ships with the package by the digest of its bytes.

  Raises:
    ValueError: it is damaged; names it.
  """
  with open(path, 'rb') as file:
    found = hashlib.file_digest(file, 'sha256').hexdigest()
  if found != sha256:
    raise ValueError(f'{path} is damaged, or was changed: its SHA-256 is '
                     f'{found}, expected {sha256}; {way_out}')


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
  """Writes JSON with its digest, whole or not at all."""
  # Around it: were the digest's name damaged, it would be one more field.
  files.write_json(path, {KEY: digest_of(content, {}), _CONTENT: content})


def read_json(path: str | os.PathLike, way_out: str) -> dict[str, Any]:
  """Reads what `write_json` wrote, or plain JSON of earlier versions.

  Args:
    path: of the file.
    way_out: what to do about a damaged one.

  Raises:
    ValueError: it is damaged; names the file.
  """
  whole = files.read_json(path, way_out)
  content = whole.get(_CONTENT, whole) if isinstance(whole, dict) else None
  if not isinstance(content, dict):
    raise ValueError(f'{path} is damaged (it holds no fields); {way_out}')
  check(str(path), whole.get(KEY), lambda: digest_of(content, {}), way_out)
  return content


def check(what: str, stated: Any, found: Callable[[], str], way_out: str
          ) -> None:
  """Compares the digest that a file states with that of its content.

  Args:
    what: the file, for messages.
    stated: the file's; None where it has none, of which a warning tells.
    found: computes that of the content; not called without need.
    way_out: what to do about a damaged one.

  Raises:
    ValueError: they differ.
  """
  if stated is None:
    logging.warning('%s has no digest, as files of earlier versions: damage to '
                    'it would not be noticed', what)
  elif stated != found():
    raise ValueError(f'{what} is damaged, or was changed: its content is not '
                     f'that of its {KEY}; {way_out}')
