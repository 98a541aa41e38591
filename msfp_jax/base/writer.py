"""Metrics and images of a run: TensorBoard and metrics.jsonl.

`MetricWriter` has the methods of clu's metric writers that training calls.
Those import TensorFlow, 1.4 GB, only to write event files; this one uses
tensorboardX. It also appends to metrics.jsonl, which is what scripts read:

    {"step": 100, "finetune/loss": 0.0123}

There is no wall-clock time in it: a run that was interrupted and resumed
leaves the same file as one that was not.
"""

from collections.abc import Mapping
import json
import math
import os
import pathlib
import time
from typing import Any

from absl import logging
import jax
import numpy as np
import tensorboardX

from msfp_jax.base import errors
from msfp_jax.base import files
from msfp_jax.base import pictures


class MetricWriter:
  """Writes `workdir`/tensorboard and `workdir`/metrics.jsonl.

  Only process 0 writes; elsewhere the methods do nothing. A context manager.
  """

  def __init__(self, workdir: str | os.PathLike):
    """Opens both for appending; drops a line that a crash left half-written.

    Raises:
      OSError: `workdir` cannot be made or written.
    """
    self._active = jax.process_index() == 0
    if not self._active:
      return
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    self._path = workdir / 'metrics.jsonl'
    self._folder = workdir / 'tensorboard'
    self._open(math.inf)

  def __enter__(self) -> 'MetricWriter':
    return self

  def __exit__(self, kind, *unused) -> None:
    with errors.second_to(kind):
      self.close()

  def _open(self, last_step: float) -> None:
    # What is appended must follow a whole line, of a step before.
    _drop_lines(self._path, last_step)
    # Line by line, so that the file can be followed and a crash costs little.
    self._file = open(self._path, 'a', 1, encoding='utf-8')  # noqa: SIM115
    self._purge_step = None if math.isinf(last_step) else int(last_step) + 1
    self._events = None

  @property
  def _board(self) -> tensorboardX.SummaryWriter:
    # Made when first used: a run that logs nothing leaves no event file.
    if self._events is None:
      # The suffix: two files begun in one second would have the same name.
      self._events = tensorboardX.SummaryWriter(
          str(self._folder), purge_step=self._purge_step,
          filename_suffix=f'.{time.time_ns()}')
    return self._events

  def truncate_after(self, step: int) -> None:
    """Forgets what was written for steps after `step`.

    A run resumed from the checkpoint of `step` calls this before it repeats
    those steps. metrics.jsonl is replaced at once or not at all; TensorBoard
    is told to hide the later events.
    """
    if self._active:
      self.close()
      self._open(step)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Appends one line; NaN and infinity become null and are logged.

    Args:
      step: counts from 0.
      scalars: numbers or arrays of one element, by name.

    Raises:
      ValueError: a value that is no scalar, or one that is named 'step'.
    """
    if not self._active:
      return
    line = {'step': int(step)}
    for name, value in scalars.items():
      if name == 'step' or np.size(value) != 1:
        raise ValueError(
            f'scalar {name!r} at step {step} has shape {np.shape(value)}; '
            "pass single numbers, and none of the name 'step'")
      line[name] = float(np.asarray(value).item())
      if not math.isfinite(line[name]):
        logging.warning('%s is %s at step %d: written as null',
                        name, line[name], step)
        line[name] = None
    with files.naming(self._path):
      self._file.write(json.dumps(line, allow_nan=False) + '\n')
    with files.naming(self._folder):
      for name in scalars:
        if line[name] is not None:
          self._board.add_scalar(name, line[name], line['step'])

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Shows each batch as one grid in TensorBoard.

    Args:
      step: counts from 0.
      images: `[N, H, W, C]`, C = 1 or 3, uint8 or float in [0, 1], by name.

    Raises:
      ValueError: not such an array.
    """
    if not self._active:
      return
    for name, batch in images.items():
      batch = np.asarray(batch)
      if np.issubdtype(batch.dtype, np.floating):
        if not np.isfinite(batch).all():
          raise ValueError(f'images {name!r} at step {step} hold NaN or '
                           'infinity; check the samples')
        batch = np.round(np.clip(batch, 0, 1) * 255).astype(np.uint8)
      batch = pictures.check_pixels(
          f'images {name!r} at step {step}', batch, 'NHWC')
      grid = pictures.image_grid(batch, math.ceil(math.sqrt(len(batch))))
      with files.naming(self._folder):
        self._board.add_image(name, grid, int(step), dataformats='HWC')

  def flush(self) -> None:
    """Flushes the events; lines of metrics.jsonl never wait for this.

    Those that tensorboardX's thread has not come to yet follow soon.
    """
    if self._active and self._events is not None:
      with files.naming(self._folder):
        self._events.flush()

  def close(self) -> None:
    """Flushes and closes; a second call does nothing."""
    if self._active:
      try:
        with files.naming(self._path):
          self._file.close()
      finally:
        if self._events is not None:
          with files.naming(self._folder):
            self._events.close()


def _drop_lines(path: pathlib.Path, last_step: float) -> None:
  """Removes the lines of steps after `last_step` and the unreadable ones."""
  if not path.exists():
    return
  lines = path.read_bytes().splitlines(keepends=True)
  kept = []
  for number, line in enumerate(lines, 1):
    try:
      # Valid JSON or not: the next line would be appended to it.
      if not line.endswith(b'\n'):
        raise ValueError('no end of line')
      if json.loads(line)['step'] <= last_step:
        kept.append(line)
    except (ValueError, KeyError, TypeError) as error:
      logging.warning('%s: line %d dropped, it is damaged (%s)',
                      path, number, error)
  if len(kept) < len(lines):
    with files.atomic_path(path) as temporary:
      temporary.write_bytes(b''.join(kept))
