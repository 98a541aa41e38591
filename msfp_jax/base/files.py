"""Files that are written as a whole or not at all."""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
from typing import Any


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
  """Has errors of the block tell the file, as those of a full disk do not."""
  try:
    yield
  except OSError as error:
    if error.filename is None and error.errno is not None:
      raise OSError(error.errno, error.strerror, str(path)) from error
    raise


def check_target(path: str | os.PathLike) -> None:
  """Refuses, before work, a file's name that is none.

  Raises:
    ValueError: a folder has the name, or a file stands where a folder should.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    raise ValueError(f'{path} is a folder: name a file')
  for folder in path.parents:
    if folder.exists():
      if not folder.is_dir():
        raise ValueError(f'{path}: {folder} is a file, and no folder')
      break


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary path that becomes `path` if the block succeeds.

  Makes the folder where missing. If the block raises, `path` is as before.

  Raises:
    ValueError: see `check_target`.
  """
  path = pathlib.Path(path)
  check_target(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # In the same folder, so on the same disk: os.replace is then one step, and
  # readers see the old file or the new one. By process, as two may write it.
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    with naming(path):
      yield temporary
      os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a text file in UTF-8, whole or not at all."""
  with atomic_path(path) as temporary:
    temporary.write_text(text, encoding='utf-8')


def read_json(path: str | os.PathLike, way_out: str) -> Any:
  """Reads JSON. Raises ValueError, which names the file, for anything else.

  Args:
    path: of the file.
    way_out: what to do about a damaged one.
  """
  try:
    return json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is damaged ({error}); {way_out}') from error


def write_json(path: str | os.PathLike, content: Any) -> None:
  """Writes JSON for people to read, whole or not at all."""
  write_text(path, json.dumps(content, indent=2) + '\n')
