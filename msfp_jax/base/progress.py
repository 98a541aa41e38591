"""Progress lines in the log, with rate and ETA."""

from collections.abc import Callable
import time

from absl import logging
import jax


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
      unit: str = 'steps',
      images_per_step: int = 0,
      clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the clock.

    Args:
      name: what is under way.
      total: steps in all.
      start: steps done before, by the run that this one resumes.
      every_seconds: at most one line in this time, the last one excepted.
      unit: what is counted, for the rate.
      images_per_step: the rate is also given in images; 0: it is not.
      clock: seconds, monotonic.
    """
    self._name, self._total, self._unit = name, total, unit
    self._images_per_step = images_per_step
    self._every_seconds, self._clock = every_seconds, clock
    self._first = self._last = (start, clock())

  def update(self, step: int, **scalars: float) -> None:
    """Tells that `step` steps are done; logs if it is time.

    Call it once for steps that end together: the rate would be wrong.
    """
    # Process 0 speaks for all.
    now = self._clock()
    done = step >= self._total
    if jax.process_index() or (
        not done and now - self._last[1] < self._every_seconds):
      return
    # Since the line before, or for the last line since the start.
    since_step, since = self._first if done else self._last
    rate = (step - since_step) / max(now - since, 1e-9)
    if done:
      end = f'took {_duration(now - since)}'
    elif rate > 0:
      end = f'ETA {_duration((self._total - step) / rate)}'
    else:
      end = 'ETA unknown'
    values = ''.join(f' {key}={value:.4g}' for key, value in scalars.items())
    speed = f'{_number(rate)} {self._unit}/s'
    if self._images_per_step:
      speed += f' ({_number(rate * self._images_per_step)} images/s)'
    logging.info('%s %d/%d (%d%%) %s %s%s', self._name, step,
                 self._total, 100 * step // max(self._total, 1), speed, end,
                 values)
    self._last = (step, now)


def _number(rate: float) -> str:
  return f'{rate:.1f}' if rate >= 1 else f'{rate:.2g}'


def _duration(seconds: float) -> str:
  """Formats a time as `m:ss`, from an hour on as `h:mm:ss`."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}:{minutes:02d}:{seconds:02d}'
  return f'{minutes}:{seconds:02d}'
