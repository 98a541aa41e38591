"""Errors that end a command with their message alone (see `run.cli.guard`)."""


class DivergedError(RuntimeError):
  """The loss or the gradients are no longer finite."""


class MemoryLackError(RuntimeError):
  """What is to run needs more memory than its devices have."""


class WorkdirError(ValueError):
  """A workdir that belongs to another config, or lacks what is asked of it."""


# Mistakes of the user's or of the machine's, not of this code: their message
# says all that is needed, and a traceback would hide it.
EXPECTED = (ValueError, OSError, DivergedError, MemoryLackError)
