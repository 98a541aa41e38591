"""The training loop and its checkpoints: stops of every kind, and resuming."""

import asyncio
import gc
import json
import os
import resource
import signal
import threading

import flax.struct
import jax
import jax.numpy as jnp
import marks
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.path import atomicity
import pytest

from msfp_jax.base import errors
from msfp_jax.base import writer as writer_lib
from msfp_jax.tune import checkpoint
from msfp_jax.tune import loop

pytestmark = pytest.mark.gpu

KEY = jax.random.key(3)
SIZE = 5000


@flax.struct.dataclass
class State:
  step: jax.Array
  value: jax.Array


@jax.jit
def step_fn(state):
  """Steps a random walk whose noise depends on the step alone."""
  noise = jax.random.normal(jax.random.fold_in(KEY, state.step), (SIZE,))
  value = 0.9 * state.value + noise
  scalars = {'loss': jnp.mean(value**2), 't': state.step * 100.0}
  return State(step=state.step + 1, value=value), scalars


def fresh(size=SIZE):
  return State(step=jnp.zeros((), jnp.int32), value=jnp.zeros((size,)))


def run(workdir, num_steps=9, step_fn=step_fn, **options):
  options = {'save_every': 3, 'log_every': 2} | options
  with writer_lib.MetricWriter(workdir) as writer:
    return loop.run('toy', fresh, step_fn, num_steps, workdir=str(workdir),
                    writer=writer, **options)


def steps_on_disk(workdir):
  return sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir()
                if p.name.isdigit())


def assert_same_run(workdir, state, reference):
  """Checks that state and metrics.jsonl are the uninterrupted run's."""
  reference_workdir, reference_state = reference
  assert int(state.step) == int(reference_state.step)
  np.testing.assert_array_equal(
      np.asarray(state.value).view(np.uint32),
      np.asarray(reference_state.value).view(np.uint32))
  assert ((workdir / 'metrics.jsonl').read_text()
          == (reference_workdir / 'metrics.jsonl').read_text())


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """An uninterrupted run of 9 steps: its workdir and its state."""
  workdir = tmp_path_factory.mktemp('reference')
  return workdir, run(workdir)


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


class Crash(Exception):
  pass


def crash_at(crash_step):
  def on_step(step, state):
    del state
    if step == crash_step:
      raise Crash
  return on_step


def kill_at(kill_step, number=signal.SIGTERM, times=1):
  def on_step(step, state):
    del state
    if step == kill_step:
      for _ in range(times):
        os.kill(os.getpid(), number)
  return on_step


def test_an_uninterrupted_run(reference):
  workdir, state = reference
  value = np.zeros(SIZE)
  lines = []
  for step in range(9):
    value = 0.9 * value + np.asarray(
        jax.random.normal(jax.random.fold_in(KEY, step), (SIZE,)), np.float64)
    lines.append((step + 1, np.mean(value**2), step * 100))
  np.testing.assert_allclose(state.value, value, rtol=0, atol=1e-5)
  with open(workdir / 'metrics.jsonl', encoding='utf-8') as file:
    written = [json.loads(line) for line in file]
  assert [list(line) for line in written] == [
      ['step', 'toy/loss', 'toy/t']] * 9
  np.testing.assert_allclose(
      [list(line.values()) for line in written], lines, rtol=1e-5)


@pytest.mark.parametrize('crash_step, resumes_at', [
    (1, 0), (3, 0), (5, 3), (8, 6), (9, 6)])
def test_a_crashed_and_resumed_run_is_the_uninterrupted(
    tmp_path, reference, crash_step, resumes_at):
  with pytest.raises(Crash):
    run(tmp_path, on_step=crash_at(crash_step))
  seen = []
  state = run(tmp_path, on_step=lambda step, state: seen.append(step))
  assert seen == list(range(resumes_at + 1, 10))
  assert_same_run(tmp_path, state, reference)


def test_on_step_sees_the_state_after_each_step(tmp_path):
  seen = []
  run(tmp_path, 4, on_step=lambda step, state: seen.append(
      (step, int(state.step))))
  assert seen == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_a_finished_run_does_nothing_more(tmp_path, reference):
  run(tmp_path)

  def never(state):
    raise AssertionError('a step of a finished run')

  assert_same_run(tmp_path, run(tmp_path, step_fn=never), reference)


