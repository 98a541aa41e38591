"""Memory of packing and loading a model layer by layer, and SIGKILL.

  python -m benchmarks.streaming
  python -m benchmarks.streaming --blocks=1,1 --heads=24 --kills=0

Writes a checkpoint of a transformer of FLUX.1's layers with random weights, in
shards of bfloat16; by default 2.2 GB of 1.09 billion. Packs it by each recipe
in a process of its own, loads what was packed in another, and prints the table
of docs/usage.md. Then packs it again, killed at random moments, and compares
the bytes. Linux only. With --folder, that of --blocks=19,38 --heads=24 is
FLUX.1-schnell's own size.
"""

from collections.abc import Callable, Sequence
import hashlib
import json
import math
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from absl import app
from absl import flags
import numpy as np

from benchmarks.memory_of import Memory
from msfp_jax.convert import piecewise
from msfp_jax.models.flux import FluxConfig
from msfp_jax.packed import streamed
from msfp_jax.quant import roles
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantizers import Static
from msfp_jax.quant.spec import LayerSpec
from msfp_jax.quant.spec import QuantSpec

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'tests'))
import big_checkpoints  # noqa: E402
import flux_oracle  # noqa: E402

RECIPES = ('nvfp4', 'quartz', 'msfp')


def largest_layer(config: FluxConfig) -> int:
  """Bytes of the largest layer in float32."""
  return 4 * max(map(math.prod, flux_oracle.layers(config).values()))


def spec_by_hand(config: FluxConfig) -> QuantSpec:
  """MSFP's static quantizers, as if calibrated: scales that nobody searched."""
  layers = {}
  for name, shape in flux_oracle.layers(config).items():
    bits = roles.EXCEPTIONS['ends-8'].get(roles.role_of(name), 4)
    fmt = FPFormat.parse('E2M1' if bits == 4 else 'E4M3')
    layers[name] = LayerSpec('', '', Static(
        fmt, np.full((1, shape[1]), 2**-8, np.float32)), Static(
            fmt, np.float32(0.1)))
  return QuantSpec('msfp', layers)


def memory_of(*arguments: str) -> Memory:
  """What a call takes; arguments as of `benchmarks.memory_of`."""
  done = subprocess.run(
      [sys.executable, '-m', 'benchmarks.memory_of', *map(str, arguments)],
      capture_output=True, text=True, cwd=ROOT, check=False)
  if done.returncode:
    raise RuntimeError(done.stderr)
  return Memory(*json.loads(done.stdout))


def digest_of(path: pathlib.Path) -> bytes:
  """A file's SHA-256, however large it is."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').digest()


def kill(source: pathlib.Path, target: pathlib.Path, kills: int,
         layers: int, rng: random.Random) -> list[int]:
  """Packs by the command, and kills it at random moments.

  Args:
    source: the checkpoint.
    target: the packed model's file, which is not made in the end.
    kills: how many times; less only where a process was too fast.
    layers: of the model.
    rng: of the moments.

  Returns:
    How many pieces were in the file at each kill.
  """
  command = [sys.executable, '-m', 'msfp_jax.packed', str(source), str(target)]
  journal = (target.with_name(target.name + streamed.SUFFIX)
             / piecewise.JOURNAL)
  count = lambda: (
      journal.read_bytes().count(b'\n') if journal.exists() else 0)
  seen = []
  for least in sorted(rng.sample(range(layers // 2), kills)):
    least = max(least, count())
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    _wait(lambda child=child, least=least: (
        count() > least or child.poll() is not None))
    # Anywhere in the work on a layer.
    time.sleep(rng.uniform(0, 0.1))
    child.send_signal(signal.SIGKILL)
    if child.wait() != -signal.SIGKILL:
      break
    seen.append(count())
  return seen


def _wait(happened: Callable[[], bool]) -> None:
  while not happened():
    time.sleep(0.005)


def measure(folder: pathlib.Path, config: FluxConfig, recipe: str) -> Sequence:
  """A row of the table; the packed file stays, as RECIPE.safetensors."""
  options, target = {'recipe': recipe}, folder / f'{recipe}.safetensors'
  if recipe == 'msfp':
    spec_by_hand(config).save(folder / 'spec.json')
    options = {'spec': str(folder / 'spec.json')}
  packing = memory_of('pack', folder / 'flux', target, json.dumps(options))
  loading = memory_of('load', target, '{}')
  result = target.stat().st_size
  return (f'`{recipe}`', result, packing.peak, loading.peak,
          largest_layer(config))


def _kill_and_resume(folder, layers):
  seed = time.time_ns() if flags.FLAGS.seed is None else flags.FLAGS.seed
  whole, target = folder / 'whole.safetensors', folder / 'out.safetensors'
  pack = lambda target: subprocess.run(
      [sys.executable, '-m', 'msfp_jax.packed', str(folder / 'flux'),
       str(target)], cwd=ROOT, stderr=subprocess.DEVNULL, check=True)
  pack(whole)
  seen = kill(folder / 'flux', target, flags.FLAGS.kills, layers,
              random.Random(seed))
  pack(target)
  print(f'Killed {len(seen)} times (seed {seed}), with {seen} of {layers} '
        'layers and more done.')
  if digest_of(target) != digest_of(whole):
    sys.exit('What was resumed has other bytes than what was packed at once.')
  print('Resumed to the bytes of what was packed at once.')


def _define_flags():
  # Not when this is imported: tests import what other programs define too.
  flags.DEFINE_multi_enum(
      'recipe', RECIPES, RECIPES, "To pack by; msfp's quantizers are a spec by "
      'hand.')
  flags.DEFINE_list('blocks', ['6', '16'], 'Double and single blocks.')
  flags.DEFINE_integer('heads', 12, 'Of 128 channels each.')
  flags.DEFINE_integer('shards', 8, 'Files of the checkpoint.')
  flags.DEFINE_integer('kills', 5, 'Times that packing is killed.')
  flags.DEFINE_integer('seed', None, 'Of the moments of the kills.')
  flags.DEFINE_string('folder', None, 'Where the files go, and are deleted; on '
                      'a disk with room.')


def main(unused_argv: Sequence[str]) -> None:
  double, single = map(int, flags.FLAGS.blocks)
  config = FluxConfig(
      num_layers=double, num_single_layers=single,
      num_heads=flags.FLAGS.heads)
  with tempfile.TemporaryDirectory(dir=flags.FLAGS.folder) as name:
    folder = pathlib.Path(name)
    size = big_checkpoints.write_flux(
        folder / 'flux', config, shards=flags.FLAGS.shards)
    what = f'{size / 2e9:.2f} billion parameters, {config.channels} wide'
    print('| model | recipe | file | peak of packing | peak of loading | '
          'largest layer in float32 |\n|---|---|---|---|---|---|', flush=True)
    for recipe in dict.fromkeys(flags.FLAGS.recipe):
      name, *sizes = measure(folder, config, recipe)
      print(' | '.join(
          [f'| {what}', name, *(f'{size / 1e6:,.0f} MB' for size in sizes)]),
            '|', flush=True)
      (folder / f'{recipe}.safetensors').unlink()
    if flags.FLAGS.kills:
      print()
      _kill_and_resume(folder, len(flux_oracle.layers(config)))


if __name__ == '__main__':
  _define_flags()
  app.run(main)
