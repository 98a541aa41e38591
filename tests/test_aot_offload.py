"""A transformer whose weights wait on the host, compiled for a TPU and an H200.

What the programs need of either memory is XLA's own account of them. Needs
libtpu; run by `make aot`. The H200 needs JAX's plugin for CUDA and nvcc; run by
`make test-long`.
"""

import pytest

from benchmarks import offloaded
from msfp_jax.models.flux import Flux
from msfp_jax.models.flux import FluxConfig

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures('uncached')]
# A double block and two single ones: 32 layers.
MODEL = Flux(FluxConfig(
    image_size=8, num_layers=1, num_single_layers=2, num_heads=4,
    text_dim=256, pooled_dim=128))


@pytest.fixture(scope='module', params=[
    pytest.param(('libtpu', offloaded.on_tpu), id='tpu'),
    pytest.param(('jax_cuda12_plugin', offloaded.on_gpu), id='gpu',
                 marks=pytest.mark.long)])
def compiled(request):
  """(XLA's account where weights wait, and where not; bytes by layer)."""
  compiler, device = request.param
  pytest.importorskip(compiler, reason='it compiles for such a device')
  with device() as (sharding, platform):
    yield offloaded.accounts(MODEL, 8, sharding, platform)


def test_weights_are_arguments_on_the_host(compiled):
  waits, stays, sizes = compiled
  assert waits.host_argument_size_in_bytes == sum(sizes)
  assert stays.host_argument_size_in_bytes == 0
  assert stays.argument_size_in_bytes >= sum(sizes)
  assert waits.argument_size_in_bytes < 0.05 * sum(sizes)


def test_the_device_holds_three_layers_at_most(compiled):
  """One that is multiplied, one that has come, one that comes.

  Each may be there flat and in its shape. That is beside what the program takes
  where all weights are on the device.
  """
  waits, stays, sizes = compiled
  extra = waits.temp_size_in_bytes - stays.temp_size_in_bytes
  assert extra <= 2 * 3 * max(sizes) < sum(sizes)
