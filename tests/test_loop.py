"""The training loop: stops of every kind, and resuming."""

import json
import signal

import jax
import jax.numpy as jnp
import marks
import numpy as np
import pytest
import walks

from msfp_jax.base import errors
from msfp_jax.tune import checkpoint
from msfp_jax.tune import loop

pytestmark = pytest.mark.gpu


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """An uninterrupted run of 9 steps: its workdir and its state."""
  return walks.uninterrupted(tmp_path_factory.mktemp('reference'))


def test_an_uninterrupted_run(reference):
  workdir, state = reference
  value = np.zeros(walks.SIZE)
  lines = []
  for step in range(9):
    value = 0.9 * value + np.asarray(
        jax.random.normal(jax.random.fold_in(walks.KEY, step), (walks.SIZE,)),
        np.float64)
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
  with pytest.raises(walks.Crash):
    walks.run(tmp_path, on_step=walks.crash_at(crash_step))
  seen = []
  state = walks.run(tmp_path, on_step=lambda step, state: seen.append(step))
  assert seen == list(range(resumes_at + 1, 10))
  walks.assert_same_run(tmp_path, state, reference)


def test_on_step_sees_the_state_after_each_step(tmp_path):
  seen = []
  walks.run(tmp_path, 4, on_step=lambda step, state: seen.append(
      (step, int(state.step))))
  assert seen == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_a_finished_run_does_nothing_more(tmp_path, reference):
  walks.run(tmp_path)

  def never(state):
    raise AssertionError('a step of a finished run')

  walks.assert_same_run(tmp_path, walks.run(tmp_path, step_fn=never), reference)


@pytest.mark.parametrize('log_every', [1, 2, 9, 100])
def test_the_first_step_alone_counts_as_compiling(
    tmp_path, monkeypatch, log_every):
  """However rarely scalars are fetched; and each step is told once."""
  told = []
  monkeypatch.setattr(
      loop.progress_lib.Progress, 'update',
      lambda self, step, **scalars: told.append(step))
  walks.run(tmp_path, save_every=100, log_every=log_every)
  assert told == sorted({1, 9, *range(log_every, 10, log_every)})


def test_a_longer_run_goes_on_from_a_shorter(tmp_path, reference):
  walks.run(tmp_path, 4)  # the last step is saved although 3 does not divide it
  assert 4 in walks.steps_on_disk(tmp_path)
  walks.assert_same_run(tmp_path, walks.run(tmp_path, 9), reference)


def test_two_checkpoints_are_kept(tmp_path):
  walks.run(tmp_path, 9, save_every=2)
  assert walks.steps_on_disk(tmp_path) == [8, 9]


def test_sigterm_saves_and_leaves(tmp_path, reference, caplog):
  handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
  with pytest.raises(checkpoint.Preempted) as stop:
    walks.run(tmp_path, save_every=100, on_step=walks.kill_at(4))
  assert stop.value.code == 143
  assert 'stopped at step 4 of 9' in caplog.text
  assert walks.steps_on_disk(tmp_path) == [4]
  assert handlers == [
      signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
  walks.assert_same_run(tmp_path, walks.run(tmp_path), reference)


def test_ctrl_c_saves_and_leaves(tmp_path, reference):
  with pytest.raises(checkpoint.Preempted) as stop:
    walks.run(tmp_path, save_every=100, on_step=walks.kill_at(4, signal.SIGINT))
  assert stop.value.code == 130
  assert walks.steps_on_disk(tmp_path) == [4]
  walks.assert_same_run(tmp_path, walks.run(tmp_path), reference)


def test_the_second_sigterm_does_not_wait(tmp_path, reference):
  with pytest.raises(checkpoint.Preempted) as stop:
    walks.run(tmp_path, on_step=walks.kill_at(4, times=2))
  assert stop.value.code == 143
  assert walks.steps_on_disk(tmp_path) == [3]
  walks.assert_same_run(tmp_path, walks.run(tmp_path), reference)


def test_sigterm_in_the_last_step_stops_what_would_follow(tmp_path, reference):
  with pytest.raises(checkpoint.Preempted):
    walks.run(tmp_path, on_step=walks.kill_at(9))
  assert walks.steps_on_disk(tmp_path)[-1] == 9
  walks.assert_same_run(tmp_path, walks.run(tmp_path), reference)


@pytest.mark.parametrize('scalar', ['loss', 'l2_grads'])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('bad_step', marks.quick([6], [5, 6, 9]))
def test_divergence_is_named_and_not_saved(tmp_path, bad_step, bad, scalar):
  @jax.jit
  def diverging(state):
    state, scalars = walks.step_fn(state)
    good = scalars.get(scalar, jnp.ones(()))
    scalars[scalar] = jnp.where(state.step >= bad_step, bad, good)
    return state, scalars

  with pytest.raises(errors.DivergedError) as error:
    walks.run(tmp_path, step_fn=diverging)
  message = str(error.value)
  assert f'toy: {scalar} is {bad}' in message
  assert f'at step {bad_step}, timestep {(bad_step - 1) * 100};' in message
  assert all(step < bad_step for step in walks.steps_on_disk(tmp_path))
  assert (bad_step - 1) // 3 * 3 in walks.steps_on_disk(tmp_path)
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert len(lines) == bad_step - 1
  assert 'null' not in ''.join(lines)


def test_what_prepares_sees_shapes_first_and_nothing_once_it_is_done(tmp_path):
  seen = []

  def prepare(abstract):
    seen.append(abstract)
    assert not walks.steps_on_disk(tmp_path)

  walks.run(tmp_path, 3, prepare=prepare)
  abstract, = seen
  assert abstract.value == jax.ShapeDtypeStruct((walks.SIZE,), jnp.float32)
  walks.run(tmp_path, 3, prepare=prepare)
  assert len(seen) == 1
  with pytest.raises(AssertionError):  # steps are left
    walks.run(tmp_path, 4, prepare=prepare)
