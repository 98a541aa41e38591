"""The folder of a run: whose it is, and whether it has what is asked for."""

import json
import pathlib
from typing import Any

import ml_collections

from msfp_jax.base import errors
from msfp_jax.base import files

# The packed model.
PACKED_FILE = 'packed.safetensors'


def prepare(config: ml_collections.ConfigDict, workdir: str,
            free: tuple[str, ...] = ('eval',)) -> dict[str, Any]:
  """Claims a workdir: writes config.json, or checks that it is the same.

  A config.json alone claims nothing: its run was refused, or had no time.

  Args:
    config: of the run.
    workdir: made where missing.
    free: parts of the config that may change between runs of one workdir, as
      they do not reach into what is stored there.

  Returns:
    What config.json holds: the config as plain values.

  Raises:
    errors.WorkdirError: it was made by another config; the differences are
      listed.
    OSError: it cannot be written.
  """
  path = pathlib.Path(workdir) / 'config.json'
  new = json.loads(config.to_json_best_effort())
  # What else is there was made by the config of config.json.
  if path.is_file() and any(file != path for file in path.parent.iterdir()):
    try:
      old = json.loads(path.read_text())
      if not isinstance(old, dict):
        raise ValueError('it holds no fields')
    except ValueError as error:
      raise errors.WorkdirError(
          f'{path} is damaged ({error}); delete the workdir, or restore the '
          'file') from error
    # Field by field: the message says what to undo, and not only that they
    # differ.
    differences = [
        line for key in sorted(old.keys() | new.keys()) if key not in free
        for line in _differences(old.get(key), new.get(key), key)]
    if differences:
      raise errors.WorkdirError(
          f'{workdir} was made by another config; use another --workdir, or '
          'undo:\n  ' + '\n  '.join(differences))
  files.write_json(path, new)
  return new


def _differences(old: Any, new: Any, name: str) -> list[str]:
  if isinstance(old, dict) and isinstance(new, dict):
    return [line for key in sorted(old.keys() | new.keys())
            for line in _differences(old.get(key), new.get(key),
                                     f'{name}.{key}')]
  return [] if old == new else [f'{name}: {old!r} there, {new!r} now']


def check_trained(workdir: str, num_updates: int) -> None:
  """Raises WorkdirError unless its fine-tuning of `num_updates` is complete."""
  # A checkpoint appears under its name once it is complete.
  last = pathlib.Path(workdir) / 'checkpoints' / str(num_updates)
  if not num_updates or not last.is_dir():
    raise errors.WorkdirError(
        f"no finished fine-tuning in {workdir} ({last} is not there): run "
        "train.py with the same config and workdir first, or leave 'tuned' "
        'out of config.eval.rows')


def check_packed(workdir: str) -> None:
  """Raises WorkdirError unless the workdir holds a packed model."""
  path = pathlib.Path(workdir) / PACKED_FILE
  if not path.is_file():
    raise errors.WorkdirError(
        f'no packed model at {path}: run train.py with the same config and '
        "workdir first, or leave 'packed' out of config.eval.rows")
