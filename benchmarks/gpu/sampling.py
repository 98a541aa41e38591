"""Stage sampling: CIFAR-10's UNet in every way it runs, one against packed.

Of each way: milliseconds an image and step, images a second at the sampler's
100 steps, the memory that its program needs, the three slowest operations, and
how many times faster packed weights are, in turns with them. Float32 is
measured twice: with products in float32, and in TF32, as GPUs take by default;
each row says which it is. The simulation's products of levels are float32's.
"""

from collections.abc import Callable
import dataclasses
import functools
import statistics
from typing import Any

from absl import app
import jax
import jax.numpy as jnp

from benchmarks import machine
from benchmarks import packed_layers
from benchmarks import packed_models
from benchmarks import packed_sampling
from benchmarks.gpu import arguments
from benchmarks.gpu import record as record_lib
from benchmarks.gpu import slowest
from benchmarks.gpu import subject as subject_lib
from msfp_jax import diffusion
from msfp_jax import kernels

STEPS = 4  # of what is timed
FULL_STEPS = 100  # of configs/cifar10.py
_LEAST = 25.0  # seconds, of a way


@dataclasses.dataclass(frozen=True)
class Way:
  """A way to sample.

  Attributes:
    function: (arrays, noise `[B, H, W, C]`) -> samples.
    arrays: all that the model holds.
    precision: of products of float32, as jax.default_matmul_precision has it.
  """

  function: Callable[[Any, jax.Array], jax.Array]
  arrays: Any
  precision: str = 'float32'

  def lower(self, noise: Any) -> Any:
    """The sampler from noise `[B, H, W, C]`, traced, to be compiled."""
    with jax.default_matmul_precision(self.precision):
      return jax.jit(
          self.function, compiler_options=kernels.compiler_options()).lower(
              self.arrays, noise)


def ways(subject: packed_models.Subject) -> dict[str, Way]:
  """The ways, packed weights first: all others are compared with them."""
  plan, plain = subject.packed.plan, packed_models.full_precision(subject)

  def of(packed):
    return Way(lambda arrays, x: diffusion.sample(
        packed.with_arrays(arrays).eps_fn, plan, x), packed.arrays)

  halves = jax.tree.map(lambda w: w.astype(jnp.bfloat16), subject.params)
  return {
      'packed': of(subject.packed),
      'bfloat16': Way(plain, halves),
      'float32, TF32': Way(plain, subject.params, 'tensorfloat32'),
      'float32': Way(plain, subject.params),
      'simulated': of(subject.simulated)}


def memory(compiled: Any) -> dict[str, int] | None:
  """Bytes that a program needs on the device, by what they are for."""
  found = compiled.memory_analysis()
  return found and {
      'arguments': found.argument_size_in_bytes,
      'results': found.output_size_in_bytes,
      'temporary': found.temp_size_in_bytes}


class Comparison:
  """Measures ways on one batch of noise, packed weights beside each."""

  def __init__(self, ways: dict[str, Way], batch: int, rounds: int):
    self._ways = ways
    self._rounds = rounds
    self._noise = jax.random.normal(
        jax.random.key(1), (batch, *packed_models.shape()))
    self._programs = {}

  def program(self, name: str) -> Any:
    """A way's compiled sampler, compiled when it is first asked for."""
    if name not in self._programs:
      self._programs[name] = self._ways[name].lower(self._noise).compile()
    return self._programs[name]

  def row(self, name: str) -> dict[str, Any]:
    """What is measured of a way, in turns with the packed one."""
    run = lambda name: lambda: self.program(name)(
        self._ways[name].arrays, self._noise)
    times = machine.rounds(
        {key: run(key) for key in dict.fromkeys((name, 'packed'))},
        self._rounds)
    a_step = statistics.median(times[name]) / STEPS / len(self._noise)
    return {
        'batch': len(self._noise), 'ms_an_image_and_step': a_step * 1e3,
        'images_a_second': 1 / (a_step * FULL_STEPS),
        'precision_of_float32': self._ways[name].precision,
        'packed_is_faster_by': machine.ratio(times[name], times['packed']),
        'bytes': memory(self.program(name)),
        'slowest': slowest.operations(run(name))}


def main(unused_argv) -> None:
  folder, dry = arguments.folder(), arguments.DRY.value
  record = record_lib.Record(folder, arguments.SECONDS.value)
  batch, rounds = (2, 2) if dry else (128, 7)
  subject = subject_lib.make(folder, STEPS, dry)
  comparison = Comparison(ways(subject), batch, rounds)
  work = {
      # Layers that the device's kernel does not take make no ratio of its.
      'layers of 4 bits that fell back': lambda: packed_layers.count_fallen(
          packed_layers.cases(subject.packed, subject.params,
                              *packed_models.inputs(batch))),
      **{name: functools.partial(comparison.row, name)
         for name in ways(subject)},
      'packed and simulated differ by, relative L2': lambda: (
          packed_sampling.agreement(subject, batch))}
  for name, function in work.items():
    record.measure(name, function, least=0 if dry else _LEAST)
  raise SystemExit(record.status(work))


if __name__ == '__main__':
  app.run(main)
