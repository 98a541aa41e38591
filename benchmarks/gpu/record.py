"""What a stage has measured: kept by name, written after each measurement."""

from collections.abc import Callable, Iterable
import pathlib
import time
import traceback
from typing import Any

import jax.numpy as jnp

from benchmarks import machine
from benchmarks.gpu import runner

_TRIES = 2  # of a measurement


class Record:
  """Measurements of one stage, of which none is made twice.

  Attributes:
    found: {name: 'value', or 'error' and 'tries'}, as in the file.
  """

  def __init__(self, folder: str, seconds: float):
    """Reads what an earlier try has left.

    Args:
      folder: of the stage.
      seconds: after which no measurement is begun.
    """
    self._path = pathlib.Path(folder) / runner.FOUND
    self._end = time.monotonic() + seconds
    before = runner.read(self._path)
    self.found = before.get('measurements', {})
    self._about = before.get('machine') or machine.describe()

  def left(self) -> float:
    """Seconds until nothing is begun any more."""
    return self._end - time.monotonic()

  def measure(self, name: str, function: Callable[[], Any],
              least: float = 0.0) -> Any:
    """Keeps and returns function(); None where that is not to be had.

    An error is kept in its place, and the next measurements go on. What went
    wrong twice, or ended its process twice, is left out, and so is that for
    which there are no `least` seconds left.

    Raises:
      SystemExit: after an error the device answers no more, as after a kernel
        that reads where it may not: another process can go on.
    """
    row = self.found.get(name, {})
    if 'value' in row:
      return row['value']
    tries = row.get('tries', 0)
    if tries == _TRIES or self.left() < least:
      return None
    tries += 1
    # Written before: if the process ends here, the next one knows by what.
    self._keep(name, tries=tries, error='it ended the process')
    try:
      value = function()
    except Exception as error:  # noqa: BLE001 - the others go on
      traceback.print_exc()
      self._keep(name, tries=tries,
                 error=f'{type(error).__name__}: {error}'[:300])
      if not answers():
        raise SystemExit('the device answers no more') from error
      return None
    self._keep(name, value=value)
    print(f'{name}: {value}', flush=True)
    return value

  def conclude(self, name: str, value: Any) -> None:
    """Keeps what follows from the measurements, in place of what did before."""
    self._keep(name, value=value)

  def _keep(self, name: str, **row: Any) -> None:
    self.found[name] = row
    runner.write(self._path, {'machine': self._about,
                              'measurements': self.found})

  def status(self, names: Iterable[str]) -> int:
    """The exit status of a stage that has these measurements to make."""
    rows = [self.found.get(name, {}) for name in names]
    ready = all('value' in row or row.get('tries') == _TRIES for row in rows)
    return 0 if ready else runner.MORE


def answers() -> bool:
  """Whether the device still computes."""
  try:
    return float(jnp.ones(2).sum()) == 2.0
  except RuntimeError:  # JAX's errors of a device
    return False

