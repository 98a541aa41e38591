"""Packing 2 GB layer by layer: its peak of memory, and SIGKILL."""

import hashlib
import json
import math
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import big_checkpoints
import flux_oracle
import numpy as np
import pytest

from msfp_jax.models.flux import FluxConfig
from msfp_jax.packed import streamed
from msfp_jax.quant import roles
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantizers import Static
from msfp_jax.quant.spec import LayerSpec
from msfp_jax.quant.spec import QuantSpec

pytestmark = pytest.mark.slow
# 1.09 billion parameters, of which the largest layer has 14 million.
CONFIG = FluxConfig(num_layers=6, num_single_layers=16, num_heads=12)
ROOT = pathlib.Path(__file__).parents[1]
# What Python, JAX and this package take is `before`.
SCRIPT = '''
import json, sys
import jax
import msfp_jax as msfp
jax.numpy.zeros(1).block_until_ready()
def read(field):
  with open('/proc/self/status') as file:
    line, = (line for line in file if line.startswith(field))
  return 1024 * int(line.split()[1])
source, target, options = sys.argv[1:]
options = json.loads(options)
if 'spec' in options:
  options['spec'] = msfp.QuantSpec.load(options['spec'])
before = read('VmRSS')
msfp.pack_streamed(source, target, **options)
print(before, read('VmHWM') - before)
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('big')
  size = big_checkpoints.write_flux(folder / 'flux', CONFIG, shards=8)
  assert size > 2e9
  yield folder
  shutil.rmtree(folder)


def spec_by_hand():
  """MSFP's static quantizers, as if calibrated: scales that nobody searched."""
  layers = {}
  for name, shape in flux_oracle.layers(CONFIG).items():
    bits = roles.EXCEPTIONS['ends-8'].get(roles.role_of(name), 4)
    fmt = FPFormat.parse('E2M1' if bits == 4 else 'E4M3')
    layers[name] = LayerSpec('', '', Static(
        fmt, np.full((1, shape[1]), 2**-8, np.float32)), Static(
            fmt, np.float32(0.1)))
  return QuantSpec('msfp', layers)


@pytest.mark.parametrize('recipe', ['nvfp4', 'quartz', 'msfp'])
def test_peak_is_below_the_result_and_a_layer(folder, recipe):
  options = {'recipe': recipe}
  if recipe == 'msfp':
    spec_by_hand().save(folder / 'spec.json')
    options = {'spec': str(folder / 'spec.json')}
  target = folder / f'{recipe}.safetensors'
  done = subprocess.run(
      [sys.executable, '-c', SCRIPT, str(folder / 'flux'), str(target),
       json.dumps(options)],
      capture_output=True, text=True, cwd=ROOT, check=True)
  before, extra = map(int, done.stdout.split())
  result = target.stat().st_size
  layer = 4 * max(map(math.prod, flux_oracle.layers(CONFIG).values()))
  print(f'{recipe}: {extra / 1e6:.0f} MB beyond the {before / 1e6:.0f} of '
        f'Python and JAX; result {result / 1e6:.0f} MB, largest layer '
        f'{layer / 1e6:.0f} MB')
  target.unlink()
  assert extra > layer  # else it was not measured
  assert extra < result + 1.2 * layer
  # Nothing of the result is held. Four copies of the largest layer, and what
  # compiling takes, which is much beside so small a one.
  assert extra < 4 * layer + 350e6


def test_killed_at_random_moments(folder):
  """The command, five times, and once more to its end."""
  seed = time.time_ns()
  print(f'seed {seed}')
  rng, kills = random.Random(seed), 0
  whole, target = folder / 'whole.safetensors', folder / 'out.safetensors'
  command = [sys.executable, '-m', 'msfp_jax.packed', str(folder / 'flux')]
  subprocess.run([*command, str(whole)], cwd=ROOT, check=True)
  while kills < 5:
    child = subprocess.Popen([*command, str(target)], cwd=ROOT)
    try:
      child.wait(rng.uniform(2, 14))
      break
    except subprocess.TimeoutExpired:
      child.send_signal(signal.SIGKILL)
      child.wait()
      kills += 1
      assert not target.exists()
  begun = folder / (target.name + streamed.SUFFIX) / 'journal.jsonl'
  print(f'{kills} kills, {begun.read_bytes().count(10)} lines kept')
  assert kills
  subprocess.run([*command, str(target)], cwd=ROOT, check=True)
  digest = lambda path: hashlib.sha256(path.read_bytes()).digest()
  assert digest(target) == digest(whole)
  assert not begun.parent.exists()
  whole.unlink()
  target.unlink()
