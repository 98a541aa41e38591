"""What other libraries print that helps nobody: it is kept off the terminal.

Importing this sets XLA's level of messages, which it reads once, when JAX is
imported: it must come before that. MSFP_TRACEBACK=1 in the environment, which
shows where errors come from, leaves all as it is.
"""

import importlib.util
import logging
import os

_LEVEL = 'TF_CPP_MIN_LOG_LEVEL'

# XLA's alarms about slow compilation and constant folding ask to file a bug.
# They have the level of errors; those that matter are raised in Python too.
# '1' is what JAX sets by itself, and what a process that uses JAX passes on.
if not os.environ.get('MSFP_TRACEBACK') and os.environ.get(_LEVEL, '1') == '1':
  os.environ[_LEVEL] = '3'


def worth_showing(record: logging.LogRecord) -> bool:
  """Whether a line of the log is for users; a filter of `logging`.

  All warnings and errors are, but for tracebacks of errors that orbax raises as
  well, from several threads. Of lesser lines three kinds are not: orbax tells
  about every file that it touches, and JAX that it found no libtpu where none
  is installed, and no remote devices where none were named.
  """
  from_orbax = 'orbax' in record.pathname
  if record.levelno > logging.INFO:
    return not (from_orbax and record.exc_info)
  if from_orbax:
    return False
  if not record.name.endswith('xla_bridge'):
    return True
  message = record.getMessage()
  if "backend 'proxy'" in message and 'requires the address' in message:
    return False
  return 'libtpu' not in message or importlib.util.find_spec(
      'libtpu') is not None
