"""Files that are written as a whole or not at all."""

from collections.abc import Iterator
import contextlib
import os
import pathlib


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary path that becomes `path` if the block succeeds.

  Makes the folder where missing. If the block raises, `path` is as before.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    yield temporary
    os.replace(temporary, path)
  except OSError as error:
    if error.filename is None and error.errno is not None:
      # As of a write on a full disk.
      raise OSError(error.errno, error.strerror, str(path)) from error
    raise
  finally:
    temporary.unlink(missing_ok=True)
