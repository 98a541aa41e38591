"""What quantization costs in time: each figure against its own baseline.

  python -m benchmarks.costs [--only=quantizer,step,...]

Pairs are timed in turn, A B A B, in one process; the median of the pairs'
ratios is what counts, since machines drift. Prints a Markdown table.
"""

from collections.abc import Iterator
import dataclasses
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from configs import digits
from msfp_jax import diffusion
from msfp_jax.convert.native import abstract_params
from msfp_jax.models import unet
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import functional
from msfp_jax.quant import interception
from msfp_jax.quant import roles
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.calibrate import calibrate
from msfp_jax.quant.observe import collect
from msfp_jax.quant.observe import watch
from msfp_jax.quant.quantizers import FULL_BITS
from msfp_jax.run import cli
from msfp_jax.run import experiment as experiment_lib
from msfp_jax.tune import finetune
from msfp_jax.tune import losses
from msfp_jax.tune import student as student_lib

_ONLY = flags.DEFINE_list('only', None, 'Names of the measurements to make.')

Row = tuple[str, str, str]  # what, figure, limit


def _ratio(what: str, limit: float, a, b, **options) -> Row:
  mine, base, ratio = machine.paired(a, b, **options)
  return (what, f'{ratio:.2f}x ({mine * 1e3:.1f} / {base * 1e3:.1f} ms)',
          f'{limit}x')


def quantizer() -> Iterator[Row]:
  """fake_quant against x * a + b on 64 MB."""
  x = jax.random.normal(jax.random.key(0), (2**24,))
  affine = jax.jit(lambda x, a, b: x * a + b)
  scale, zero = jnp.float32(0.3), jnp.float32(-0.25)
  for fmt, shift in (('E2M1', None), ('UE2M2', zero)):
    quantize = jax.jit(lambda x, s, z, fmt=fmt: functional.fake_quant(
        x, fmt, s, z))
    yield _ratio(f'fake_quant {fmt} / x * a + b, 64 MB float32', 1.3,
                 lambda q=quantize, z=shift: q(x, scale, z),
                 lambda: affine(x, scale, zero))


def _experiment(variant: str) -> experiment_lib.Experiment:
  return experiment_lib.load(digits.get_config(variant), '')


def calibration() -> Iterator[Row]:
  """Calibrating the demo UNet from nothing, compilation included."""
  experiment = _experiment('ends-8')
  start = time.perf_counter()
  experiment.activations  # noqa: B018 - computed on first access
  middle = time.perf_counter()
  experiment.calibrate('msfp')
  end = time.perf_counter()
  yield ('calibrate and search the demo UNet, MSFP W4A4, compilation included',
         f'{end - start:.1f} s ({middle - start:.1f} gathering, '
         f'{end - middle:.1f} searching)', '30 s')