@pytest.mark.parametrize('log_every', [1, 2, 9, 100])
def test_the_first_step_alone_counts_as_compiling(
    tmp_path, monkeypatch, log_every):
  """However rarely scalars are fetched; and each step is told once."""
  told = []
  monkeypatch.setattr(
      loop.progress_lib.Progress, 'update',
      lambda self, step, **scalars: told.append(step))
  run(tmp_path, save_every=100, log_every=log_every)
  assert told == sorted({1, 9, *range(log_every, 10, log_every)})


def test_a_longer_run_goes_on_from_a_shorter(tmp_path, reference):
  run(tmp_path, 4)  # the last step is saved although 3 does not divide it
  assert 4 in steps_on_disk(tmp_path)
  assert_same_run(tmp_path, run(tmp_path, 9), reference)


def test_two_checkpoints_are_kept(tmp_path):
  run(tmp_path, 9, save_every=2)
  assert steps_on_disk(tmp_path) == [8, 9]


def test_sigterm_saves_and_leaves(tmp_path, reference, caplog):
  handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
  with pytest.raises(checkpoint.Preempted) as stop:
    run(tmp_path, save_every=100, on_step=kill_at(4))
  assert stop.value.code == 143
  assert 'stopped at step 4 of 9' in caplog.text
  assert steps_on_disk(tmp_path) == [4]
  assert handlers == [
      signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
  assert_same_run(tmp_path, run(tmp_path), reference)


def test_ctrl_c_saves_and_leaves(tmp_path, reference):
  with pytest.raises(checkpoint.Preempted) as stop:
    run(tmp_path, save_every=100, on_step=kill_at(4, signal.SIGINT))
  assert stop.value.code == 130
  assert steps_on_disk(tmp_path) == [4]
  assert_same_run(tmp_path, run(tmp_path), reference)


def test_the_second_sigterm_does_not_wait(tmp_path, reference):
  with pytest.raises(checkpoint.Preempted) as stop:
    run(tmp_path, on_step=kill_at(4, times=2))
  assert stop.value.code == 143
  assert steps_on_disk(tmp_path) == [3]
  assert_same_run(tmp_path, run(tmp_path), reference)


def test_sigterm_in_the_last_step_stops_what_would_follow(tmp_path, reference):
  with pytest.raises(checkpoint.Preempted):
    run(tmp_path, on_step=kill_at(9))
  assert steps_on_disk(tmp_path)[-1] == 9
  assert_same_run(tmp_path, run(tmp_path), reference)


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
  with pytest.raises(Crash):
    run(tmp_path, on_step=crash_at(8))
  assert steps_on_disk(tmp_path) == [3, 6]
  damage_step(tmp_path, 6, damage)
  seen = []
  state = run(tmp_path, on_step=lambda step, state: seen.append(step))
  assert 'checkpoint 6 under' in caplog.text
  assert 'cannot be read' in caplog.text
  assert seen[0] == 4
  assert_same_run(tmp_path, state, reference)
  assert (tmp_path / 'checkpoints/6.damaged').is_dir()
  assert steps_on_disk(tmp_path) == [6, 9]


@with_orbax_noise
@pytest.mark.parametrize('spoil', [
    lambda f: f.unlink(), lambda f: os.truncate(f, f.stat().st_size // 2)],
    ids=['deleted', 'truncated'])
def test_any_one_damaged_file_leaves_a_right_state(
    tmp_path, reference, spoil):
  """Not every file is needed: the newest state, or the one before."""
  with pytest.raises(Crash):
    run(tmp_path, on_step=crash_at(8))
  folder = tmp_path / 'checkpoints/6'
  values = {}
  with checkpoint.Checkpointer(tmp_path / 'checkpoints') as checkpointer:
    values[6] = checkpointer.restore(fresh()).value
  files = [f for f in sorted(folder.rglob('*')) if f.is_file()]
  assert files
  for file in files:
    content = file.read_bytes()
    spoil(file)
    with checkpoint.Checkpointer(tmp_path / 'checkpoints') as checkpointer:
      state = checkpointer.restore(fresh())
    step = int(state.step)
    np.testing.assert_array_equal(
        state.value, values.setdefault(step, state.value), str(file))
    if step == 3:
      folder.with_name('6.damaged').rename(folder)
    file.write_bytes(content)
  assert_same_run(tmp_path, run(tmp_path), reference)


@with_orbax_noise
def test_all_checkpoints_damaged(tmp_path):
  with pytest.raises(Crash):
    run(tmp_path, on_step=crash_at(8))
  for step in (3, 6):
    damage_step(tmp_path, step, truncate_all)
  with pytest.raises(ValueError, match=r'none of the checkpoints \[3, 6\]'):
    run(tmp_path)
  assert steps_on_disk(tmp_path) == [3, 6]  # nothing is thrown away


@with_orbax_noise
@pytest.mark.parametrize('other', [
    fresh(SIZE + 1), {'step': jnp.zeros((), jnp.int32)}],
    ids=['shape', 'structure'])
def test_another_models_checkpoint_is_refused(tmp_path, other):
  run(tmp_path, 3)
  with checkpoint.Checkpointer(tmp_path / 'checkpoints') as checkpointer:
    with pytest.raises(ValueError, match='for this configuration'):
      checkpointer.restore(other)
  assert steps_on_disk(tmp_path) == [3]


def test_nothing_to_restore(tmp_path):
  with checkpoint.Checkpointer(tmp_path / 'new') as checkpointer:
    assert checkpointer.restore(fresh()) is None
    assert checkpointer.steps == []


@pytest.mark.parametrize('scalar', ['loss', 'l2_grads'])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('bad_step', marks.quick([6], [5, 6, 9]))
def test_divergence_is_named_and_not_saved(tmp_path, bad_step, bad, scalar):
  @jax.jit
  def diverging(state):
    state, scalars = step_fn(state)
    good = scalars.get(scalar, jnp.ones(()))
    scalars[scalar] = jnp.where(state.step >= bad_step, bad, good)
    return state, scalars

  with pytest.raises(errors.DivergedError) as error:
    run(tmp_path, step_fn=diverging)
  message = str(error.value)
  assert f'toy: {scalar} is {bad}' in message
  assert f'at step {bad_step}, timestep {(bad_step - 1) * 100};' in message
  assert all(step < bad_step for step in steps_on_disk(tmp_path))
  assert (bad_step - 1) // 3 * 3 in steps_on_disk(tmp_path)
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert len(lines) == bad_step - 1
  assert 'null' not in ''.join(lines)


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
      run(tmp_path)
  assert steps_on_disk(tmp_path) == [3]
  assert_same_run(tmp_path, run(tmp_path), reference)


@with_orbax_noise
def test_files_that_cannot_be_written_whole(tmp_path, reference):
  """A full disk, by a limit on file sizes, leaves earlier checkpoints."""
  with pytest.raises(Crash):
    run(tmp_path, on_step=crash_at(4))
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
  try:
    with pytest.raises(OSError, match='cannot write checkpoint 6'):
      run(tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert steps_on_disk(tmp_path) == [3]
  assert_same_run(tmp_path, run(tmp_path), reference)


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
    steps.append((step, steps_on_disk(tmp_path)))
    if step == 5:
      may_end.set()

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(atomicity.AtomicRenameTemporaryPath, 'finalize', slow)
    donating = jax.jit(step_fn, donate_argnums=0)
    state = run(tmp_path, step_fn=donating, on_step=on_step)
  assert (4, []) in steps and (5, []) in steps  # 3 was not complete
  assert steps_on_disk(tmp_path) == [6, 9]
  assert_same_run(tmp_path, state, reference)
  with checkpoint.Checkpointer(tmp_path / 'checkpoints') as checkpointer:
    np.testing.assert_array_equal(
        checkpointer.restore(fresh()).value, state.value)


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / 'checkpoints').write_text('a file is in the way')
  with pytest.raises(OSError, match='checkpoints'):
    run(tmp_path)


def test_what_prepares_sees_shapes_first_and_nothing_once_it_is_done(tmp_path):
  seen = []

  def prepare(abstract):
    seen.append(abstract)
    assert not steps_on_disk(tmp_path)

  run(tmp_path, 3, prepare=prepare)
  abstract, = seen
  assert abstract.value == jax.ShapeDtypeStruct((SIZE,), jnp.float32)
  run(tmp_path, 3, prepare=prepare)
  assert len(seen) == 1
  with pytest.raises(AssertionError):  # steps are left
    run(tmp_path, 4, prepare=prepare)


def test_a_folder_that_is_gone_is_not_told_as_damaged(tmp_path):
  """Whoever deletes it, as for damage, would have nothing to put back."""
  run(tmp_path, 3)
  folder = tmp_path / 'checkpoints'
  with checkpoint.Checkpointer(folder) as checkpointer:
    folder.rename(tmp_path / 'away')
    with pytest.raises(OSError, match='checkpoints is gone; put it back'):
      checkpointer.restore(fresh())
  (tmp_path / 'away').rename(folder)
  with checkpoint.Checkpointer(folder) as checkpointer:
    assert int(checkpointer.restore(fresh()).step) == 3
