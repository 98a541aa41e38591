"""Packing and loading layer by layer: peaks of memory, and SIGKILL.

By what `python -m benchmarks.streaming` measures with.
"""

import functools
import random
import shutil
import time

import big_checkpoints
import flux_oracle
import pytest

from benchmarks import streaming
import msfp_jax as msfp
from msfp_jax.models.flux import FluxConfig
from msfp_jax.packed import streamed

# 1.09 billion parameters, of which the largest layer has 14 million.
LARGE = FluxConfig(num_layers=6, num_single_layers=16, num_heads=12)
# 20 million.
SMALL = FluxConfig(num_layers=1, num_single_layers=2, num_heads=4)


@pytest.fixture
def folder(tmp_path):
  yield tmp_path / 'big'
  shutil.rmtree(tmp_path / 'big')


@pytest.mark.long
def test_peaks_are_below_the_result_and_a_layer(folder):
  size = big_checkpoints.write_flux(folder / 'flux', LARGE, shards=8)
  assert size > 2e9
  _, result, packing, loading, layer = streaming.measure(
      folder, LARGE, 'nvfp4')
  print(f'result {result / 1e6:.0f} MB, peaks {packing / 1e6:.0f} MB of '
        f'packing and {loading / 1e6:.0f} MB of loading, largest layer '
        f'{layer / 1e6:.0f} MB')
  assert packing > layer  # else it was not measured
  assert packing < result + 1.2 * layer
  # Nothing of the result is held: four copies of the largest layer, and what
  # compiling takes, are less.
  assert packing < 4 * layer + 350e6 < result
  # Beside a layer what tracing the model takes, and the seal's threads keep.
  assert result < loading < result + 1.2 * layer + 100e6


@pytest.mark.long
def test_killed_at_random_moments(tmp_path):
  """The command, three times, and once more to its end."""
  seed = time.time_ns()
  print(f'seed {seed}')
  source, target = tmp_path / 'flux', tmp_path / 'out.safetensors'
  big_checkpoints.write_flux(source, SMALL, shards=2)
  pack = functools.partial(  # as the command's flags are
      msfp.pack_streamed, source, act_bits=4, exceptions='ends-8')
  whole = pack(tmp_path / 'whole.safetensors')
  seen = streaming.kill(source, target, 3, len(flux_oracle.layers(SMALL)),
                        random.Random(seed))
  assert len(seen) == 3 and 0 < seen[0] < seen[1] < seen[2]
  assert not target.exists()
  pack(target)
  assert target.read_bytes() == whole.read_bytes()
  assert not target.with_name(target.name + streamed.SUFFIX).exists()
