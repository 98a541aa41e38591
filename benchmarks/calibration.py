"""Time and memory of calibrating the CIFAR-10 model for W4A4.

  python -m benchmarks.calibration [--trajectories=32] [--steps=20]
  python -m benchmarks.calibration --recipes=data-free
  python -m benchmarks.calibration --recipes=svdquant

The UNet has 35.7 million random parameters, in the configuration of
google/ddpm-cifar10-32. Every row runs in a process of its own, compilation
included: plain sampling of the same images first, which is the memory to
compare with; then gathering and searching, on more and more values a layer.
With --recipes a row a recipe instead, beside its time that of all its threads
(CPU) and the load of the machine when it began; `data-free` stands for all that
need to see nothing.
"""

from collections.abc import Sequence
import os
import resource
import subprocess
import sys
import time

from absl import app
from absl import flags
import jax

from msfp_jax import diffusion
from msfp_jax.convert import abstract_params
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig
from msfp_jax.quant import recipes
from msfp_jax.quant.calibrate import calibrate
from msfp_jax.quant.observe import collect
from msfp_jax.run.teacher import random_params

DATA_FREE = 'data-free'
_TRAJECTORIES = flags.DEFINE_integer('trajectories', 32, 'Images at once.')
_STEPS = flags.DEFINE_integer('steps', 20, 'Steps of a trajectory.')
_RECIPES = flags.DEFINE_list(
    'recipes', [], f'Times these in place of the rest; {DATA_FREE!r} for all '
    'that need to see nothing.')
_VALUES = flags.DEFINE_integer(
    'values', None, 'Run this row alone: values a layer, 0 to only sample.')
_ALONE = flags.DEFINE_string('alone', '', 'Run the row of this recipe alone.')


def expand(names: Sequence[str]) -> list[str]:
  """Recipes, with all that need to see nothing in place of DATA_FREE."""
  found = []
  for name in names:
    found += [name] if name != DATA_FREE else [
        key for key, recipe in recipes.RECIPES.items() if not recipe.needs]
  return found


def setting():
  """Model, its parameters, the sampler's plan and starting noise."""
  model = UNet(UNetConfig(dropout=0.0))
  params = random_params(abstract_params(model), 0)
  schedule = diffusion.make_schedule(
      'linear', num_train_steps=1000, beta_start=1e-4, beta_end=0.02)
  plan = diffusion.make_plan(schedule, 'ddim', num_steps=_STEPS.value)
  noise = jax.random.normal(
      jax.random.key(0), (_TRAJECTORIES.value, 32, 32, 3))
  return model, params, plan, noise


def measure(values: int) -> str:
  """Measures one row: times in seconds, the process' peak in MB."""
  model, params, plan, noise = setting()
  start, searched = time.perf_counter(), ''
  if values:
    activations = collect(model, params, plan, [noise], key=jax.random.key(1),
                          samples_per_layer=values)
    sampled = time.perf_counter() - start
    calibrate(model, params, recipe='msfp', bits=4, activations=activations)
    searched = f'{time.perf_counter() - start - sampled:.1f}'
  else:
    run = jax.jit(lambda params, x: diffusion.sample(
        lambda x, t, step: model.apply({'params': params}, x, t), plan, x))
    run(params, noise).block_until_ready()
    sampled = time.perf_counter() - start
  name = f'{values:,} values a layer' if values else 'sampling alone'
  return f'| {name} | {sampled:.1f} | {searched} | {_peak():,.0f} |'


def measure_recipe(name: str) -> str:
  """Measures one recipe's row; its CPU seconds are of both its parts."""
  load = os.getloadavg()[0]
  model, params, plan, noise = setting()
  needs = recipes.get(name).needs
  start, used = time.perf_counter(), time.process_time()
  activations, gathered = None, ''
  if needs:
    activations = collect(model, params, plan, [noise], key=jax.random.key(1),
                          needs=needs)
    gathered = f'{time.perf_counter() - start:.1f}'
  middle = time.perf_counter()
  calibrate(model, params, recipe=name, bits=4, activations=activations)
  searched = time.perf_counter() - middle
  return (f'| {name} | {gathered} | {searched:.1f} | '
          f'{time.process_time() - used:.1f} | {_peak():,.0f} | {load:.1f} |')


def _peak() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _print_row(*options: str) -> None:
  """Prints a row that a process of its own measures."""
  done = subprocess.run(
      [sys.executable, '-m', 'benchmarks.calibration', *options,
       f'--trajectories={_TRAJECTORIES.value}', f'--steps={_STEPS.value}'],
      stdout=subprocess.PIPE, text=True, check=True)
  print(done.stdout.strip(), flush=True)


def main(unused_argv: Sequence[str]) -> None:
  if _ALONE.value:
    print(measure_recipe(_ALONE.value))
    return
  if _VALUES.value is not None:
    print(measure(_VALUES.value))
    return
  names = expand(_RECIPES.value)
  for name in names:
    recipes.get(name)  # a slip in a name is refused before hours of others
  print(f'{_TRAJECTORIES.value} trajectories of {_STEPS.value} steps, '
        'compilation included')
  if names:
    print('| recipe | sampling, s | search, s | CPU, s | peak, MB | load |\n'
          '|---|---|---|---|---|---|')
    for name in names:
      _print_row(f'--alone={name}')
    return
  print('| | sampling, s | search, s | peak, MB |\n|---|---|---|---|')
  for values in (0, 65_536, 262_144):
    _print_row(f'--values={values}')


if __name__ == '__main__':
  app.run(main)
