"""The training loop that pre-training and fine-tuning share."""

from collections.abc import Callable
import math
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp

from msfp_jax.base import devices
from msfp_jax.base import errors
from msfp_jax.base import progress as progress_lib
from msfp_jax.base import writer as writer_lib
from msfp_jax.tune import checkpoint
from msfp_jax.tune import speed as speed_lib


def _check_finite(name: str, step: int, scalars: dict[str, float]) -> None:
  for key in ('loss', 'l2_grads'):
    value = scalars.get(key)
    if value is not None and not math.isfinite(value):
      where = f', timestep {scalars["t"]:.0f}' if 't' in scalars else ''
      raise errors.DivergedError(
          f'{name}: {key} is {value} at step {step}{where}; look for NaN in '
          'the data, or lower the learning rate, in another workdir. '
          'Checkpoints from before it are kept')


def run(
    name: str,
    init: Callable[[], Any],
    step_fn: Callable[[Any], tuple[Any, dict[str, jax.Array]]],
    num_steps: int,
    *,
    workdir: str,
    writer: writer_lib.MetricWriter,
    save_every: int,
    log_every: int,
    on_step: Callable[[int, Any], None] = lambda step, state: None,
    images_per_step: int = 0,
    layout: devices.Layout | None = None,
    shardings: Callable[[Any], Any] | None = None,
    prepare: Callable[[Any], None] | None = None,
    measure: Callable[[], speed_lib.Speed] | None = None,
) -> Any:
  """Runs `step_fn` from the newest checkpoint to `num_steps`.

  The result of an interrupted and resumed run is that of an uninterrupted
  one, bit for bit, when `step_fn` draws its randomness from `state.step`.

  Args:
    name: for progress lines and the metrics' prefix.
    init: () -> the initial state, whose `state.step` counts the steps done;
      not run where there is a checkpoint, but traced for its structure.
    step_fn: state -> (state, scalars); jitted, may donate its argument.
    num_steps: steps in all.
    workdir: checkpoints go to `workdir`/checkpoints.
    writer: receives the scalars of every step, as `name`/scalar.
    save_every: steps between checkpoints; the last step is always saved.
    log_every: steps whose scalars are fetched at once.
    on_step: called after each step with (steps done, state), before its
      checkpoint; after a crash it may see a step again.
    images_per_step: progress lines have images per second; 0: they do not.
    layout: of the devices; by default of all.
    shardings: a state, or its shapes -> where it lies, as `step_fn` returns it;
      by default that of weights.
    prepare: compiles `step_fn`, given the abstract form of states; called
      before there is one, and not where all steps are done.
    measure: finds the device's speed, of which progress lines then say the
      share; called after `prepare`.

  Raises:
    errors.DivergedError: a loss is not finite; names the step and the timestep.
    checkpoint.Preempted: SIGTERM or SIGINT; the state has been saved.
  """
  layout = layout or devices.layout()
  with checkpoint.Checkpointer(f'{workdir}/checkpoints') as checkpointer:
    abstract = jax.eval_shape(init)
    lies = None
    if not layout.is_single:
      lies = (shardings or layout.of_weights)(abstract)
    if prepare and max(checkpointer.steps, default=0) < num_steps:
      prepare(layout.abstract(abstract, lies))
    restored = checkpointer.restore(abstract, lies)
    if restored is None:
      state = layout.put(init(), lies)
    else:
      state = restored
      if layout.is_single:
        # Uncommitted, as a fresh state is: both run the same compiled program.
        state = jax.tree.map(jnp.array, jax.device_get(restored))
      logging.info('%s: resumed at step %d', name, int(state.step))
    # Steps behind the checkpoint will be repeated, and logged once more.
    start = int(state.step)
    writer.truncate_after(start)
    more = {}
    if measure and start < num_steps:
      more['share'] = measure().share
    progress = progress_lib.Progress(
        name, num_steps, start, images_per_step=images_per_step,
        compiles=prepare is None, **more)
    # Scalars stay on the device for log_every steps: to fetch them is to wait
    # for the step, and the next one could not be queued meanwhile.
    pending = []

    def flush() -> None:
      for step, scalars in jax.device_get(pending):
        scalars = {key: float(value) for key, value in scalars.items()}
        _check_finite(name, step, scalars)
        writer.write_scalars(
            step, {f'{name}/{key}': v for key, v in scalars.items()})
      if pending:
        progress.update(step, loss=scalars['loss'])
      pending.clear()

    for step in range(start + 1, num_steps + 1):
      state, scalars = step_fn(state)
      pending.append((step, scalars))
      due = step % save_every == 0 or step == num_steps
      fetches = due or step % log_every == 0
      if fetches:
        flush()
      if pending and step == start + 1:
        # Waits for it, this once: its time is that of compiling.
        jax.block_until_ready(scalars)
        progress.update(step)
      on_step(step, state)
      # Several processes agree where they wait for the device anyway.
      stopping = checkpointer.stopping(agree=fetches)
      if due or stopping:
        flush()
        writer.flush()
        checkpointer.save(step, state)
      if stopping:
        break
    # Also where it came in the last step: what follows must not begin.
    if checkpointer.stopping():
      checkpointer.wait()
      logging.warning('%s: stopped at step %d of %d; run the same command '
                      'again to go on', name, int(state.step), num_steps)
      raise checkpoint.Preempted(checkpointer.exit_code)
  return state
