"""Errors that end a command with their message alone (see `run.cli.guard`)."""

from collections.abc import Iterator
import contextlib

from absl import logging


class DivergedError(RuntimeError):
  """The loss or the gradients are no longer finite."""


class MemoryLackError(RuntimeError):
  """What is to run needs more memory than its devices have."""


class WorkdirError(ValueError):
  """A workdir that belongs to another config, or lacks what is asked of it."""


# Mistakes of the user's or of the machine's, not of this code: their message
# says all that is needed, and a traceback would hide it.
EXPECTED = (ValueError, OSError, DivergedError, MemoryLackError)


@contextlib.contextmanager
def second_to(first: type[BaseException] | None) -> Iterator[None]:
  """Logs an OSError of the block, if it comes while another error ends a run.

  Of two errors the first is what the user has to know of.

  Args:
    first: the other one's type, as `__exit__` is given it; None raises.
  """
  try:
    yield
  except OSError as error:
    if first is None:
      raise
    logging.error('%s', error)
