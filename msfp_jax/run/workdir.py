"""The folder of a run: whose it is, and whether it has what is asked for."""

from collections.abc import Iterator, Mapping
import contextlib
import json
import pathlib
from typing import Any

import jax
import ml_collections

from msfp_jax.base import devices
from msfp_jax.base import errors
from msfp_jax.base import files
from msfp_jax.base import lock as lock_lib

# The packed model.
PACKED_FILE = 'packed.safetensors'
# Of config.json: what is no field of the config.
TAKEN = 'taken'
# What may change at any time: how many processes and devices share the work,
# and how it is cut to fit them. Roundings change, and by `accumulate` what
# dropout draws.
_MAY_CHANGE = ('mesh', 'pretrain.accumulate', 'pretrain.remat',
               'finetune.accumulate', 'finetune.remat')
# Fields that the config.json of older workdirs lacks, and the value they had.
_ONCE = {'finetune.dtype': 'float32', 'finetune.driver': 'teacher',
         'finetune.steer': 0.0, 'finetune.window_steps': 0,
         'finetune.direction': 0.0, 'finetune.ema_decay': 0.0,
         'eval.more_features': [], 'eval.more_references': [],
         'eval.sensitivity_images': 0, 'quant.drift_images': 0}
# (field, value there, value now) of defaults that have changed: the average was
# taken where nothing was said, as it is but where a yaml says otherwise.
_SAME = (('ema', True, None),)


@contextlib.contextmanager
def hold(workdir: str) -> Iterator[None]:
  """Keeps other processes out of a workdir while the block runs.

  A run of several processes, one a host, holds it by its first.

  Raises:
    errors.WorkdirError: one is at work there.
    OSError: the folder cannot be made.
  """
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      try:
        stack.enter_context(lock_lib.hold(workdir))
      except lock_lib.InUseError as error:
        raise errors.WorkdirError(
            f'{workdir} is in use by {error}: wait until that run has ended, '
            'stop it, or use another --workdir') from error
    yield


def prepare(config: ml_collections.ConfigDict, workdir: str,
            free: tuple[str, ...] = ('eval',),
            taken: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Claims a workdir: writes config.json, or checks that it is the same.

  Args, returns and raises as `check`, and OSError where it cannot be written.
  """
  new = check(config, workdir, free, taken)
  path = pathlib.Path(workdir) / 'config.json'
  devices.by_first(lambda: files.write_json(path, new), 'the claim is written')
  return new


def check(config: ml_collections.ConfigDict, workdir: str,
          free: tuple[str, ...] = ('eval',),
          taken: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Checks that nothing in a workdir was made by another config.

  A config.json alone claims nothing: its run was refused, or had no time.

  Args:
    config: of the run.
    workdir: which need not exist.
    free: parts of the config that may change between runs of one workdir, as
      they do not reach into what is stored there.
    taken: what the run works with where the config says nothing, as far as it
      is known yet; a file beside the checkpoint may say it, and change.

  Returns:
    What config.json is to hold: the config as plain values, and under TAKEN
    what was taken, now or before.

  Raises:
    errors.WorkdirError: it was made by another config; the differences are
      listed.
  """
  path = pathlib.Path(workdir) / 'config.json'
  new = json.loads(config.to_json_best_effort())
  if taken is not None:
    new[TAKEN] = json.loads(json.dumps(taken))
  # What else is there was made by the config of config.json.
  if path.is_file() and any(file.name not in (path.name, lock_lib.NAME)
                            for file in path.parent.iterdir()):
    try:
      old = json.loads(path.read_text())
      if not isinstance(old, dict):
        raise ValueError('it holds no fields')
    except ValueError as error:
      raise errors.WorkdirError(
          f'{path} is damaged ({error}); delete the workdir, or restore the '
          'file') from error
    if TAKEN in old:
      new.setdefault(TAKEN, old[TAKEN])
    # Field by field: the message says what to undo, and not only that they
    # differ.
    differences = [
        line for key in sorted(old.keys() | new.keys())
        if key not in free and (key != TAKEN or key in old)
        for line in _differences(old.get(key), new.get(key), key)]
    if differences:
      raise errors.WorkdirError(
          f'{workdir} was made by another config; use another --workdir, or '
          'undo:\n  ' + '\n  '.join(differences))
  return new


def _differences(old: Any, new: Any, name: str) -> list[str]:
  if name in _MAY_CHANGE:
    return []
  old = _ONCE.get(name) if old is None else old
  if (name, old, new) in _SAME:
    return []
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
