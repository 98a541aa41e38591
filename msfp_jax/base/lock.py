"""A folder for one process at a time, whatever becomes of that process."""

from collections.abc import Iterator
import contextlib
import errno
import os
import pathlib
import socket
import time
from typing import IO

from absl import logging

from msfp_jax.base import files

try:
  import fcntl
except ImportError:  # not on Windows
  fcntl = None

NAME = '.lock'
# Of file systems that know no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class InUseError(RuntimeError):
  """Another process, or another part of this one, holds the lock."""


@contextlib.contextmanager
def hold(folder: str | os.PathLike) -> Iterator[None]:
  """Holds a folder's lock while the block runs.

  The lock is the kernel's (flock), and ends with the process that holds it,
  also by SIGKILL or a power failure: the file that is left stands in nobody's
  way. Folders that it makes are removed if the block leaves them empty.

  Args:
    folder: made where missing.

  Raises:
    InUseError: it is held; the message says by whom.
    OSError: the folder cannot be made, or its lock not written.
  """
  folder = pathlib.Path(folder)
  made = [path for path in (folder, *folder.parents) if not path.exists()]
  path = folder / NAME
  try:
    file = _locked(path)
    try:
      yield
    finally:
      if file is not None:
        # While it is still held: nobody's but this process's file is removed.
        # On a disk that nothing can be removed from it does no harm, and must
        # not hide the error by which the block ended.
        with contextlib.suppress(OSError):
          path.unlink()
        file.close()
  finally:
    for empty in made:
      # The deepest first. One that is not empty stays, and so do those above.
      with contextlib.suppress(OSError):
        empty.rmdir()


def _locked(path: pathlib.Path) -> IO[str] | None:
  """The open file whose lock is held; None where there are no locks."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if fcntl is None:
    return None
  while True:
    try:
      file = path.open('a+')
    except FileNotFoundError:
      # Also where another holder has removed the folder that it had made.
      path.parent.mkdir(parents=True, exist_ok=True)
      continue
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      holder = _holder(file)
      file.close()
      if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
        raise InUseError(holder) from error
      if error.errno in _NO_LOCKS:
        path.unlink(missing_ok=True)
        logging.warning('%s: this file system has no locks; see to it that '
                        'no second process works there', path.parent)
        return None
      raise
    # Its last holder may have removed it between the two calls: a lock on a
    # file without a name would keep nobody out.
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file.fileno()), path.stat()):
        break
    file.close()
  try:
    with files.naming(path):
      file.truncate(0)
      file.write(f'process {os.getpid()} on {socket.gethostname()}, since '
                 f'{time.strftime("%Y-%m-%d %H:%M:%S")}')
      file.flush()
  except OSError:
    with contextlib.suppress(OSError):
      file.close()  # which tries to write once more
    raise
  return file


def _holder(file: IO[str]) -> str:
  """Who holds a file's lock, as it says itself."""
  file.seek(0)
  return file.read(200).strip() or 'another process'