def gathering() -> Iterator[Row]:
  """Sampling with activations gathered against plain sampling."""
  experiment = _experiment('ends-8')
  model, plan = experiment.model, experiment.plan
  noise = jax.random.normal(jax.random.key(0), (64, 16, 16, 1))
  plain = jax.jit(lambda params, noise: diffusion.sample(
      lambda x, t, i: model.apply({'params': params}, x, t), plan, noise))
  gather = jax.jit(lambda params, noise, key: watch(
      model, plan, 65_536 // 80, (fit_lib.VALUES,), params, (noise,), key))
  yield _ratio('sampling 64 images while gathering activations / plain', 1.3,
               lambda: gather(experiment.params, noise, jax.random.key(1)),
               lambda: plain(experiment.params, noise), pairs=7, warmup=1)


def sampling() -> Iterator[Row]:
  """Simulated 4-bit sampling against full precision."""
  experiment = _experiment('ends-8,talora')
  made_of = experiment.model, experiment.params
  full = packed_lib.full_precision(*made_of, experiment.plan)
  spec = experiment.calibrate()
  student = _student(experiment, spec)
  trainable = student.init(jax.random.key(0), 2, 16, False, False, False)
  banked = packed_lib.deploy(student, trainable, experiment.plan)
  noise = jax.random.normal(jax.random.key(0), (64, 16, 16, 1))

  def sampler(model):
    draw = jax.jit(lambda arrays: diffusion.sample(
        model.with_arrays(arrays).eps_fn, experiment.plan, noise))
    return lambda: draw(model.arrays)

  simulated = packed_lib.simulate(*made_of, spec, experiment.plan)
  for name, model in (('MSFP', simulated), ('two banks', banked)):
    yield _ratio(f'sampling 64 images in simulated W4A4, {name} / full '
                 'precision', 1.3, sampler(model), sampler(full), pairs=7,
                 warmup=1)


def _student(experiment, spec) -> student_lib.Student:
  return finetune.make_student(
      experiment.model, experiment.params, spec,
      experiment.schedule.num_train_steps, experiment.finetune)


def step() -> Iterator[Row]:
  """A fine-tuning step against the same one without fake quantization."""
  experiment = _experiment('ends-8,lora')
  gamma = losses.denoising_factors(
      experiment.schedule, experiment.plan, experiment.finetune.gamma)

  def updates(student, learn_ranges):
    settings = dataclasses.replace(
        experiment.finetune, learn_act_ranges=learn_ranges,
        learn_weight_scales=learn_ranges)
    tx = finetune.optimizer(settings)
    state = finetune.init_state(
        student, tx, experiment.plan, (16, 16, 1), jax.random.key(0),
        settings)
    update = finetune.make_step(
        student, experiment.plan, gamma, tx, jax.random.key(1))

    def work():
      nonlocal state
      state, scalars = update(state)
      return scalars

    return work

  student = _student(experiment, experiment.calibrate())
  none = spec_lib.LayerSpec('', '')
  plain = dataclasses.replace(student, spec=spec_lib.QuantSpec(
      'fp', {name: none for name in student.spec.layers}))
  for name, learn in (('', False), (' and learned ranges and scales', True)):
    yield _ratio(
        'fine-tuning step, batch 16, one LoRA, with fake quantization'
        f'{name} / without', 1.6, updates(student, learn),
        updates(plain, False), pairs=30, warmup=3)


def cifar_search() -> Iterator[Row]:
  """The search at CIFAR-10 size, on made-up activations."""
  model = unet.UNet(unet.UNetConfig())
  shapes = abstract_params(model)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda leaf: rng.standard_normal(leaf.shape, np.float32) * 0.05, shapes)
  names = interception.list_layers(
      model, shapes, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
      jax.ShapeDtypeStruct((1,), jnp.float32))
  seen = {}
  for name in names:
    values = rng.standard_normal(65_536).astype(np.float32)
    if roles.follows_activation(name):
      values = np.asarray(jax.nn.silu(2 * values))
    seen[name] = fit_lib.Seen(values, float(values.min()), float(values.max()))
  for what, bits in (('activations and weights', 4),
                     ('activations alone', FULL_BITS)):
    start = time.perf_counter()
    calibrate(model, params, recipe='msfp', bits=bits, act_bits=4,
              activations=seen)
    yield (f'search at CIFAR-10 size, {len(names)} layers, 65,536 values '
           f'each: {what}', f'{time.perf_counter() - start:.1f} s', '60 s')


def collecting() -> Iterator[Row]:
  """How the time of `collect` grows with the number of images."""
  experiment = _experiment('ends-8')
  key = jax.random.key(0)
  for count in (1, 4):
    batches = [jax.random.normal(jax.random.fold_in(key, i), (64, 16, 16, 1))
               for i in range(count)]
    start = time.perf_counter()
    collect(experiment.model, experiment.params, experiment.plan, batches,
            key=key)
    yield (f'gathering on {64 * count} trajectories, compilation included',
           f'{time.perf_counter() - start:.1f} s', '')


MEASUREMENTS = (quantizer, calibration, gathering, sampling, step, collecting,
                cifar_search)


def main(unused_argv):
  print('| what | measured | limit |\n|---|---|---|', flush=True)
  for measure in MEASUREMENTS:
    if not _ONLY.value or measure.__name__ in _ONLY.value:
      for row in measure():
        print('| ' + ' | '.join(row) + ' |', flush=True)


if __name__ == '__main__':
  cli.run(main)
