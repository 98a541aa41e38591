"""Weak scaling: what a step costs as devices grow, each with as many images.

  python -m benchmarks.scaling [--devices=1,2,4,8] [--model=1]

The step is one update of TALoRA with DFA of the model of `make demo`. Devices
are parts of this machine's CPU, so that beyond its cores they take turns; what
more devices cost is in the CPU's time for an image, and in what they exchange,
which is counted in the compiled program.
"""

from concurrent import futures
import multiprocessing
import time

from absl import flags
import jax
import numpy as np

from benchmarks import collectives
from benchmarks import work as work_lib
from configs import digits
from msfp_jax.base import devices
from msfp_jax.base import markdown
from msfp_jax.base import progress as progress_lib
from msfp_jax.run import cli

_DEVICES = flags.DEFINE_list('devices', ['1', '2', '4', '8'], 'How many.')
_MODEL = flags.DEFINE_integer(
    'model', 1, 'Of them share the large weights.', lower_bound=1)
_STEPS = flags.DEFINE_integer(
    'steps', 10, 'Steps that are timed.', lower_bound=1)
STEP = work_lib.PlannedStep(digits.get_config, work_lib.tuning, images=16)


def _measured(count: int, model: int, steps: int) -> dict[str, float | str]:
  """A row: seconds of a step and of the CPU, and what is exchanged."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', count)
  layout = work_lib.Shapes(devices.layout(model).mesh)
  task = work_lib.task_of(STEP, layout.num_parts)
  update, shapes = work_lib.tuning(task, layout)
  compiled = update.lower(*shapes).compile()
  found = collectives.of(compiled.as_text(), count)
  state, *given = jax.tree.map(_filled, shapes)
  state, scalars = compiled(state, *given)
  jax.block_until_ready(scalars)
  begin, computed = time.perf_counter(), time.process_time()
  for _ in range(steps):
    state, scalars = compiled(state, *given)
    jax.block_until_ready(scalars)
  if not np.isfinite(scalars['loss']):
    raise ValueError(f'a loss of {scalars["loss"]}: such steps are not timed')
  return {'images': task.batch,
          'seconds': (time.perf_counter() - begin) / steps,
          'computed': (time.process_time() - computed) / steps,
          'exchanges': collectives.summary(collectives.counts(found)),
          'sent': sum(one.sent for one in found)}


def _filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
  """Small positive numbers in a shape, which an optimizer's moments may be."""
  if not np.issubdtype(leaf.dtype, np.floating):
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
  values = np.random.default_rng(0).standard_normal(leaf.shape, np.float32)
  return jax.device_put(np.abs(values / 100).astype(leaf.dtype), leaf.sharding)


def main(argv: list[str]) -> None:
  """Prints a table."""
  del argv
  counts, rows, base = [int(count) for count in _DEVICES.value], [], None
  if bad := [count for count in counts if count < 1 or count % _MODEL.value]:
    raise ValueError(
        f'--devices={bad}: must be multiples of --model={_MODEL.value}')
  progress = progress_lib.Progress('devices', len(counts), every_seconds=0)
  # Each in a process of its own: how many devices there are is settled when JAX
  # begins.
  with futures.ProcessPoolExecutor(
      1, multiprocessing.get_context('spawn'), max_tasks_per_child=1) as pool:
    for count in counts:
      row = pool.submit(_measured, count, _MODEL.value, _STEPS.value).result()
      each = row['computed'] / row['images']
      base = base or each
      rows.append([
          f'{count}', f'{row["images"]}', f'{row["seconds"]:.2f}',
          f'{1e3 * each:.1f}', f'{each / base:.2f}x', row['exchanges'],
          f'{row["sent"] / 1e6:.1f}'])
      progress.update(len(rows))
  print(markdown.table(
      ['devices', 'images', 'seconds a step', 'ms of the CPU an image',
       'of the first row', 'exchanges', 'MB sent by a device'], rows))


if __name__ == '__main__':
  cli.run(main)
