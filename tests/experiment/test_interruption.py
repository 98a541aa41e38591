"""Stopped runs and damaged checkpoints end as uninterrupted runs do."""

import functools
import gc
import os
import pathlib
import signal
import subprocess
import sys
import time

import children
import marks
import pytest
import runs

from msfp_jax.run import train
from msfp_jax.tune import checkpoint
from msfp_jax.tune import finetune
from msfp_jax.tune import pretrain

ROOT = pathlib.Path(__file__).parents[2]
# Enough steps to be stopped in between from outside.
LONG = {'pretrain.num_steps': 20, 'pretrain.save_every': 20,
        'pretrain.sample_every': 20, 'finetune.num_updates': 120,
        'finetune.save_every': 50}


@pytest.mark.slow
def test_interrupted_is_uninterrupted(tmp_path, trained, npz, monkeypatch):
  """Stopped once in pre-training and once in fine-tuning."""
  config = runs.config_of(npz)
  for module, folder in ((pretrain, tmp_path / 'pretrain'),
                         (finetune, tmp_path)):
    with monkeypatch.context() as patch:
      runs.interrupt(patch, module, 3)
      with pytest.raises(checkpoint.Preempted) as stop:
        train.run(config, str(tmp_path))
    assert stop.value.code == 143
    assert (folder / 'checkpoints/3').is_dir()
    assert len((folder / 'metrics.jsonl').read_text().splitlines()) == 3
  assert not (tmp_path / 'router.json').exists()
  train.run(config, str(tmp_path))
  runs.assert_same_run(config, tmp_path, trained)


@pytest.mark.long
def test_both_trajectories_and_the_average_go_on_too(
    tmp_path, npz, monkeypatch):
  """Stopped in the middle of a trajectory that the student drives."""
  changes = {'pretrained': 'random', 'model.image_size': 8,
             'model.in_channels': 1, 'model.out_channels': 1,
             'sampler.num_steps': 4,
             'finetune.driver': 'student', 'finetune.steer': 0.3,
             'finetune.ema_decay': 0.9}
  config = runs.config_of(npz, changes)
  whole, stopped = (str(tmp_path / name) for name in ('whole', 'stopped'))
  train.run(config, whole)
  with monkeypatch.context() as patch:
    runs.interrupt(patch, finetune, 3)
    with pytest.raises(checkpoint.Preempted):
      train.run(config, stopped)
  train.run(config, stopped)
  found, expected = (pathlib.Path(folder, 'packed.safetensors').read_bytes()
                     for folder in (stopped, whole))
  assert found == expected


@pytest.fixture
def orbax_noise():
  """Collects the coroutines that orbax drops when a read fails."""
  yield
  gc.collect()


def truncate(folder):
  """Cuts every file of a checkpoint off at its middle."""
  for path in folder.rglob('*'):
    if path.is_file():
      os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(folder):
  """Flips a bit among the values, so that every file can still be read."""
  path = max((path for path in folder.rglob('d/*')),
             key=lambda path: path.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


@pytest.mark.usefixtures('orbax_noise')
@pytest.mark.filterwarnings(
    'ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.filterwarnings(
    'ignore::pytest.PytestUnhandledThreadExceptionWarning')
@pytest.mark.filterwarnings('ignore::RuntimeWarning')
@pytest.mark.parametrize(
    'damage', marks.slow([truncate], [truncate, flip_a_bit]))
def test_a_damaged_checkpoint_costs_only_its_steps(
    copy, trained, npz, caplog, damage):
  damage(copy / 'checkpoints/6')
  with caplog.at_level('INFO', 'absl'):
    train.run(runs.config_of(npz), str(copy))
  assert f'checkpoint 6 under {copy}/checkpoints cannot be read' in caplog.text
  assert 'finetune: resumed at step 4' in caplog.text
  runs.assert_same_run(runs.config_of(npz), copy, trained)


def start(workdir, npz, program='train.py', changes=LONG,
          environment=os.environ):
  """Starts a program with compilations of its own, as it will be killed."""
  flags = {'data.path': npz} | runs.SMALL | changes
  return subprocess.Popen(
      [sys.executable, program, '--config=configs/images.py:smoke',
       f'--workdir={workdir}',
       *(f'--config.{name}={value}' for name, value in flags.items())],
      cwd=ROOT, stderr=subprocess.PIPE, text=True,
      env=environment | {
          'JAX_PLATFORMS': 'cpu',
          'JAX_COMPILATION_CACHE_DIR': str(workdir.parent / 'compiled')})


def finish(process):
  _, log = process.communicate(timeout=600)
  assert process.returncode == 0, log
  return log


def wait_until(process, condition):
  end = time.monotonic() + 600
  while not condition():
    assert process.poll() is None, process.communicate()[1]
    assert time.monotonic() < end
    time.sleep(0.01)


def lines(path):
  return path.read_bytes().count(b'\n') if path.exists() else 0


@pytest.mark.long
def test_sigterm_twice_then_the_same_command(tmp_path, npz):
  reference, workdir = tmp_path / 'reference', tmp_path / 'workdir'
  begin = functools.partial(
      start, npz=npz, environment=children.compiling_fast())
  finish(begin(reference))
  points = [  # when to stop; whether a loop is sure to catch it
      (lambda: (workdir / 'quant_spec.json').exists(), False),
      (lambda: lines(workdir / 'metrics.jsonl') >= 30, True),
  ]
  for condition, caught in points:
    process = begin(workdir)
    wait_until(process, condition)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=600)
    allowed = {143} if caught else {143, -signal.SIGTERM}
    assert process.returncode in allowed, log
    assert 'Traceback' not in log
    if caught:
      assert 'run the same command again' in log
  assert 'finetune: resumed at step' in finish(begin(workdir))
  runs.assert_same_run(runs.config_of(npz, LONG), workdir, reference)


def has_batches(folder, count):
  return len(list(folder.rglob('*.uint8'))) >= count


@pytest.mark.long
def test_a_killed_evaluation_goes_on(copy, npz):
  """SIGKILL, then the same command."""
  before = runs.contents(copy)
  (copy / 'results.json').unlink()
  process = start(copy, npz, 'eval.py', {})
  wait_until(process, lambda: has_batches(copy / 'eval', 3))
  process.kill()
  process.communicate()
  assert not (copy / 'results.json').exists()
  log = finish(start(copy, npz, 'eval.py', {}))
  assert 'going on with the evaluation' in log
  after = runs.contents(copy)
  assert after.pop('config.json') and before.pop('config.json')
  assert after == before
