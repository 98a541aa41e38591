"""Metrics, images and progress: TensorBoard, metrics.jsonl and the log.

`MetricWriter` has the methods of clu's metric writers. Those import
TensorFlow, 1.4 GB, only to write event files; this one uses tensorboardX. It
also appends to metrics.jsonl, which is what scripts read:

    {"step": 100, "finetune/loss": 0.0123}

There is no wall-clock time in it: a run that was interrupted and resumed
leaves the same file as one that was not.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import math
import os
import pathlib
import time
from typing import Any

from absl import logging
import jax
import numpy as np
from PIL import Image
import tensorboardX


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

  def __exit__(self, *unused) -> None:
    self.close()

  def _open(self, last_step: float) -> None:
    _drop_lines(self._path, last_step)
    # Line by line, so that the file can be followed and a crash costs little.
    self._file = open(self._path, 'a', 1, encoding='utf-8')  # noqa: SIM115
    self._purge_step = None if math.isinf(last_step) else int(last_step) + 1
    self._events = None

  @property
  def _board(self) -> tensorboardX.SummaryWriter:
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
    self._file.write(json.dumps(line, allow_nan=False) + '\n')
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
      batch = _checked(f'images {name!r} at step {step}', batch, 'NHWC')
      grid = image_grid(batch, math.ceil(math.sqrt(len(batch))))
      self._board.add_image(name, grid, int(step), dataformats='HWC')

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Shows texts (Markdown) in TensorBoard."""
    if self._active:
      for name, text in texts.items():
        self._board.add_text(name, text, int(step))

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Shows hyper-parameters in TensorBoard; nested ones as 'outer.inner'."""
    if self._active:
      self._board.add_hparams(_flat(hparams), {}, name='hparams')

  def flush(self) -> None:
    """Flushes the events; lines of metrics.jsonl never wait for this.

    Those that tensorboardX's thread has not come to yet follow soon.
    """
    if self._active and self._events is not None:
      self._events.flush()

  def close(self) -> None:
    """Flushes and closes; a second call does nothing."""
    if self._active:
      self._file.close()
      if self._events is not None:
        self._events.close()


def _flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  flat = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      flat.update(_flat(value, f'{prefix}{name}.'))
    else:
      known = isinstance(value, bool | int | float | str)
      flat[prefix + name] = value if known else str(value)
  return flat


def _drop_lines(path: pathlib.Path, last_step: float) -> None:
  """Removes the lines of steps after `last_step` and the unreadable ones."""
  if not path.exists():
    return
  lines = path.read_bytes().splitlines(keepends=True)
  kept = []
  for number, line in enumerate(lines, 1):
    try:
      if not line.endswith(b'\n'):
        raise ValueError('no end of line')
      if json.loads(line)['step'] <= last_step:
        kept.append(line)
    except (ValueError, KeyError, TypeError) as error:
      logging.warning('%s: line %d dropped, it is damaged (%s)',
                      path, number, error)
  if len(kept) < len(lines):
    with atomic_path(path) as temporary:
      temporary.write_bytes(b''.join(kept))


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
  """Puts images side by side, row by row, without gaps.

  Args:
    images: uint8 `[N, H, W, C]`, C = 1 or 3, N > 0.
    columns: images a row; a last row that is not full ends in black.

  Returns:
    uint8 `[ceil(N / columns) * H, min(N, columns) * W, C]`.

  Raises:
    ValueError: other images, or columns < 1.
  """
  images = _checked('image_grid', images, 'NHWC')
  if columns < 1:
    raise ValueError(f'image_grid: columns is {columns}, must be at least 1')
  count, height, width, channels = images.shape
  columns = min(columns, count)
  rows = -(-count // columns)
  images = np.pad(
      images, ((0, rows * columns - count), (0, 0), (0, 0), (0, 0)))
  grid = images.reshape(rows, columns, height, width, channels)
  return grid.transpose(0, 2, 1, 3, 4).reshape(
      rows * height, columns * width, channels)


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
  """Writes uint8 `[H, W, C]`, C = 1 or 3, on process 0; all or nothing.

  Raises:
    ValueError: not such an image.
    OSError: the file cannot be written.
  """
  image = _checked(str(path), image, 'HWC')
  if image.shape[-1] == 1:
    image = image[..., 0]
  if jax.process_index() == 0:
    with atomic_path(path) as temporary:
      Image.fromarray(image).save(temporary, format='PNG')


def _checked(name: str, images: np.ndarray, axes: str) -> np.ndarray:
  images = np.asarray(images)
  if (images.dtype != np.uint8 or images.ndim != len(axes) or not images.size
      or images.shape[-1] not in (1, 3)):
    raise ValueError(
        f'{name}: needs uint8 [{", ".join(axes)}] with C = 1 or 3, not empty; '
        f'got {images.dtype} {list(images.shape)}')
  return images


class Progress:
  """Logs lines like

      calibrate 120/400 (30%) 12.3 steps/s ETA 0:23 loss=0.123

  with the rate since the line before: compilation and other people's jobs do
  not spoil the ETA for long. The last line has the whole run's rate and time.
  """

  def __init__(
      self,
      name: str,
      total: int,
      start: int = 0,
      *,
      every_seconds: float = 10.0,
      clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the clock.

    Args:
      name: what is under way.
      total: steps in all.
      start: steps done before, by the run that this one resumes.
      every_seconds: at most one line in this time, the last one excepted.
      clock: seconds, monotonic.
    """
    self._name, self._total = name, total
    self._every_seconds, self._clock = every_seconds, clock
    self._first = self._last = (start, clock())

  def update(self, step: int, **scalars: float) -> None:
    """Tells that `step` steps are done; logs if it is time.

    Call it once for steps that end together: the rate would be wrong.
    """
    now = self._clock()
    done = step >= self._total
    if jax.process_index() or (
        not done and now - self._last[1] < self._every_seconds):
      return
    since_step, since = self._first if done else self._last
    rate = (step - since_step) / max(now - since, 1e-9)
    if done:
      end = f'took {_duration(now - since)}'
    elif rate > 0:
      end = f'ETA {_duration((self._total - step) / rate)}'
    else:
      end = 'ETA unknown'
    values = ''.join(f' {key}={value:.4g}' for key, value in scalars.items())
    speed = f'{rate:.1f}' if rate >= 1 else f'{rate:.2g}'
    logging.info('%s %d/%d (%d%%) %s steps/s %s%s', self._name, step,
                 self._total, 100 * step // max(self._total, 1), speed, end,
                 values)
    self._last = (step, now)


def _duration(seconds: float) -> str:
  """`m:ss`, or `h:mm:ss` from an hour on."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}:{minutes:02d}:{seconds:02d}'
  return f'{minutes}:{seconds:02d}'
