"""Progress lines in the log, with rate and ETA."""

from collections.abc import Callable
import time

from absl import logging
import jax


class Progress:
  """Logs lines like

      calibrate 120/400 (30%) 12.3 steps/s ETA 0:23 loss=0.123

  with the rate since the line before: other people's jobs do not spoil the ETA
  for long. The last line has the whole run's rate and time.

  Where the first step compiles a program, that is said before it, and no rate
  has its time in it:

      finetune: compiling; the first step can take a minute or more
      finetune 1/40 (2%) compiled and first done in 0:45
      finetune 40/40 (100%) 2.6 steps/s took 1:00, the first 0:45
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
      share: Callable[[float], str] = lambda rate: '',
      compiles: bool = False,
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
      share: steps per second -> what else is to be said of that, or ''.
      compiles: whether the first step compiles; the first `update` then ends
        it.
      clock: seconds, monotonic.
    """
    self._name, self._total, self._unit = name, total, unit
    self._images_per_step, self._share = images_per_step, share
    self._every_seconds, self._clock = every_seconds, clock
    self._begin = clock()
    self._first = self._last = (start, self._begin)
    # Seconds until the first update, where that compiles; None until then.
    self._compiled = None if compiles else 0.0
    if compiles and start < total and not jax.process_index():
      logging.info('%s: compiling; the first step can take a minute or more',
                   name)

  def update(self, step: int, **scalars: float) -> None:
    """Tells that `step` steps are done; logs if it is time.

    Call it once for steps that end together: the rate would be wrong.
    """
    now = self._clock()
    done = step >= self._total
    silent = now - self._last[1] < self._every_seconds
    if is_first := self._compiled is None:
      # Rates count from here on.
      self._compiled = now - self._begin
      self._first = self._last = (step, now)
    # Process 0 speaks for all.
    if jax.process_index() or (not done and silent):
      return
    # Since the line before, or for the last line since the start.
    since_step, since = self._first if done else self._last
    rate = (step - since_step) / max(now - since, 1e-9)
    parts = [] if is_first else [self._speed(rate)]
    if done:
      parts.append(self._took(now))
    elif is_first:
      parts.append(f'compiled and first done in {_duration(self._compiled)}')
    elif rate > 0:
      parts.append(f'ETA {_duration((self._total - step) / rate)}')
    else:
      parts.append('ETA unknown')
    parts += [f'{key}={value:.4g}' for key, value in scalars.items()]
    logging.info('%s %d/%d (%d%%) %s', self._name, step, self._total,
                 100 * step // max(self._total, 1), ' '.join(parts))
    self._last = (step, now)

  def _speed(self, rate: float) -> str:
    speed = f'{_number(rate)} {self._unit}/s'
    more = [self._share(rate)]
    if self._images_per_step:
      more.insert(0, f'{_number(rate * self._images_per_step)} images/s')
    more = ', '.join(filter(None, more))
    return f'{speed} ({more})' if more else speed

  def _took(self, now: float) -> str:
    took = f'took {_duration(now - self._begin)}'
    # Of one step alone it is the same time.
    if round(self._compiled) and now - self._begin > self._compiled:
      took += f', the first {_duration(self._compiled)}'
    return took


def _number(rate: float) -> str:
  return f'{rate:.1f}' if rate >= 1 else f'{rate:.2g}'


def _duration(seconds: float) -> str:
  """Formats a time as `m:ss`, from an hour on as `h:mm:ss`."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}:{minutes:02d}:{seconds:02d}'
  return f'{minutes}:{seconds:02d}'
