"""Parts of benchmarks.gpu: records, pieces, outcomes, profiles, the state."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import check
from benchmarks.gpu import outcomes
from benchmarks.gpu import pieces
from benchmarks.gpu import record as record_lib
from benchmarks.gpu import runner
from benchmarks.gpu import sheets
from benchmarks.gpu import slowest
from benchmarks.gpu import state
from configs import cifar10
import msfp_jax as msfp
from msfp_jax.tune import checkpoint


def fail():
  raise ValueError('of the kernel')


def end():
  raise SystemExit(1)  # as what ends a process: nothing follows


def test_what_is_measured_is_not_measured_again(tmp_path):
  first = record_lib.Record(tmp_path, 60.0)
  assert first.measure('a', lambda: 1.5) == 1.5
  assert first.measure('b', fail) is None
  assert first.measure('late', fail, least=100.0) is None
  assert first.status(['a']) == 0
  assert first.status(['a', 'b']) == runner.MORE
  assert first.status(['late']) == runner.MORE
  second = record_lib.Record(tmp_path, 60.0)
  assert second.measure('a', fail) == 1.5
  assert second.measure('b', lambda: 2) == 2
  assert second.status(['a', 'b']) == 0


@pytest.mark.parametrize('work, said', [
    (fail, 'ValueError: of the kernel'), (end, 'it ended the process')])
def test_what_went_wrong_twice_is_left_out(tmp_path, work, said):
  for _ in range(2):
    record = record_lib.Record(tmp_path, 60.0)
    try:
      record.measure('bad', work)
    except SystemExit:
      pass
    assert json.loads((tmp_path / runner.FOUND).read_text())[
        'measurements']['bad']['error'] == said
  record = record_lib.Record(tmp_path, 60.0)
  assert record.measure('bad', lambda: 1) is None
  assert record.status(['bad']) == 0


def test_a_device_that_answers_no_more_ends_the_process(tmp_path, monkeypatch):
  monkeypatch.setattr(record_lib, 'answers', lambda: False)
  with pytest.raises(SystemExit, match='answers no more'):
    record_lib.Record(tmp_path, 60.0).measure('bad', fail)


def make_files(root, **contents):
  root.mkdir(exist_ok=True)
  for name, content in contents.items():
    (root / name).write_bytes(content)
  return sorted(root.iterdir())


@pytest.mark.parametrize('compress', [False, True])
def test_pieces_make_the_folder_again(tmp_path, compress):
  noise = np.random.default_rng(0).bytes(50_000)
  files = make_files(tmp_path / 'a', one=noise, two=b'')
  pieces.split('all', files, tmp_path / 'a', tmp_path / 'p', compress, 16_384)
  sizes = [path.stat().st_size for path in (tmp_path / 'p').iterdir()]
  assert len(sizes) == 4 and max(sizes) == 16_384
  assert pieces.join(tmp_path / 'p', tmp_path / 'b') == ['all']
  assert (tmp_path / 'b/one').read_bytes() == noise
  assert (tmp_path / 'b/two').read_bytes() == b''


def test_newer_pieces_replace_older_ones(tmp_path):
  target = tmp_path / 'p'
  write = lambda content: pieces.split(
      'all', make_files(tmp_path / 'a', one=content), tmp_path / 'a', target,
      False, 16_384)
  write(bytes(40_000))
  old = {path: path.read_bytes() for path in target.iterdir()}
  write(bytes(40_000))
  assert old.keys() == set(target.iterdir())  # nothing new
  # The same in smaller pieces, as another place may ask for.
  pieces.split('all', [tmp_path / 'a/one'], tmp_path / 'a', tmp_path / 'q',
               False, 16_384)
  pieces.split('all', [tmp_path / 'a/one'], tmp_path / 'a', tmp_path / 'q',
               False, 10_000)
  assert max(path.stat().st_size for path in (tmp_path / 'q').iterdir()) == (
      10_000)
  pieces.join(tmp_path / 'q', tmp_path / 'c')
  assert (tmp_path / 'c/one').read_bytes() == bytes(40_000)
  write(b'new' * 20_000)
  assert old.keys().isdisjoint(target.iterdir())
  # As after a death between the two: the older ones are complete.
  new = sorted(target.iterdir())
  for path, content in old.items():
    path.write_bytes(content)
  damaged = bytearray(new[0].read_bytes())
  damaged[5_000] ^= 1
  new[0].write_bytes(damaged)
  pieces.join(target, tmp_path / 'b')
  assert (tmp_path / 'b/one').read_bytes() == bytes(40_000)
  for path in old:
    path.unlink()
  with pytest.raises(FileNotFoundError, match=r"no complete pieces .*'all'"):
    pieces.join(target, tmp_path / 'b')


def test_the_largest_files_that_fit(tmp_path):
  files = make_files(tmp_path, a=bytes(5), b=bytes(9), c=bytes(6), d=bytes(1))
  assert [path.name for path in pieces.largest(files, 13)] == ['b', 'd']


TESTS = '''
import os

import pytest

@pytest.mark.gpu
def test_right():
  pass

@pytest.mark.gpu
def test_wrong():
  assert 1 + 1 == 3

@pytest.mark.gpu
def test_deadly():
  os._exit(7)

@pytest.mark.gpu
def test_after():
  pass
'''


def test_outcomes_survive_what_ends_the_process(tmp_path):
  """The next try goes on behind it."""
  (tmp_path / 'test_some.py').write_text(TESTS)
  (tmp_path / 'pytest.ini').write_text('[pytest]\nmarkers = gpu: of the test')
  written, known = tmp_path / 'written', tmp_path / 'known'
  root = str(pathlib.Path(__file__).parents[1])

  def run():
    known.write_text(written.read_text() if written.exists() else '')
    return subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'benchmarks.gpu.outcomes',
         '-p', 'no:cacheprovider', 'test_some.py'], cwd=tmp_path,
        capture_output=True, env=os.environ | {
            outcomes.KNOWN: str(known), outcomes.WRITTEN: str(written),
            'PYTHONPATH': root, 'PYTEST_DISABLE_PLUGIN_AUTOLOAD': '1'}
    ).returncode

  assert run() == 7
  assert run() == 0
  found = check.summary(outcomes.read(written))
  assert found['counts'] == {'passed': 2, 'failed': 1, 'began': 1}
  assert 'assert (1 + 1) == 3' in found['failed']['test_some.py::test_wrong']
  assert [*found['ended the process']] == ['test_some.py::test_deadly']


def test_the_tests_of_a_gpu_are_found():
  files = check.marked()
  assert 'tests/test_functional.py' in files and 'tests/test_unet.py' not in (
      files)


@pytest.mark.usefixtures('on_cpu')
def test_the_slowest_operation_is_the_largest_product():
  a = jnp.ones((1000, 1000))
  run = jax.jit(lambda a: jnp.sin(a) + a @ a)
  found = slowest.operations(lambda: run(a))
  assert found and found[0]['share'] > 0.5
  assert found[0]['ms'] >= found[-1]['ms'] > 0
  assert sum(row['share'] for row in found) <= 1 + 1e-9


def test_loops_do_not_count_what_they_run():
  run = jax.jit(lambda a: jax.lax.fori_loop(0, 8, lambda i, a: a @ a, a))
  a = jnp.eye(200)
  names = [row['operation'] for row in slowest.operations(lambda: run(a))]
  assert names and not any(name.startswith('while') for name in names)


def test_sheets_are_lossless(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (1003, 4, 4, 3), np.uint8)
  sheets.pack(images, tmp_path / 'sheets')
  sheets.unpack(tmp_path / 'sheets', tmp_path / 'images.npz')
  found = msfp_images(tmp_path / 'images.npz')
  np.testing.assert_array_equal(found, images)
  with pytest.raises(ValueError, match='uint8'):
    sheets.pack(images[..., :1], tmp_path)
  with pytest.raises(FileNotFoundError, match='no sheets'):
    sheets.unpack(tmp_path, tmp_path / 'none.npz')


def msfp_images(path):
  from msfp_jax import data
  return data.load('images', str(path))


def test_a_teacher_is_kept_and_goes_on(tmp_path):
  """The average to float16, as a model; the step, and moments that are 0."""
  config = cifar10.get_config('ten,smoke')
  config.model.update(image_size=8, ch_mult=(1,))
  model = state.model_of(config)
  rng = np.random.default_rng(0)
  # Moments and counts of any value, and steps that differ from the counts.
  before = jax.tree.map(
      lambda a: np.asarray(9 * rng.standard_normal(a.shape), a.dtype),
      jax.eval_shape(lambda: state.begin(model, config)))
  before = before.replace(step=np.int32(70))
  with checkpoint.Checkpointer(tmp_path / 'checkpoints') as saved:
    saved.save(70, before)
  path = tmp_path / 'new' / 'teacher.safetensors'
  assert state.export(tmp_path / 'checkpoints', config, path) == 70
  count = sum(leaf.size for leaf in jax.tree.leaves(before.params))
  assert 2 * count < path.stat().st_size < 2 * count + 20_000
  assert msfp.load_pretrained(str(path))[0] == model
  assert state.resume(path, config, tmp_path / 'again') == 70
  with checkpoint.Checkpointer(tmp_path / 'again') as saved:
    after = saved.restore(jax.eval_shape(lambda: before))
  assert after.step == 70
  rounded = jax.tree.map(lambda a: np.float32(np.float16(a)), before.ema_params)
  for ours in (after.params, after.ema_params):
    jax.tree.map(np.testing.assert_array_equal, ours, rounded)
  # optax: clipping, (Adam, decay, schedule).
  adam, _, schedule = after.opt_state[1]
  assert schedule.count == 70 and adam.count == 0
  assert not any(leaf.any() for leaf in jax.tree.leaves((adam.mu, adam.nu)))
  config.model.ch = 16
  with pytest.raises(ValueError, match='another model'):
    state.resume(path, config, tmp_path / 'other')
