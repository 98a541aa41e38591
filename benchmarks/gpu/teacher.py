"""Stage teacher: trains `configs/cifar10.py:ten` for as long as there is.

The images are --data=NAME:PATH, as configs have them, or `sheets:PATH`, a
folder of benchmarks/gpu/sheets. train.py runs as a process. While it does, its
newest checkpoint becomes the kept file, a small one (benchmarks/gpu/state), and
that file pieces in --pieces, each written whole and named by the digest of all:
whenever this is killed, they hold the last that was made, complete. A later
call goes on from the file where the checkpoints are gone.
"""

import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import traceback
from typing import Any

from absl import app
from absl import flags

from benchmarks.gpu import arguments
from benchmarks.gpu import pieces
from benchmarks.gpu import runner
from benchmarks.gpu import sheets

_DATA = flags.DEFINE_string('data', None, 'NAME:PATH of the images.')
_PIECES = flags.DEFINE_string('pieces', None, 'Where pieces of it go.')
_PIECE = flags.DEFINE_float(
    'piece_mib', pieces.SIZE / pieces.MIB, 'MiB of a piece at most.',
    lower_bound=0.01)
_EVERY = flags.DEFINE_float(
    'every', 5.0, 'Seconds from one kept file to the next, at least.')

STATE = 'state'  # the folder of the kept file
GROUP = 'teacher'  # of its pieces
_TOY = {'data.name': 'synthetic', 'data.path': '3x8x8', 'model.image_size': 8,
        'model.ch_mult': (1,), 'model.dropout': 0.0,
        'pretrain.num_steps': 400, 'pretrain.warmup': 2,
        'pretrain.batch_size': 4, 'pretrain.save_every': 20,
        'pretrain.log_every': 10, 'pretrain.sample_every': 400,
        'pretrain.dtype': 'float32'}


def changes(folder: pathlib.Path, data: str | None, dry: bool
            ) -> dict[str, Any]:
  """What the config is changed by: {dotted field: value}.

  Raises:
    SystemExit: there are no images.
  """
  if dry:
    return _TOY
  if not data:
    raise SystemExit('no images: pass --data=NAME:PATH')
  name, _, path = data.partition(':')
  if name == 'sheets':
    unpacked = folder / 'images.npz'
    if not unpacked.is_file():
      sheets.unpack(pathlib.Path(path), unpacked)
    name, path = 'images', str(unpacked)
  return {'data.name': name, 'data.path': path}


class Training:
  """A run of train.py, and what it has saved.

  Attributes:
    saved: {step: when it was seen}, of its checkpoints.
  """

  def __init__(self, folder: pathlib.Path, word: str,
               changed: dict[str, Any], environment: dict[str, str]):
    self.checkpoints = folder / 'run' / 'pretrain' / 'checkpoints'
    self._process = subprocess.Popen(
        [sys.executable, 'train.py', f'--config=configs/cifar10.py:{word}',
         f'--workdir={folder / "run"}',
         *(f'--config.{name}={value}' for name, value in changed.items())],
        env=environment)
    self.saved = {}

  def look(self) -> int | None:
    """Notes the newest checkpoint; returns the exit status once there is."""
    from benchmarks.gpu import state
    for step in state.steps(self.checkpoints)[-1:]:
      self.saved.setdefault(step, time.monotonic())
    return self._process.poll()

  def stop(self) -> int:
    """Asks it to save and leave."""
    if self._process.poll() is None:
      self._process.send_signal(signal.SIGTERM)
    code = self._process.wait()
    self.look()
    return code

  def speed(self) -> float | None:
    """Steps a second between the first checkpoint seen and the last."""
    (first, start), (last, end) = (
        min(self.saved.items(), default=(0, 0)),
        max(self.saved.items(), default=(0, 0)))
    return (last - first) / (end - start) if end > start else None


