"""Checkpoints: damage, disks that fail, and writing while training goes on."""

import asyncio
import gc
import os
import resource
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.path import atomicity
import pytest
import walks

from msfp_jax.tune import checkpoint

pytestmark = pytest.mark.gpu


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """An uninterrupted run of 9 steps: its workdir and its state."""
  return walks.uninterrupted(tmp_path_factory.mktemp('reference'))


@pytest.fixture
def orbax_noise():
  """Collects the coroutines that orbax drops when a read fails."""
  yield
  gc.collect()


def with_orbax_noise(test):
  for kind in ('pytest.PytestUnraisableExceptionWarning',
               'pytest.PytestUnhandledThreadExceptionWarning',
               'RuntimeWarning'):
    test = pytest.mark.filterwarnings(f'ignore::{kind}')(test)
  return pytest.mark.usefixtures('orbax_noise')(test)


def truncate_all(files):
  for file in files:
    os.truncate(file, file.stat().st_size // 2)


def truncate_largest(files):
  file = max(files, key=lambda f: f.stat().st_size)
  os.truncate(file, file.stat().st_size // 2)


def empty_all(files):
  for file in files:
    os.truncate(file, 0)


def zero_largest(files):
  """Zeroes the largest file, as a power failure may: the length stays."""
  file = max(files, key=lambda f: f.stat().st_size)
  file.write_bytes(bytes(file.stat().st_size))


def delete_largest(files):
  max(files, key=lambda f: f.stat().st_size).unlink()


def delete_metadata(files):
  next(f for f in files if f.name == '_METADATA').unlink()


def damage_step(workdir, step, damage):
  folder = workdir / 'checkpoints' / str(step)
  damage([f for f in sorted(folder.rglob('*')) if f.is_file()])


@with_orbax_noise
@pytest.mark.parametrize('damage', [
    truncate_largest, empty_all, delete_metadata, *(
        pytest.param(damage, marks=pytest.mark.slow)
        for damage in (truncate_all, zero_largest, delete_largest))])
def test_a_damaged_checkpoint_costs_only_its_steps(
    tmp_path, reference, caplog, damage):
  with pytest.raises(walks.Crash):
    walks.run(tmp_path, on_step=walks.crash_at(8))
  assert walks.steps_on_disk(tmp_path) == [3, 6]
  damage_step(tmp_path, 6, damage)
  seen = []
  state = walks.run(tmp_path, on_step=lambda step, state: seen.append(step))
  assert 'checkpoint 6 under' in caplog.text
  assert 'cannot be read' in caplog.text
  assert seen[0] == 4
  walks.assert_same_run(tmp_path, state, reference)
  assert (tmp_path / 'checkpoints/6.damaged').is_dir()
  assert walks.steps_on_disk(tmp_path) == [6, 9]


@with_orbax_noise
@pytest.mark.parametrize('spoil', [
    lambda f: f.unlink(), lambda f: os.truncate(f, f.stat().st_size // 2)],
    ids=['deleted', 'truncated'])
def test_any_one_damaged_file_leaves_a_right_state(
    tmp_path, reference, spoil):
  """Not every file is needed: the newest state, or the one before."""
  with pytest.raises(walks.Crash):
    walks.run(tmp_path, on_step=walks.crash_at(8))
  folder = tmp_path / 'checkpoints/6'
  values = {}
  with checkpoint.Checkpointer(tmp_path / 'checkpoints') as checkpointer:
    values[6] = checkpointer.restore(walks.fresh()).value
  files = [f for f in sorted(folder.rglob('*')) if f.is_file()]
  assert files
  for file in files:
    content = file.read_bytes()
    spoil(file)
    with checkpoint.Checkpointer(tmp_path / 'checkpoints') as checkpointer:
      state = checkpointer.restore(walks.fresh())
    step = int(state.step)
    np.testing.assert_array_equal(
        state.value, values.setdefault(step, state.value), str(file))
    if step == 3:
      folder.with_name('6.damaged').rename(folder)
    file.write_bytes(content)
  walks.assert_same_run(tmp_path, walks.run(tmp_path), reference)


@with_orbax_noise
def test_all_checkpoints_damaged(tmp_path):
  with pytest.raises(walks.Crash):
    walks.run(tmp_path, on_step=walks.crash_at(8))
  for step in (3, 6):
    damage_step(tmp_path, step, truncate_all)
  with pytest.raises(ValueError, match=r'none of the checkpoints \[3, 6\]'):
    walks.run(tmp_path)
  assert walks.steps_on_disk(tmp_path) == [3, 6]  # nothing is thrown away


@with_orbax_noise
@pytest.mark.parametrize('other', [
    walks.fresh(walks.SIZE + 1), {'step': jnp.zeros((), jnp.int32)}],
    ids=['shape', 'structure'])
def test_another_models_checkpoint_is_refused(tmp_path, other):
  walks.run(tmp_path, 3)
  with checkpoint.Checkpointer(tmp_path / 'checkpoints') as checkpointer:
    with pytest.raises(ValueError, match='for this configuration'):
      checkpointer.restore(other)
  assert walks.steps_on_disk(tmp_path) == [3]


def test_nothing_to_restore(tmp_path):
  with checkpoint.Checkpointer(tmp_path / 'new') as checkpointer:
    assert checkpointer.restore(walks.fresh()) is None
    assert checkpointer.steps == []


def test_a_full_disk_is_named_and_earlier_checkpoints_remain(
    tmp_path, reference, monkeypatch):
  save = ocp.CheckpointManager.save

  def full(self, step, *args, **kwargs):
    if step >= 6:
      raise OSError(28, 'No space left on device')
    return save(self, step, *args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, 'save', full)
    with pytest.raises(
        OSError, match='cannot write checkpoint 6.*No space left.*go on from'):
      walks.run(tmp_path)
  assert walks.steps_on_disk(tmp_path) == [3]
  walks.assert_same_run(tmp_path, walks.run(tmp_path), reference)


@with_orbax_noise
def test_files_that_cannot_be_written_whole(tmp_path, reference):
  """A full disk, by a limit on file sizes, leaves earlier checkpoints."""
  with pytest.raises(walks.Crash):
    walks.run(tmp_path, on_step=walks.crash_at(4))
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
  try:
    with pytest.raises(OSError, match='cannot write checkpoint 6'):
      walks.run(tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert walks.steps_on_disk(tmp_path) == [3]
  walks.assert_same_run(tmp_path, walks.run(tmp_path), reference)


def test_training_goes_on_while_files_are_written(tmp_path, reference):
  """And what is written is the state of before, whose memory is given away."""
  may_end, steps = threading.Event(), []
  finalize = atomicity.AtomicRenameTemporaryPath.finalize

  async def slow(self, *args, **kwargs):
    while not may_end.is_set():
      await asyncio.sleep(0.01)
    return await finalize(self, *args, **kwargs)

  def on_step(step, state):
    del state
    steps.append((step, walks.steps_on_disk(tmp_path)))
    if step == 5:
      may_end.set()

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(atomicity.AtomicRenameTemporaryPath, 'finalize', slow)
    donating = jax.jit(walks.step_fn, donate_argnums=0)
    state = walks.run(tmp_path, step_fn=donating, on_step=on_step)
  assert (4, []) in steps and (5, []) in steps  # 3 was not complete
  assert walks.steps_on_disk(tmp_path) == [6, 9]
  walks.assert_same_run(tmp_path, state, reference)
  with checkpoint.Checkpointer(tmp_path / 'checkpoints') as checkpointer:
    np.testing.assert_array_equal(
        checkpointer.restore(walks.fresh()).value, state.value)


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / 'checkpoints').write_text('a file is in the way')
  with pytest.raises(OSError, match='checkpoints'):
    walks.run(tmp_path)


def test_a_folder_that_is_gone_is_not_told_as_damaged(tmp_path):
  """Whoever deletes it, as for damage, would have nothing to put back."""
  walks.run(tmp_path, 3)
  folder = tmp_path / 'checkpoints'
  with checkpoint.Checkpointer(folder) as checkpointer:
    folder.rename(tmp_path / 'away')
    with pytest.raises(OSError, match='checkpoints is gone; put it back'):
      checkpointer.restore(walks.fresh())
  (tmp_path / 'away').rename(folder)
  with checkpoint.Checkpointer(folder) as checkpointer:
    assert int(checkpointer.restore(walks.fresh()).step) == 3
