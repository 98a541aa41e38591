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

import dataclasses
import importlib.util
import os
import time
from typing import Any

from absl import flags

from benchmarks import machine
from benchmarks import packed_layers
from benchmarks import packed_models
from benchmarks import packed_sampling
from msfp_jax.base import files
from msfp_jax.run import cli

_BATCH = flags.DEFINE_integer('batch', 32, 'Images at once.')
_STEPS = flags.DEFINE_integer('steps', 4, 'Steps of a trajectory.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Timed rounds.')
_LAYERS = flags.DEFINE_integer(
    'layers', 12, 'Kinds of layers to time, the most work first.')
_OUTPUT = flags.DEFINE_string('output', 'packed.json', 'Where figures go.')


def samplers(subject: packed_models.Subject) -> dict[str, Any]:
  """The samplers of `packed_models`, and diffusers' where it is installed."""
  found = packed_models.samplers(subject)
  if all(map(importlib.util.find_spec, ('torch', 'diffusers'))):
    from benchmarks import diffusers_sampler
    found['diffusers float32'] = (
        diffusers_sampler.make(packed_models.CONFIG, subject.state,
                               _STEPS.value, packed_models.BETAS),
        found['float32'][1])
  return found


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
  cases = packed_layers.cases(subject.packed, subject.params,
                              *packed_models.inputs(_BATCH.value))
  fell_back = packed_layers.count_fallen(cases)
  error = packed_sampling.agreement(subject, _BATCH.value)
  rows = packed_sampling.measure(
      samplers(subject), _BATCH.value, _STEPS.value, _ROUNDS.value, fell_back)
  flop = sum(case.flop * len(case.names) for case in cases) / _BATCH.value
  print(*packed_sampling.table(
      rows, flop / roofline.flops['f32'], fell_back), sep='\n')
  print('the first predictions of packed and simulated differ by '
        f'{error:.1e} (relative L2)')
  layers = [packed_layers.measure(case, roofline, _ROUNDS.value)
            for case in cases[:_LAYERS.value]]
  print(*packed_layers.table(layers), sep='\n')
  files.write_json(_OUTPUT.value, {
      'machine': found, 'roofline': dataclasses.asdict(roofline),
      'batch': _BATCH.value, 'steps': _STEPS.value, 'rounds': _ROUNDS.value,
      'relative_l2': error, 'end_to_end': rows, 'layers': layers})
  print(f'wrote {os.path.abspath(_OUTPUT.value)} after '
        f'{time.perf_counter() - start:.0f} s')


if __name__ == '__main__':
  cli.run(main)