def losses(folder: pathlib.Path, count: int = 200) -> float | None:
  """The mean loss of the last steps."""
  path = folder / 'run' / 'pretrain' / 'metrics.jsonl'
  if not path.is_file():
    return None
  rows = [json.loads(line) for line in path.read_text().splitlines()[-count:]]
  found = [row['pretrain/loss'] for row in rows if 'pretrain/loss' in row]
  return sum(found) / len(found) if found else None


class KeptFile:
  """The file that is kept of a training, made of its newest checkpoint.

  Attributes:
    step: of the training that it holds; 0: there is none.
    took: seconds, to make it.
  """

  def __init__(self, folder: pathlib.Path, config: Any,
               target: pathlib.Path | None):
    """For the stage of this folder; pieces go to `target`, if anywhere."""
    self.file = folder / STATE / 'teacher.safetensors'
    self.step, self.took = 0, 0.0
    self._folder, self._config, self._target = folder, config, target
    self._made = -math.inf

  def update(self, checkpoints: pathlib.Path, newest: int) -> None:
    """Takes over the newest checkpoint, if it is another one."""
    from benchmarks.gpu import state
    if newest <= self.step:
      return
    start = time.monotonic()
    try:
      step = state.export(checkpoints, self._config, self.file)
      if self._target:  # as the session does at the stage's end
        pieces.split(GROUP, [self.file], self._folder.parent, self._target,
                     compress=False, size=int(_PIECE.value * pieces.MIB))
      self.step = step
    finally:  # what went wrong is not tried again at once
      self._made = time.monotonic()
      self.took = self._made - start

  def is_due(self) -> bool:
    """Whether the last one is old enough."""
    return time.monotonic() - self._made > _EVERY.value


def main(unused_argv) -> None:
  start, folder = time.monotonic(), arguments.folder()
  environment = dict(os.environ)
  # This process must not hold the device that train.py needs.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  from benchmarks.gpu import state
  from configs import cifar10
  word = 'ten,smoke' if arguments.DRY.value else 'ten'
  changed = changes(folder, _DATA.value, arguments.DRY.value)
  config = cifar10.get_config(word)
  config.update_from_flattened_dict(changed)
  kept = KeptFile(
      folder, config, _PIECES.value and pathlib.Path(_PIECES.value))
  checkpoints = folder / 'run' / 'pretrain' / 'checkpoints'
  resumed = None
  if kept.file.is_file() and not state.steps(checkpoints):
    resumed = state.resume(kept.file, config, checkpoints)
    print(f'goes on from {kept.file}, step {resumed}', flush=True)
  training = Training(folder, word, changed, environment)

  def keep(code: int | None) -> None:
    kept.update(checkpoints, max(training.saved, default=0))
    speed = training.speed()
    pictures = sorted(folder.glob('run/pretrain/samples/*.png'))
    if pictures:
      shutil.copy(pictures[-1], folder / STATE / 'samples.png')
    runner.write(folder / runner.FOUND, {
        'config': f'configs/cifar10.py:{word}', 'changes': changed,
        'resumed_at': resumed, 'step': kept.step,
        'steps': config.pretrain.num_steps, 'returncode': code,
        'loss': losses(folder),
        'images_a_second': speed and speed * config.pretrain.batch_size})

  # The training is stopped while there is time to keep its last checkpoint,
  # which takes as long as the one before did.
  late = lambda: (time.monotonic() - start
                  > arguments.SECONDS.value - kept.took)
  while (code := training.look()) is None and not late():
    if kept.is_due() and max(training.saved, default=0) > kept.step:
      try:
        keep(None)
      except (OSError, ValueError):  # a full disk, half a checkpoint
        traceback.print_exc()  # what is kept stays as it is; training goes on
    time.sleep(0.2)
  if code is None:
    code = training.stop()
  keep(code)
  # The second where it was stopped before it could train.
  if code in (128 + signal.SIGTERM, -signal.SIGTERM):
    raise SystemExit(runner.MORE)
  raise SystemExit(code)


if __name__ == '__main__':
  app.run(main)
