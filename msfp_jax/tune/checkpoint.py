"""Training state on disk: orbax, resumable after any kind of stop."""

import contextlib
import os
import pathlib
import shutil
import signal
import threading
from typing import Any
import zlib

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from msfp_jax.base import devices
from msfp_jax.base import errors


class Preempted(SystemExit):
  """The run was asked to stop, has saved, and can be started again."""


def _checksum(state: Any) -> np.uint32:
  """CRC of all values: orbax would restore a flipped bit without a word."""
  crc = 0
  # Leaf by leaf: a state that several devices share may not fit in one place.
  for leaf in jax.tree.leaves(state):
    crc = zlib.crc32(np.ascontiguousarray(devices.fetch(leaf)).tobytes(), crc)
  return np.uint32(crc)


class Checkpointer:
  """Saves and restores a pytree of arrays under `directory`/<step>/.

  Files are written while training goes on; those of the last `save` are there
  after `wait`, or once it is closed.

  Usable as a context manager. While open it also watches for SIGTERM and
  SIGINT: `stop_requested` turns true, and the loop saves and leaves.
  """

  def __init__(self, directory: str | pathlib.Path, keep: int = 2):
    self._directory = pathlib.Path(directory).resolve()
    devices.by_first(
        lambda: self._directory.mkdir(parents=True, exist_ok=True),
        'the folder of checkpoints is there')
    self._keep = keep
    self._manager = self._open()
    self._writing = None  # the step whose files may not all be there yet
    self.stop_requested = False
    # By a signal to this process: all processes of a run may get one each.
    self._asked = False
    self.exit_code = 0
    self._handlers = {}

  def _open(self) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        self._directory,
        # An older step is removed once a newer one is complete.
        options=ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, enable_async_checkpointing=True))

  def __enter__(self):
    # Python lets the main thread alone set signal handlers.
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._handlers[number] = signal.signal(number, self._request_stop)
    return self

  def __exit__(self, kind, *unused):
    try:
      with errors.second_to(kind):
        self.wait()
    finally:
      # Signals go back to whoever had them before.
      for number, handler in self._handlers.items():
        signal.signal(number, handler)
      # What could not be written it says once more, in its own words.
      with contextlib.suppress(OSError, ValueError):
        self._manager.close()

  def _request_stop(self, number, unused_frame):
    if self._asked:  # twice: do not wait for the step's end
      if jax.process_count() > 1:
        # JAX's own end would wait for the other processes.
        os._exit(128 + number)
      raise Preempted(128 + number)
    logging.warning('%s: saving, then stopping; again to stop without',
                    signal.Signals(number).name)
    self.exit_code = 128 + number
    self.stop_requested = self._asked = True

  def stopping(self, agree: bool = True) -> bool:
    """Whether to save and leave: the same in all processes.

    Args:
      agree: whether several processes ask each other, for which they wait; the
        same in all of them. Else they go on.
    """
    if jax.process_count() == 1:
      return self.stop_requested
    if agree:
      # A signal to one of them is enough.
      codes = multihost_utils.process_allgather(np.asarray(
          self.exit_code if self.stop_requested else 0))
      if codes.any():
        self.stop_requested, self.exit_code = True, int(codes.max())
    return agree and self.stop_requested

  @property
  def steps(self) -> list[int]:
    """Steps on disk, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any) -> None:
    """Begins to write `state`, which may be donated to a step after this.

    The directory appears only once it is complete. Waits for the step that was
    saved before.

    Raises:
      OSError: the disk is full or read-only, now or while that was written;
        earlier checkpoints remain.
    """
    if step in self.steps:
      return
    self.wait()
    self._writing = step
    with self._naming():
      self._manager.save(step, args=ocp.args.StandardSave(
          {'state': state, 'crc32': _checksum(state)}))

  def wait(self) -> None:
    """Returns once all files of the last `save` are written.

    Raises:
      OSError: they cannot be.
    """
    if self._writing is not None:
      with self._naming():
        self._manager.wait_until_finished()
      self._writing = None

  @contextlib.contextmanager
  def _naming(self):
    """Errors of writing say what could not be written, and what is left."""
    try:
      yield
    except (OSError, ValueError) as error:
      step, self._writing = self._writing, None
      self._manager.reload()  # else it counts what it did not write
      said = str(error).split('\n')[0][:300]
      raise OSError(
          f'cannot write checkpoint {step} under {self._directory}: {said}; '
          f'the run can go on from {self.steps[-1:] or "the start"} once '
          'there is room and permission') from error

  def restore(self, abstract: Any, shardings: Any = None) -> Any | None:
    """The newest state that can be read, or None.

    A damaged checkpoint is named in the log, set aside as `<step>.damaged`,
    and the one before it is tried.

    Args:
      abstract: a state of the same structure (values are not read).
      shardings: a tree like it: where it shall lie, whatever it was saved from;
        None: on one device.

    Raises:
      ValueError: none of the checkpoints can be read, or their structure is
        another model's.
      OSError: the folder is gone.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, abstract)
    if shardings is None:
      # Said as well: orbax would look for the devices that it was saved from.
      one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      shardings = jax.tree.map(lambda _: one, abstract)
    abstract = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings)
    abstract = {'state': abstract, 'crc32': ocp.utils.to_shape_dtype_struct(
        np.zeros((), np.uint32))}
    damaged = []
    # From the newest on; `keep` of 2 is what makes a second try possible.
    for step in reversed(self.steps):
      failed = None
      try:
        saved = self._manager.restore(
            step, args=ocp.args.StandardRestore(abstract))
        state = saved['state']
        if _checksum(state) != saved['crc32']:
          raise ValueError('its values do not match their checksum')
      except Exception as error:  # noqa: BLE001 - orbax raises many kinds
        logging.warning('checkpoint %d under %s cannot be read (%s: %s); '
                        'trying the one before', step, self._directory,
                        type(error).__name__, str(error).split('\n')[0][:300])
        failed = error
      # One judgement: processes that went on from two steps would wait for each
      # other without end.
      if not devices.all_say(failed is None):
        damaged.append((step, failed or ValueError(
            'another process cannot read it')))
        continue
      self._set_aside([step for step, _ in damaged])
      return state
    if damaged and not self._directory.is_dir():
      raise OSError(f'{self._directory} is gone; put it back, and the run goes '
                    'on from its checkpoints')
    if damaged:
      raise ValueError(
          f'none of the checkpoints {self.steps} under {self._directory} can '
          'be read for this configuration; delete the folder to start anew'
      ) from damaged[0][1]
    return None

  def _set_aside(self, steps: list[int]) -> None:
    if not steps:
      return
    # The manager lists its folder once, when it is opened.
    self._manager.close()
    for step in steps if devices.is_first() else ():
      target = self._directory / f'{step}.damaged'
      shutil.rmtree(target, ignore_errors=True)
      (self._directory / str(step)).rename(target)
    devices.wait('damaged checkpoints are set aside')
    self._manager = self._open()
