"""Processes that train or evaluate, each as short as another's test wants.

A server that has imported everything forks them: a life begins in a fraction of
a second, and compiles nothing that one before it has compiled.
"""

import multiprocessing
import os
import signal
import sys

PRELOADED = ['runs', 'msfp_jax.run.cli', 'msfp_jax.run.evaluate',
             'msfp_jax.run.train']


def _live(programs, npz, changes, workdir, log):
  """What a process does; its output goes to the file `log`."""
  with open(log, 'a') as file:
    os.dup2(file.fileno(), sys.stdout.fileno())
    os.dup2(file.fileno(), sys.stderr.fileno())
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
  for program in programs:
    cli.guard(lambda program=program: named[program](
        runs.config_of(npz, changes), workdir))


class Lives:
  """Begins processes of one run, one after the other."""

  def __init__(self, npz, changes, folder):
    self._npz, self._changes, self._folder = npz, changes, folder
    self._context = multiprocessing.get_context('forkserver')
    self._context.set_forkserver_preload(PRELOADED)
    self.log = folder / 'log'

  def begin(self, workdir, *programs):
    """Starts the programs, in a process."""
    self.log.write_text('')
    process = self._context.Process(target=_live, args=(
        programs, self._npz, self._changes, str(workdir), str(self.log)))
    process.start()
    return process

  def whole(self, workdir, *programs):
    """Runs them to their end."""
    process = self.begin(workdir, *programs)
    process.join()
    assert process.exitcode == 0, self.log.read_text()

  def said(self):
    """What the last one wrote."""
    return self.log.read_text()


# By SIGTERM before training watches for it; while it does; by SIGKILL.
STOPPED = (-signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGKILL)
