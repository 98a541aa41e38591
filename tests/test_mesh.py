"""One mesh: several devices, several processes, and other ones after a stop.

Every run is of programs that are started: how many devices there are is settled
when JAX begins.
"""

import json
import pathlib
import signal
import socket
import subprocess
import sys

import children
import numpy as np
import pytest
import runs
import safetensors

from msfp_jax.quant import spec as spec_lib

TESTS = pathlib.Path(__file__).parent
# All batches can be split over 8 devices.
CHANGES = {'calibrate.batch_size': 8, 'finetune.batch_size': 8,
           'pretrain.batch_size': 8}


@pytest.fixture(scope='module')
def npz(tmp_path_factory):
  path = tmp_path_factory.mktemp('data') / 'smooth.npz'
  np.savez(path, runs.smooth(200, 8, 8, 1))
  return str(path)


def begin(workdir, npz, devices=1, changes=None, **more):
  """Starts a process; its output is read by `end`."""
  given = {'devices': devices, 'npz': npz, 'workdir': str(workdir),
           'changes': CHANGES | (changes or {})} | more
  return subprocess.Popen(
      [sys.executable, TESTS / 'mesh_child.py', json.dumps(given)],
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
      env=children.compiling_fast(PYTHONPATH=f'{TESTS.parent}:{TESTS}'))


def end(process, code=0):
  said, _ = process.communicate(timeout=300)
  assert process.returncode == code, said
  return said


def together(count, workdir, npz, devices=1, changes=None, stop=None):
  """Starts the processes of one run; `stop` is of the last one alone."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  return [begin(workdir, npz, devices, (changes or {}) | {
      'mesh.coordinator': f'127.0.0.1:{port}', 'mesh.num_processes': count,
      'mesh.process_id': i}, stop=stop if stop and i == count - 1 else {})
          for i in range(count)]


@pytest.fixture(scope='module')
def one(tmp_path_factory, npz):
  """The workdir of a run on one device."""
  workdir = tmp_path_factory.mktemp('one')
  end(begin(workdir, npz))
  return workdir


def losses(workdir, name):
  lines = (workdir / name).read_text().splitlines()
  return np.array([[row[key] for key in row if key.endswith(('loss', '/t'))]
                   for row in map(json.loads, lines)])


def tensors(path):
  with safetensors.safe_open(path, 'np') as opened:
    return {key: opened.get_tensor(key) for key in opened.keys()}


def assert_like(workdir, one):
  """The same but for roundings, which a few updates by Adam make larger."""
  for name in ('pretrain/metrics.jsonl', 'metrics.jsonl'):
    found, expected = losses(workdir, name), losses(one, name)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=2e-4)
  expected = runs.teacher(one)
  for key, value in runs.teacher(workdir).items():
    np.testing.assert_allclose(value, expected[key], rtol=1e-3, atol=1e-4)
  specs = [spec_lib.QuantSpec.load(folder / 'quant_spec.json')
           for folder in (workdir, one)]
  assert specs[0].layers.keys() == specs[1].layers.keys()
  found, expected = (tensors(folder / 'packed.safetensors')
                     for folder in (workdir, one))
  assert {key: value.shape for key, value in found.items()} == {
      key: value.shape for key, value in expected.items()}


@pytest.mark.slow
@pytest.mark.parametrize('devices, model', [(8, 1), (8, 2)])
def test_devices_share_the_work(tmp_path, npz, one, devices, model):
  said = end(begin(tmp_path, npz, devices, {'mesh.model': model}))
  assert f'devices {devices} of 1 processes' in said
  assert_like(tmp_path, one)


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 4])
def test_processes_share_the_work(tmp_path, npz, one, count):
  started = together(count, tmp_path, npz, devices=8 // count)
  for process in started:
    assert f'devices 8 of {count} processes' in end(process)
  assert_like(tmp_path, one)


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_other_devices(tmp_path, npz, one):
  """SIGTERM on one, then on eight, then whole on two processes."""
  end(begin(tmp_path, npz, stop={'pretrain': 3}), 143)
  assert (tmp_path / 'pretrain/checkpoints/3').is_dir()
  end(begin(tmp_path, npz, 8, stop={'finetune': 3}), 143)
  assert (tmp_path / 'checkpoints/3').is_dir()
  for process in together(2, tmp_path, npz, devices=2):
    end(process)
  assert_like(tmp_path, one)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path, npz, one):
  for process in together(2, tmp_path, npz, stop={'pretrain': 3}):
    end(process, 128 + signal.SIGTERM)
  steps = sorted(int(path.name) for path in (
      tmp_path / 'pretrain/checkpoints').iterdir())
  assert 3 <= steps[-1] < 6
  for process in together(2, tmp_path, npz):
    end(process)
  assert_like(tmp_path, one)
