"""A hundred stops at random moments, and disks that fail: nothing is lost."""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import time

import lives as lives_lib
import pytest
import runs

# All tests of other programs' disks are for a machine of one's own.
pytestmark = pytest.mark.long

KILLS = int(os.environ.get('KILLS', '100'))
# Checkpoints at every step, so that many stops fall into one.
CHANGES = {'finetune.num_updates': 12, 'finetune.save_every': 1,
           'pretrain.save_every': 1, 'pretrain.num_steps': 12,
           'eval.rows': ('fp', 'msfp', 'tuned')}


@pytest.fixture
def lives(tmp_path, npz, monkeypatch):
  # Programs of its own: one that is killed may leave half of one.
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'compiled'))
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  return lives_lib.Lives(npz, CHANGES, tmp_path)


@pytest.fixture
def draw():
  seed = time.time_ns()
  print(f'seed {seed}')
  return random.Random(seed)


def seconds(lives, workdir, *programs):
  """How long it takes with all programs compiled, in a fresh workdir."""
  for _ in range(2):
    shutil.rmtree(workdir, ignore_errors=True)
    start = time.monotonic()
    lives.whole(workdir, *programs)
  return time.monotonic() - start


def stop(process, draw, longest):
  """Sends a signal at a random moment; returns whether it came in time."""
  process.join(draw.uniform(0, longest))
  if not process.is_alive():
    return False
  os.kill(process.pid, draw.choice((signal.SIGKILL, signal.SIGTERM)))
  process.join(60)
  assert process.exitcode in (0, *lives_lib.STOPPED), process.exitcode
  return process.exitcode != 0


def test_a_training_that_is_stopped_a_hundred_times(
    tmp_path, npz, lives, draw):
  reference, workdir = tmp_path / 'reference', tmp_path / 'run'
  longest = seconds(lives, reference, 'train')
  kills = wholes = 0
  while kills < KILLS or not wholes:
    process = lives.begin(workdir, 'train')
    if stop(process, draw, longest):
      kills += 1
      assert 'Traceback' not in lives.said()
      continue
    assert process.exitcode == 0, lives.said()
    runs.assert_same_run(runs.config_of(npz, CHANGES), workdir, reference)
    assert (workdir / 'packed.safetensors').read_bytes() == (
        reference / 'packed.safetensors').read_bytes()
    assert not list(workdir.rglob('*.damaged'))
    shutil.rmtree(workdir)
    wholes += 1
  print(f'{kills} stops, {wholes} whole runs')


def test_an_evaluation_that_is_stopped_a_hundred_times(
    tmp_path, lives, draw):
  reference, workdir = tmp_path / 'reference', tmp_path / 'run'
  trained = tmp_path / 'trained'
  lives.whole(trained, 'train')
  shutil.copytree(trained, reference)
  shutil.copytree(trained, workdir)
  lives.whole(reference, 'evaluate')
  longest = seconds_of_evaluation(lives, reference, trained)
  expected = runs.contents(reference)
  kills = wholes = 0
  while kills < KILLS or not wholes:
    process = lives.begin(workdir, 'evaluate')
    if stop(process, draw, longest):
      kills += 1
      assert 'Traceback' not in lives.said()
      continue
    assert process.exitcode == 0, lives.said()
    assert runs.contents(workdir) == expected
    shutil.rmtree(workdir)
    shutil.copytree(trained, workdir)
    wholes += 1
  print(f'{kills} stops, {wholes} whole runs')


def seconds_of_evaluation(lives, workdir, trained):
  shutil.rmtree(workdir)
  shutil.copytree(trained, workdir)
  start = time.monotonic()
  lives.whole(workdir, 'evaluate')
  return time.monotonic() - start


@pytest.fixture
def disk(tmp_path):
  """A folder on a small disk of its own; made by root alone."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=24m', 'tmpfs',
                     str(folder)], capture_output=True).returncode:
    pytest.skip('a disk of its own is mounted by root alone')
  yield folder
  subprocess.run(['umount', '-l', str(folder)], check=True)


class Full:
  """No byte more."""

  def __init__(self, folder):
    self._filler = folder / 'filler'

  def begin(self):
    with open(self._filler, 'wb', buffering=0) as file:
      for size in (2**20, 2**12, 1):
        try:
          while True:
            file.write(bytes(size))
        except OSError:
          pass

  def end(self):
    self._filler.unlink()


class Gone:
  """The workdir is there under another name."""

  def __init__(self, folder):
    self._workdir, self._away = folder / 'run', folder / 'away'

  def begin(self):
    if self._workdir.is_dir():
      self._workdir.rename(self._away)

  def end(self):
    if self._away.is_dir():
      # What the run may have begun anew under the name is none of it.
      shutil.rmtree(self._workdir, ignore_errors=True)
      self._away.rename(self._workdir)


@pytest.mark.parametrize('failure', [Full, Gone], ids=lambda f: f.__name__)
def test_a_disk_that_fails_costs_steps_and_nothing_else(
    tmp_path, npz, disk, lives, draw, failure):
  """The run says so in a sentence, and goes on when the disk is well."""
  reference, workdir = tmp_path / 'reference', disk / 'run'
  longest = seconds(lives, reference, 'train')
  ended, wholes = [], 0
  while len(ended) < 12 or not wholes:
    process = lives.begin(workdir, 'train')
    process.join(draw.uniform(0, longest))
    was_alive, fails = process.is_alive(), failure(disk)
    complete = checkpoints(workdir)
    fails.begin()
    process.join(120)
    fails.end()
    said = lives.said()  # threads of tensorboardX may have their own words
    if process.exitcode:
      assert was_alive and process.exitcode == 1, said
      ended.append(said.splitlines()[-1])
      assert ended[-1].startswith('error: ') and str(workdir) in ended[-1]
      # The newest that were complete are, or newer ones.
      for folder, steps in complete.items():
        assert not steps or max(checkpoints(workdir)[folder]) >= max(steps)
      continue
    if (workdir / 'packed.safetensors').is_file():
      runs.assert_same_run(runs.config_of(npz, CHANGES), workdir, reference)
      wholes += 1
    shutil.rmtree(workdir, ignore_errors=True)
  print('\n'.join(ended))
  assert not list(workdir.rglob('*.damaged'))


def checkpoints(workdir):
  """{folder of checkpoints: the steps that are complete}."""
  return {part: [int(path.name) for path in pathlib.Path(
      workdir, part, 'checkpoints').glob('*') if path.name.isdecimal()]
          for part in ('pretrain', '.')}
