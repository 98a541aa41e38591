"""A hundred stops at random moments, and disks that fail: nothing is lost."""

import contextlib
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import time

import lives as lives_lib
import pytest
import runs

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
  return lives_lib.Lives(npz, CHANGES)


@pytest.fixture
def draw():
  seed = time.time_ns()
  print(f'seed {seed}')
  return random.Random(seed)


def stop(process, draw, longest):
  """Sends a signal at a random moment; returns whether it came in time."""
  process.join(draw.uniform(0, longest))
  if not process.is_alive():
    return False
  os.kill(process.pid, draw.choice((signal.SIGKILL, signal.SIGTERM)))
  process.join(60)
  assert process.exitcode in (0, *lives_lib.STOPPED), process.exitcode
  return process.exitcode != 0


def stop_a_hundred_times(lives, program, workdir, draw, longest, begin, check):
  """Until KILLS processes were stopped, and one came to its end.

  Args:
    lives: begins them.
    program: that is run.
    workdir: where.
    draw: of moments and signals.
    longest: seconds that a whole run takes.
    begin: makes the workdir as it is before the program's first life.
    check: called whenever the program has come to its end.
  """
  begin()
  kills = wholes = 0
  while kills < KILLS or not wholes:
    process = lives.begin(workdir, program)
    if stop(process, draw, longest):
      kills += 1
      assert 'Traceback' not in lives.said()
      continue
    assert process.exitcode == 0, lives.said()
    check()
    shutil.rmtree(workdir)
    begin()
    wholes += 1
  print(f'{kills} stops, {wholes} whole runs')


def seconds(lives, program, workdir, begin):
  """How long a run takes whose programs are compiled; leaves it finished."""
  for _ in range(2):
    shutil.rmtree(workdir, ignore_errors=True)
    begin()
    start = time.monotonic()
    lives.whole(workdir, program)
  return time.monotonic() - start


def test_a_training_that_is_stopped_a_hundred_times(
    tmp_path, npz, lives, draw):
  reference, workdir = tmp_path / 'reference', tmp_path / 'run'
  nothing = lambda: None
  longest = seconds(lives, 'train', reference, nothing)

  def check():
    runs.assert_same_run(runs.config_of(npz, CHANGES), workdir, reference)
    assert (workdir / 'packed.safetensors').read_bytes() == (
        reference / 'packed.safetensors').read_bytes()
    assert not list(workdir.rglob('*.damaged'))

  stop_a_hundred_times(
      lives, 'train', workdir, draw, longest, nothing, check)


def test_an_evaluation_that_is_stopped_a_hundred_times(tmp_path, lives, draw):
  reference, workdir = tmp_path / 'reference', tmp_path / 'run'
  trained = tmp_path / 'trained'
  lives.whole(trained, 'train')
  longest = seconds(lives, 'evaluate', reference,
                    lambda: shutil.copytree(trained, reference))
  expected = runs.contents(reference)

  def check():
    assert runs.contents(workdir) == expected

  stop_a_hundred_times(lives, 'evaluate', workdir, draw, longest,
                       lambda: shutil.copytree(trained, workdir), check)


class Full:
  """No byte more can be written by the process, as on a full disk.

  By a limit on the sizes of its files, which needs no disk of its own: writes
  fail in the same places, with another number.
  """

  def begin(self, process, unused_workdir):
    _, most = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, most))

  def end(self):
    pass


class ReadOnly:
  """Nothing in the workdir can be made, renamed or removed any more.

  Files that are open can be written on, as they could not on a disk.
  """

  def begin(self, unused_process, workdir):
    self._closed = []
    while found := [path for path in self._all(workdir)
                    if path not in self._closed]:
      for path in found:
        with contextlib.suppress(FileNotFoundError):
          os.chmod(path, 0o555)
      # Again, as the process goes on meanwhile.
      self._closed += found

  def _all(self, workdir):
    return [path for folder, _, names in os.walk(workdir)
            for path in (folder, *(f'{folder}/{name}' for name in names))]

  def end(self):
    for path in self._closed:
      with contextlib.suppress(FileNotFoundError):
        os.chmod(path, 0o755)


class Gone:
  """The workdir is there under another name."""

  def begin(self, unused_process, workdir):
    self._workdir, self._away = workdir, workdir.with_name('away')
    if workdir.is_dir():
      workdir.rename(self._away)

  def end(self):
    if self._away.is_dir():
      # What the run may have begun anew under the name is none of it.
      shutil.rmtree(self._workdir, ignore_errors=True)
      self._away.rename(self._workdir)


@pytest.mark.parametrize(
    'failure', [Full, ReadOnly, Gone], ids=lambda f: f.__name__)
def test_a_disk_that_fails_costs_steps_and_nothing_else(
    tmp_path, npz, lives, draw, failure):
  """The run says so in a sentence, and goes on when the disk is well."""
  reference, workdir = tmp_path / 'reference', tmp_path / 'run'
  longest = seconds(lives, 'train', reference, lambda: None)
  ended, wholes = [], 0
  while len(ended) < 12 or not wholes:
    process = lives.begin(workdir, 'train')
    process.join(draw.uniform(0, longest))
    fails, complete = failure(), checkpoints(workdir)
    if was_alive := process.is_alive():
      fails.begin(process, workdir)
      process.join(120)
      fails.end()
    said = lives.said()
    if process.exitcode:
      assert was_alive and process.exitcode == 1, said
      # Threads of tensorboardX and tensorstore write too, into the same line.
      sentences = re.findall(rf'error: .*{re.escape(str(workdir))}.*', said)
      assert len(sentences) == 1, said
      ended += sentences
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
