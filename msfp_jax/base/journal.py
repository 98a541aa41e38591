"""What a long job has done, line by line, whatever becomes of its process."""

import hashlib
import json
import os
import pathlib
from typing import Any

from absl import logging

# Between a line's JSON, which has none of it, and the digest of that. Lines of
# earlier versions end without one.
_MARK = b'\t'
_DIGITS = 16  # of SHA-256 in hex


class Journal:
  """JSON lines on disk: the first says of what job, the others what is done.

  A line is on disk when `add` returns. One that a kill left half-written, or
  that is not what was written, is dropped at the next opening, and so are those
  behind it: what they stood for is done again.

  Attributes:
    entries: all lines but the first, those of earlier processes too.
  """

  def __init__(self, path: str | os.PathLike, job: Any, way_out: str):
    """Opens it for appending, or makes it.

    Args:
      path: of the file.
      job: JSON-like: all that decides what the lines mean.
      way_out: what to do about a journal of another job.

    Raises:
      ValueError: it is of another job; the message names what differs.
    """
    self._path = pathlib.Path(path)
    lines, size = _whole_lines(self._path)
    # As it comes back from JSON: tuples as lists, keys as texts.
    job = json.loads(json.dumps(job))
    if lines and lines[0] != job:
      raise ValueError(f'{self._path} is of another job: '
                       f'{_differing(lines[0], job)} differ; {way_out}')
    self.entries: list[Any] = lines[1:]
    # Without a buffer: a line that is not on disk yet is nowhere else either.
    self._file = open(self._path, 'ab', 0)  # noqa: SIM115
    try:
      self._file.truncate(size)
      if not lines:
        self._write(job)
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> 'Journal':
    return self

  def __exit__(self, *unused) -> None:
    self.close()

  def add(self, entry: Any) -> None:
    """Appends a line; it is on disk when this returns."""
    self._write(entry)
    self.entries.append(entry)

  def of(self, *keys: str) -> list[dict[str, Any]]:
    """The entries that have all these keys."""
    # Lines of earlier versions have no digest, and may be anything.
    return [entry for entry in self.entries
            if isinstance(entry, dict) and entry.keys() >= set(keys)]

  def close(self) -> None:
    self._file.close()

  def remove(self) -> None:
    """Closes it and deletes the file."""
    self.close()
    self._path.unlink(missing_ok=True)

  def _write(self, entry):
    text = json.dumps(entry).encode()
    line = text + _MARK + _digest(text) + b'\n'
    # Without a buffer a full disk takes a part of it, and says nothing.
    if self._file.write(line) != len(line):
      raise OSError(f'{self._path}: the disk has no room for a line')
    os.fsync(self._file.fileno())


def _whole_lines(path):
  """(the lines that are whole, the bytes that they take)."""
  lines, size = [], 0
  if not path.exists():
    return lines, size
  whole = path.read_bytes()
  for line in whole.splitlines(keepends=True):
    try:
      if not line.endswith(b'\n'):
        break
      text, mark, digest = line[:-1].partition(_MARK)
      if mark and digest != _digest(text):
        raise ValueError('not what was written')
      lines.append(json.loads(text))
    except ValueError:
      # After a power failure, perhaps; what follows it was written later.
      logging.warning(
          '%s: line %d is damaged; what it and the %d bytes behind it stand '
          'for is done again', path, len(lines) + 1,
          len(whole) - size - len(line))
      break
    size += len(line)
  return lines, size


def _digest(text):
  return hashlib.sha256(text).hexdigest()[:_DIGITS].encode()


def _differing(old, new):
  if not (isinstance(old, dict) and isinstance(new, dict)):
    return ['its kind']
  return sorted(key for key in old.keys() | new.keys()
                if old.get(key) != new.get(key))
