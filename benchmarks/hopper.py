"""Packed 4-bit products on an H100 or H200: whether right, and how fast.

  python -m benchmarks.hopper [--output=hopper.json] [--aot] [--only=conv,few]

First checks the kernels of `mosaic_gpu` on the device (hopper_checks.py): int8
bit for bit, fp8 within a bound, and that fp8's subnormals count. Then times
products and convolutions of real sizes against XLA's in bf16 and against XLA's
in int8 and fp8 with weights decoded before. Inputs are random levels already
on the device; every call of a kernel has inputs of its own until these fill
four times the L2 cache (or there are 16), so that small kernels are not timed
on data that happens to lie there.

At last the CIFAR-10 UNet samples in bf16 and from packed weights (see
benchmarks/packed.py; its activations are float32 between the layers).

A row has a ratio only where its result was right and no input of 8 bits was
widened on the way. Without a GPU, --aot compiles all of it for an H200.
"""

import time
from typing import Any

from absl import app
from absl import flags
import jax

from benchmarks import hopper_absent
from benchmarks import hopper_cases
from benchmarks import hopper_checks
from benchmarks import hopper_measure
from benchmarks import packed_layers
from benchmarks import packed_models
from benchmarks import packed_sampling
from msfp_jax.base import files

_OUTPUT = flags.DEFINE_string('output', None, 'Where to write the rows, JSON.')
_AOT = flags.DEFINE_bool('aot', False, 'Compile only, for an H200.')
_ONLY = flags.DEFINE_list('only', None, 'Parts of names of cases to measure.')
_MINUTES = flags.DEFINE_float('minutes', 6.5, 'Begins no case after these.')

# Its name for --only.
SAMPLING = 'sampling'
SAMPLES = 64  # at once


def _has_sampling() -> bool:
  return not _ONLY.value or SAMPLING in _ONLY.value


def run_all(cases, start: float) -> None:
  """Runs all cases; prints the table, and writes every finished case."""
  device = jax.devices()[0]
  if device.platform != 'gpu':
    raise app.UsageError(f'{device.device_kind} is no GPU; see --aot')
  roofline = next(
      (v for k, v in hopper_measure.ROOFLINES.items()
       if k in device.device_kind), None)
  print(f'{device.device_kind}, jax {jax.__version__}; roofline (bf16, 8 bits, '
        f'memory): {roofline}')
  claims = {}
  for claim, holds in hopper_checks.check():
    claims[claim] = holds
    print(f'{"ok" if holds else "WRONG":5} {claim}', flush=True)
  print('| case | method | us | to bf16 | TFLOP/s | TB/s | of roofline | note '
        '|\n|---|---|---|---|---|---|---|---|', flush=True)
  rows = []
  for case in cases:
    if time.perf_counter() - start > 60 * _MINUTES.value:
      print(f'no time left for {case.name} and what follows')
      break
    try:
      rows.extend(hopper_measure.run_case(case, roofline))
    except Exception as error:  # noqa: BLE001 - the others go on
      print(f'{case.name}: {hopper_absent.describe(error)}')
    write(roofline, claims=claims, rows=rows)
  if _has_sampling():
    write(roofline, claims=claims, rows=rows, sampling=sample_cifar10())


def write(roofline, **found: Any) -> None:
  """Writes the figures that are known by now."""
  if _OUTPUT.value:
    files.write_json(_OUTPUT.value, {
        'device': jax.devices()[0].device_kind, 'jax': jax.__version__,
        'roofline': roofline, **found})


def sample_cifar10(batch: int = SAMPLES, num_steps: int = 4
                   ) -> list[dict[str, Any]]:
  """Times sampling in bf16 and with packed weights; prints the rows."""
  subject = packed_models.make(num_steps)
  fallen = packed_layers.count_fallen(packed_layers.cases(
      subject.packed, subject.params, *packed_models.inputs(batch)))
  ways = packed_models.samplers(subject)
  rows = packed_sampling.measure(
      {name: ways[name] for name in ('bfloat16', 'packed')}, batch, num_steps,
      10, fallen)
  print(*packed_sampling.table(rows, None, fallen), sep='\n')
  return rows


def main(unused_argv) -> None:
  start = time.perf_counter()
  cases = [case for case in hopper_cases.CASES if not _ONLY.value or any(
      part in case.name for part in _ONLY.value)]
  if _AOT.value:
    raise SystemExit(min(hopper_absent.compile_all(
        cases, SAMPLES if _has_sampling() else 0), 1))
  run_all(cases, start)


if __name__ == '__main__':
  app.run(main)
