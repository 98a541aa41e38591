"""Packed models against full precision: memory, speed, agreement.

  make packed     # or: python -m benchmarks.packed [--output=packed.json]
  make versus     # also against PyTorch and diffusers

The CIFAR-10 UNet (35.7 million random weights, calibrated by MSFP to 4 bits,
ends and embeddings to 8) samples one batch by DDIM in float32, in bfloat16, as
the simulation and from packed weights; where diffusers is installed, by it too.
All take turns in one process, and ratios are medians over the rounds. Then its
layers one by one, beside the machine's roofline as measured here: a share above
100% is of a product with fewer multiplications than the direct one has. Where a
layer of 4 bits is not run by the kernel that the device has, the reason stands
in place of its ratio, and of the model's.
"""

from collections.abc import Iterator
import dataclasses
import importlib.util
import os
import statistics
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from benchmarks import packed_layers
from benchmarks import packed_models
from msfp_jax import cli
from msfp_jax import files

_BATCH = flags.DEFINE_integer('batch', 32, 'Images at once.')
_STEPS = flags.DEFINE_integer('steps', 4, 'Steps of a trajectory.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Timed rounds.')
_LAYERS = flags.DEFINE_integer(
    'layers', 12, 'Kinds of layers to time, the most work first.')
_OUTPUT = flags.DEFINE_string('output', 'packed.json', 'Where figures go.')


def samplers(subject: packed_models.Subject) -> dict[str, Any]:
  """Those of `packed_models`, and diffusers' where it is installed."""
  found = packed_models.samplers(subject)
  if all(map(importlib.util.find_spec, ('torch', 'diffusers'))):
    from benchmarks import diffusers_sampler
    found['diffusers float32'] = (
        diffusers_sampler.make(packed_models.CONFIG, subject.state,
                               _STEPS.value, packed_models.BETAS),
        found['float32'][1])
  return found


def agreement(subject: packed_models.Subject, x: jax.Array
              ) -> dict[str, float]:
  """The packed model beside the simulation, by one step and by all."""
  models = {'packed': subject.packed, 'simulated': subject.deployed}
  plan = subject.packed.plan
  t = jnp.full(len(x), float(plan.timesteps[0]))
  eps = {name: np.asarray(jax.jit(
      lambda arrays, model=model: model.with_arrays(arrays).eps_fn(x, t, 0))(
          model.arrays)) for name, model in models.items()}
  error = (np.linalg.norm(eps['packed'] - eps['simulated'])
           / np.linalg.norm(eps['simulated']))
  return {'relative_l2_of_one_step': float(error)}


def end_to_end(subject: packed_models.Subject, fell_back: int
               ) -> list[dict[str, Any]]:
  """A row for each way to sample."""
  x = jax.random.normal(
      jax.random.key(1), (_BATCH.value, *packed_models.shape()))
  ways = samplers(subject)
  noise = {name: np.asarray(x) if 'diffusers' in name else x for name in ways}
  times = machine.rounds({
      name: lambda name=name: ways[name][0](noise[name]) for name in ways},
      _ROUNDS.value)
  size = ways['packed'][1]
  each = _BATCH.value * _STEPS.value
  return [{
      'name': name, 'bytes': ways[name][1],
      'bytes_ratio': ways[name][1] / size,
      'seconds': statistics.median(times[name]) / each,
      'packed_speedup': None if fell_back else machine.ratio(
          times[name], times['packed'])} for name in ways]


def table(rows: list[dict[str, Any]], floor: float, fell_back: int
          ) -> Iterator[str]:
  """Markdown."""
  yield ('| sampling | MB of weights | times packed | ms an image and step | '
         'share of the roofline | packed is faster by |')
  yield '|---|---|---|---|---|---|'
  for row in rows:
    speed = f'{fell_back} layers fell back' if fell_back else (
        f'{row["packed_speedup"]:.2f}x')
    share = (f'{floor / row["seconds"]:.0%}'
             if 'float32' in row['name'] else '')
    if row['name'] == 'packed':
      speed = ''
    yield (f'| {row["name"]} | {row["bytes"] / 1e6:.1f} | '
           f'{row["bytes_ratio"]:.1f} | {row["seconds"] * 1e3:.1f} | {share} | '
           f'{speed} |')


def main(unused_config: Any) -> None:
  start = time.perf_counter()
  found = machine.describe()
  print(f'{found["device"]} ({found["platform"]}), jax {found["jax"]}; batch '
        f'{_BATCH.value}, {_STEPS.value} steps, {_ROUNDS.value} rounds')
  roofline = machine.measure()
  print('roofline: ' + ', '.join(
      f'{name} {flops / 1e9:.0f} GFLOP/s' for name, flops
      in roofline.flops.items()) + f', {roofline.bandwidth / 1e9:.1f} GB/s')
  subject = packed_models.make(_STEPS.value)
  x = jax.ShapeDtypeStruct(
      (_BATCH.value, *packed_models.shape()), jnp.float32)
  cases = packed_layers.cases(
      subject.packed, subject.params, x,
      jax.ShapeDtypeStruct(x.shape[:1], jnp.float32))
  fell_back = sum(len(case.names) for case in cases
                  if case.layer.fmt.bits == 4 and case.fell_back())
  same = agreement(subject, jax.random.normal(jax.random.key(2), x.shape))
  rows = end_to_end(subject, fell_back)
  flop = sum(case.flop * len(case.names) for case in cases) / _BATCH.value
  print(*table(rows, flop / roofline.flops['f32'], fell_back), sep='\n')
  print('packed and simulated differ, after one step, by '
        f'{same["relative_l2_of_one_step"]:.1e} (relative L2)')
  layers = [packed_layers.measure(case, roofline, _ROUNDS.value)
            for case in cases[:_LAYERS.value]]
  print(*packed_layers.table(layers), sep='\n')
  files.write_json(_OUTPUT.value, {
      'machine': found, 'roofline': dataclasses.asdict(roofline),
      'batch': _BATCH.value, 'steps': _STEPS.value, 'rounds': _ROUNDS.value,
      'agreement': same, 'end_to_end': rows, 'layers': layers})
  print(f'wrote {os.path.abspath(_OUTPUT.value)} after '
        f'{time.perf_counter() - start:.0f} s')


if __name__ == '__main__':
  cli.run(main)
