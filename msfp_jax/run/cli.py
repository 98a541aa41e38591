"""Running a command: expected errors, needed flags, progress on stderr."""

from collections.abc import Callable
import os
import shlex
import sys
import traceback
from typing import TypeVar

from absl import app
from absl import flags
from absl import logging
import jax

from msfp_jax.base import errors
from msfp_jax.base import quiet
from msfp_jax.run import cluster
from msfp_jax.run import config_files

_T = TypeVar('_T')


def guard(work: Callable[[], _T]) -> _T:
  """Runs `work`; expected errors end the program with their message alone.

  So does the loss of another process, where a run has several.

  MSFP_TRACEBACK=1 in the environment shows the traceback all the same.
  """
  try:
    return work()
  except KeyboardInterrupt:
    if not cluster.is_joined():
      raise
    os._exit(130)  # as below
  except Exception as error:
    shown = str(error)
    if cluster.is_joined() and (reason := cluster.lost(error)):
      shown = reason
    elif not isinstance(error, errors.EXPECTED):
      shown = ''
    if os.environ.get('MSFP_TRACEBACK') or not shown:
      if not cluster.is_joined():
        raise
      traceback.print_exc()
    logging.flush()
    if not cluster.is_joined():
      sys.exit(f'error: {shown}')
    if shown:
      print(f'error: {shown}', file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: JAX's own end of a run waits minutes for processes that are gone,
    # and meanwhile others wait for this one.
    os._exit(1)


def need(**values: str | None) -> None:
  """Ends the program unless all of these flags have a value."""
  if missing := [name for name, value in values.items() if value is None]:
    sys.exit('error: missing ' + ', '.join(f'--{name}' for name in missing)
             + '\n--help lists the flags')


def command() -> str:
  """This program's command line, as it was typed but for Python's options."""
  # A module that was run by -m knows its name; its argv[0] is a path that means
  # nothing elsewhere.
  spec = getattr(sys.modules['__main__'], '__spec__', None)
  program = [sys.argv[0]] if spec is None else ['-m', spec.name]
  return shlex.join(['python', *program, *sys.argv[1:]])


def run(main: Callable[[list[str]], None]) -> None:
  """app.run with JAX's flags, and progress lines on stderr."""
  jax.config.config_with_absl()
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(quiet.worth_showing)
  app.run(main, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses flags as absl does; a bad one ends with a message, no traceback."""
  try:
    return flags.FLAGS(config_files.quote_lists(argv))
  except flags.Error as error:
    # A config file's own error stands last, below its traceback.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[-1] if 'Traceback' in str(error) else ' '.join(lines)
  except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    # A misspelt config field; the message suggests the right one.
    message = ' '.join(map(str, error.args))
  sys.exit(f'error: {message}\n--help lists the flags')
