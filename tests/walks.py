"""A random walk in place of a training, and how its runs are stopped."""

import os
import signal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.base import writer as writer_lib
from msfp_jax.tune import loop

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


def uninterrupted(workdir):
  """A run of 9 steps: its workdir and its state."""
  return workdir, run(workdir)


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
