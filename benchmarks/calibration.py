"""Time and memory of calibrating the CIFAR-10 model for W4A4.

  python -m benchmarks.calibration [--trajectories=32] [--steps=20]

The UNet has 35.7 million random parameters. Every row runs in a process of its
own: plain sampling of the same images first, which is the memory to compare
with; then gathering and searching, on more and more values a layer.
"""

from collections.abc import Sequence
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
from msfp_jax.quant.calibrate import calibrate
from msfp_jax.quant.observe import collect
from msfp_jax.run.teacher import random_params

_TRAJECTORIES = flags.DEFINE_integer('trajectories', 32, 'Images at once.')
_STEPS = flags.DEFINE_integer('steps', 20, 'Steps of a trajectory.')
_VALUES = flags.DEFINE_integer(
    'values', None, 'Run this row alone: values a layer, 0 to only sample.')


def measure(values: int) -> str:
  """Measures one row: times in seconds, the process' peak in MB."""
  model = UNet(UNetConfig(dropout=0.0))
  params = random_params(abstract_params(model), 0)
  schedule = diffusion.make_schedule(
      'linear', num_train_steps=1000, beta_start=1e-4, beta_end=0.02)
  plan = diffusion.make_plan(schedule, 'ddim', num_steps=_STEPS.value)
  noise = jax.random.normal(
      jax.random.key(0), (_TRAJECTORIES.value, 32, 32, 3))
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
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  name = f'{values:,} values a layer' if values else 'sampling alone'
  return f'| {name} | {sampled:.1f} | {searched} | {peak:,.0f} |'


def main(unused_argv: Sequence[str]) -> None:
  if _VALUES.value is not None:
    print(measure(_VALUES.value))
    return
  print(f'{_TRAJECTORIES.value} trajectories of {_STEPS.value} steps, '
        'compilation included\n'
        '| | sampling, s | search, s | peak, MB |\n|---|---|---|---|')
  for values in (0, 65_536, 262_144):
    done = subprocess.run(
        [sys.executable, '-m', 'benchmarks.calibration', f'--values={values}',
         f'--trajectories={_TRAJECTORIES.value}', f'--steps={_STEPS.value}'],
        stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout.strip(), flush=True)


if __name__ == '__main__':
  app.run(main)
