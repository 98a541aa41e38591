"""Processes that train or evaluate, each as short as another's test wants.

A server that has imported everything forks them: a life begins in a fraction of
a second, and compiles nothing that one before it has compiled.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading

PRELOADED = ['runs', 'msfp_jax.run.cli', 'msfp_jax.run.evaluate',
             'msfp_jax.run.train']


# Of Linux, include/uapi/linux/capability.h: to write where no one may, to read
# likewise, and to change what is another's.
_CAPABILITIES = 0b1110
_VERSION = 0x20080522


def _like_anybody():
  """Gives up what the superuser may do, so that rights of files count."""
  libc = ctypes.CDLL(None, use_errno=True)
  if not hasattr(libc, 'capset'):  # not Linux
    return
  header = (ctypes.c_uint32 * 2)(_VERSION, 0)
  sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
  def call(function):
    if function(header, sets):
      raise OSError(ctypes.get_errno(), 'capabilities')

  call(libc.capget)
  for i in range(3):
    sets[i] &= ~_CAPABILITIES
  call(libc.capset)


def _live(program, npz, changes, workdir, output):
  """What a process does; what it writes goes to the pipe `output`."""
  os.dup2(output.fileno(), sys.stdout.fileno())
  os.dup2(output.fileno(), sys.stderr.fileno())
  output.close()
  _like_anybody()
  from absl import logging
  import runs

  from msfp_jax.base import quiet
  from msfp_jax.run import cli
  from msfp_jax.run import evaluate
  from msfp_jax.run import train
  # As `cli.run` and absl's own do.
  logging.use_absl_handler()
  logging.get_absl_handler().addFilter(quiet.worth_showing)
  named = {'train': train.run, 'evaluate': evaluate.run}
  cli.guard(lambda: named[program](runs.config_of(npz, changes), workdir))


class Lives:
  """Begins processes of one run, one after the other."""

  def __init__(self, npz, changes):
    self._npz, self._changes = npz, changes
    self._context = multiprocessing.get_context('forkserver')
    self._context.set_forkserver_preload(PRELOADED)

  def begin(self, workdir, program):
    """Starts 'train' or 'evaluate', in a process."""
    # A pipe: a process that can write no file must still be heard.
    ours, its = self._context.Pipe(duplex=False)
    process = self._context.Process(target=_live, args=(
        program, self._npz, self._changes, str(workdir), its))
    process.start()
    its.close()
    self._said = []
    self._reader = threading.Thread(target=self._read, args=(ours, self._said))
    self._reader.start()
    return process

  def _read(self, pipe, said):
    with open(pipe.fileno(), 'rb', closefd=False) as file, pipe:
      said.append(file.read().decode())

  def whole(self, workdir, program):
    """Runs it to its end."""
    process = self.begin(workdir, program)
    process.join()
    assert process.exitcode == 0, self.said()

  def said(self):
    """What the last one wrote, once it has ended."""
    self._reader.join()
    return ''.join(self._said)


# By SIGTERM before training watches for it; while it does; by SIGKILL.
STOPPED = (-signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGKILL)
