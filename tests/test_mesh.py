"""One mesh: several devices, several processes, and other ones after a stop.

Every run is of programs that are started: how many devices there are is settled
when JAX begins.
"""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

import children
import numpy as np
import pytest
import runs
import safetensors

TESTS = pathlib.Path(__file__).parent
STARTED = []
# All batches can be split over 8 devices.
CHANGES = {'calibrate.batch_size': 8, 'finetune.batch_size': 8,
           'pretrain.batch_size': 8, 'quant.drift_images': 8,
           'eval.rows': ('fp', 'msfp', 'tuned'),
           'eval.report': True, 'eval.keep': 'npz'}


@pytest.fixture(scope='module')
def npz(tmp_path_factory):
  path = tmp_path_factory.mktemp('data') / 'smooth.npz'
  np.savez(path, runs.smooth(200, 8, 8, 1))
  return str(path)


@pytest.fixture(autouse=True)
def none_is_left():
  """Ends what a test that failed has left."""
  yield
  for process in STARTED:
    process.kill()
    process.wait()
    process.output.close()
  STARTED.clear()


def begin(workdir, npz, devices=1, changes=None, **more):
  """Starts a process; `end` waits for it and reads its output."""
  given = {'devices': devices, 'npz': npz, 'workdir': str(workdir),
           'changes': CHANGES | (changes or {})} | more
  # A file: a pipe that nobody reads would stop a process, and so all others.
  with tempfile.TemporaryFile('w+') as output:
    process = subprocess.Popen(
        [sys.executable, TESTS / 'mesh_child.py', json.dumps(given)],
        stdout=output, stderr=subprocess.STDOUT,
        env=children.compiling_fast(PYTHONPATH=f'{TESTS.parent}:{TESTS}'))
    process.output = os.fdopen(os.dup(output.fileno()))
  STARTED.append(process)
  return process


def end(process, *codes):
  process.wait(timeout=300)
  with process.output as output:
    output.seek(0)
    said = output.read()
  assert process.returncode in (codes or (0,)), said
  return said


