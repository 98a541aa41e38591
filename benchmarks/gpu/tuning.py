"""Stage tuning: a fine-tuning step at CIFAR-10's size.

As configs/cifar10.py tunes, with two LoRAs and learned ranges; the same without
fake quantization; and with one LoRA and no learned ranges, which is what the
second differs from by quantization alone. Products of float32 are in TF32, as
GPUs take by default.
"""

import dataclasses
import functools
import statistics
from typing import Any

from absl import app
import jax

from benchmarks import machine
from benchmarks import packed_models
from benchmarks.gpu import arguments
from benchmarks.gpu import record as record_lib
from benchmarks.gpu import slowest
from benchmarks.gpu import subject as subject_lib
from configs import cifar10
from msfp_jax.diffusion import origin
from msfp_jax.quant import spec as spec_lib
from msfp_jax.tune import finetune
from msfp_jax.tune import losses

_PRECISION = 'tensorfloat32'
_STEPS = 4  # of the sampler: the model's, whose spec lies there
_LEAST = 25.0  # seconds, of a way


def without_quantization(subject: packed_models.Subject) -> spec_lib.QuantSpec:
  """A spec of the same layers, all in full precision."""
  none = spec_lib.LayerSpec('', '')
  return spec_lib.QuantSpec('fp', {name: none for name in subject.spec.layers})


class Step:
  """Updates of one student, each from the state that the last one left.

  Attributes:
    update: state -> (state, scalars); the state given is used up.
    state: before the next.
  """

  def __init__(self, subject: packed_models.Subject, spec: spec_lib.QuantSpec,
               settings: finetune.FinetuneSettings):
    """Makes a student with banks on the layers that the subject's spec has.

    Args:
      subject: the model, its parameters and its spec.
      spec: by which layers are quantized.
      settings: of the tuning.
    """
    config = cifar10.get_config()
    schedule = origin.choose(
        origin.Origin(), config.schedule, config.sampler).schedule
    model, plan = subject.packed.model, subject.packed.plan
    student = dataclasses.replace(finetune.make_student(
        model, subject.params, subject.spec, schedule.num_train_steps,
        settings), spec=spec)
    tx = finetune.optimizer(settings)
    self.state = finetune.init_state(
        student, tx, plan, model.sample_shape, jax.random.key(0), settings)
    self.update = finetune.make_step(
        student, plan, losses.denoising_factors(
            schedule, plan, settings.gamma), tx, jax.random.key(1))

  def __call__(self) -> Any:
    self.state, scalars = self.update(self.state)
    return scalars


def row(step: Step, base: Step | None, settings, rounds: int
        ) -> dict[str, Any]:
  """Times a step, in turns with `base` where there is one."""
  times = machine.rounds(
      {'step': step} | ({'base': base} if base else {}), rounds)
  seconds = statistics.median(times['step'])
  peak = (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')
  return {
      'ms': seconds * 1e3, 'images_a_second': settings.batch_size / seconds,
      'precision_of_float32': _PRECISION, 'batch': settings.batch_size,
      'times_without_quantization': base and statistics.median(
          a / b for a, b in zip(times['step'], times['base'], strict=True)),
      # Of all that the process has run by now, the least first.
      'peak_bytes': peak, 'slowest': slowest.operations(step)}


def main(unused_argv) -> None:
  folder, dry = arguments.folder(), arguments.DRY.value
  jax.config.update('jax_default_matmul_precision', _PRECISION)
  record = record_lib.Record(folder, arguments.SECONDS.value)
  subject = subject_lib.make(folder, _STEPS, dry)
  config = cifar10.get_config('smoke' if dry else '').finetune
  full = finetune.FinetuneSettings(**config)
  one = dataclasses.replace(full, num_banks=1, learn_act_ranges=False,
                            learn_weight_scales=False)
  plain = without_quantization(subject)
  rounds = 2 if dry else 20
  least = 0 if dry else _LEAST
  base = None

  def measure(spec, settings):
    nonlocal base
    base = base or Step(subject, plain, one)
    step = base if spec is plain else Step(subject, spec, settings)
    return row(step, None if step is base else base, settings, rounds)

  work = {'one LoRA, without quantization': (plain, one),
          'one LoRA': (subject.spec, one),
          'two LoRAs, learned ranges': (subject.spec, full)}
  for name, (spec, settings) in work.items():
    record.measure(name, functools.partial(measure, spec, settings), least)
  raise SystemExit(record.status(work))


if __name__ == '__main__':
  app.run(main)