def together(count, workdir, npz, devices=1, changes=None, stop=None,
             **more):
  """Starts the processes of one run; `stop` is of the last one alone."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  return [begin(workdir, npz, devices, (changes or {}) | {
      'mesh.coordinator': f'127.0.0.1:{port}', 'mesh.num_processes': count,
      'mesh.process_id': i}, stop=stop if stop and i == count - 1 else {},
      **more) for i in range(count)]


@pytest.fixture(scope='module')
def one(tmp_path_factory, npz):
  """The workdir of a run on one device."""
  workdir = tmp_path_factory.mktemp('one')
  end(begin(workdir, npz))
  return workdir


@pytest.fixture(scope='module')
def evaluated(one, npz):
  """The same workdir after its evaluation."""
  end(begin(one, npz, eval=True))
  return one


def newest(workdir):
  """The step of the newest checkpoint; 0 of none."""
  return max((int(path.name) for path in workdir.glob('checkpoints/*')
              if path.name.isdecimal()), default=0)


def scalars(workdir, name):
  lines = (workdir / name).read_text().splitlines()
  return np.array([[*json.loads(line).values()] for line in lines])


def tensors(path):
  with safetensors.safe_open(path, 'np') as opened:
    return {key: opened.get_tensor(key) for key in opened.keys()}


def assert_like(workdir, one):
  """The same but for sums in another order.

  Losses and norms of gradients are of thousands of numbers, each rounded by
  2^-24 at most: 2e-6 and less was seen, 1e-5 of the router's few. By Adam a
  parameter whose gradient is nothing but roundings moves all the same, so that
  parameters are compared as a whole.
  """
  for name in ('pretrain/metrics.jsonl', 'metrics.jsonl'):
    np.testing.assert_allclose(
        scalars(workdir, name), scalars(one, name), rtol=1e-4)
  found, expected = runs.teacher(workdir), runs.teacher(one)
  apart = sum(np.square(found[key] - expected[key]).sum() for key in expected)
  assert apart < 1e-8 * sum(
      np.square(value).sum() for value in expected.values())
  # Codes and which bank is whose: integers. Scales are in vectors.
  found, expected = (tensors(folder / 'packed.safetensors')
                     for folder in (workdir, one))
  assert found.keys() == expected.keys()
  for key, value in expected.items():
    if value.dtype == np.uint8:
      np.testing.assert_array_equal(found[key], value, key)
    else:
      assert np.linalg.norm(found[key] - value) < 1e-4 * np.linalg.norm(value)


def assert_evaluated_alike(workdir, one):
  """Images but for a level here and there; all files are there."""
  assert {path.name for path in workdir.iterdir()} == {
      path.name for path in one.iterdir()}
  for row in ('fp', 'msfp', 'tuned'):
    found, expected = (
        np.load(folder / f'samples/{row}.npz')['arr_0'].astype(int)
        for folder in (workdir, one))
    apart = np.abs(found - expected)
    assert apart.max() <= (1 if row == 'fp' else 16) and apart.mean() < 0.05
  found, expected = (json.loads((folder / 'results.json').read_text())
                     for folder in (workdir, one))
  for a, b in zip(found['rows'], expected['rows'], strict=True):
    assert a.keys() == b.keys()
    assert a['bytes'] == b['bytes']
    assert a['fd_random'] == pytest.approx(b['fd_random'], rel=0.01)


@pytest.mark.long
@pytest.mark.parametrize('model', [1, 2])
def test_devices_share_the_work(tmp_path, npz, evaluated, model):
  """Batches alone, and weights from 64 numbers on as well."""
  said = end(begin(
      tmp_path, npz, 8, {'mesh.model': model}, large=64, eval=True))
  assert 'devices 8 of 1 processes' in said
  # Weights, averages, moments of Adam; or nothing but a trajectory.
  least, most = map(int, re.findall(r'split (\d+) to (\d+)', said)[0])
  assert least > 20 and most > 50 if model > 1 else (least, most) == (0, 1)
  assert_like(tmp_path, evaluated)
  assert_evaluated_alike(tmp_path, evaluated)


@pytest.mark.long
@pytest.mark.parametrize(('count', 'model'), [(2, 1), (4, 1), (2, 8)])
def test_processes_share_the_work(tmp_path, npz, evaluated, count, model):
  """Batches alone, and weights that no process has whole."""
  started = together(count, tmp_path, npz, 8 // count, {'mesh.model': model},
                     large=64, eval=True)
  for process in started:
    said = end(process)
    assert f'devices 8 of {count} processes' in said
    _, most = map(int, re.findall(r'split (\d+) to (\d+)', said)[0])
    assert most > 50 if model > 1 else most == 1
  assert_like(tmp_path, evaluated)
  assert_evaluated_alike(tmp_path, evaluated)


@pytest.mark.long
def test_a_stopped_run_goes_on_with_other_devices(tmp_path, npz, one):
  """SIGTERM to one of two processes, then on one device, the rest on eight."""
  for process in together(2, tmp_path, npz, stop={'pretrain': 3}):
    end(process, 128 + signal.SIGTERM)
  assert newest(tmp_path / 'pretrain') == 3  # of 6
  end(begin(tmp_path, npz, stop={'finetune': 3}), 128 + signal.SIGTERM)
  assert (tmp_path / 'checkpoints/3').is_dir()
  end(begin(tmp_path, npz, 8))
  assert_like(tmp_path, one)


@pytest.mark.long
def test_what_is_remembered_goes_on_with_other_devices(tmp_path, npz):
  """Differences between steps: stopped within a trajectory, resumed on 8."""
  changes = {'quant.recipe': 'int4_minmax_image+differences',
             'finetune.num_banks': 1, 'sampler.num_steps': 4}
  end(begin(tmp_path / 'one', npz, changes=changes))
  folder = tmp_path / 'other'
  end(begin(folder, npz, changes=changes, stop={'finetune': 3}),
      128 + signal.SIGTERM)
  assert (folder / 'checkpoints/3').is_dir()
  end(begin(folder, npz, 8, changes=changes))
  assert_like(folder, tmp_path / 'one')


@pytest.mark.long
@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(
    tmp_path, npz, victim):
  """SIGKILL in the middle of training, of the coordinator too."""
  workdir, whole = tmp_path / 'w', tmp_path / 'whole'
  changes = {'pretrain.num_steps': 60, 'pretrain.sample_every': 60,
             'pretrain.save_every': 10}
  started = together(2, workdir, npz, changes=changes)
  until = time.monotonic() + 120
  while newest(workdir / 'pretrain') < 10:
    assert all(process.poll() is None for process in started)
    assert time.monotonic() < until
    time.sleep(0.01)
  started[victim].kill()
  begun = time.monotonic()
  # JAX ends a process too, by SIGABRT, when it misses the first one.
  said = end(started[1 - victim], 1, -signal.SIGABRT)
  assert time.monotonic() - begun < 60
  assert 'Start all of them' in said or 'another task died' in said, said
  assert not (workdir / 'pretrain/model.safetensors').exists()
  assert newest(workdir / 'pretrain') >= 10  # to go on from
  for folder in (workdir, whole):
    for process in together(2, folder, npz, changes=changes):
      end(process)
  runs.assert_same_run(
      runs.config_of(npz, CHANGES | changes), workdir, whole)
