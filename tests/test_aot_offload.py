"""A transformer whose weights wait on the host, compiled for a TPU and an H200.

What the programs need of either memory is XLA's own account of them. Needs
libtpu, JAX's plugin for CUDA and nvcc; run by `make aot`.
"""


import math

import hopper_target
import jax
import jax.numpy as jnp
from jaxlib import xla_client
import numpy as np
import pytest

from benchmarks import tpu_cost
import msfp_jax as msfp
from msfp_jax import convert
from msfp_jax import diffusion
from msfp_jax.kernels import offload
from msfp_jax.kernels.mosaic_tpu import blocks as blocks_lib
from msfp_jax.models.flux import Flux
from msfp_jax.models.flux import FluxConfig

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures('uncached')]
CHIP = 'v6e'
# A block of a kind and two of the other: 32 layers.
MODEL = Flux(FluxConfig(
    image_size=8, num_layers=1, num_single_layers=2, num_heads=4,
    text_dim=256, pooled_dim=128))
PLAN = diffusion.SamplerPlan(
    np.array([1.0, 0.5]), np.ones(2), np.full(2, 0.5), np.zeros(2))


def on_tpu(patch):
  pytest.importorskip('libtpu', reason='libtpu compiles for TPUs')
  for name, value in tpu_cost.LIBTPU_ENVIRONMENT.items():
    patch.setenv(name, value)
  patch.setattr(blocks_lib, 'generation', lambda: CHIP)
  return tpu_cost.sharding(CHIP), 'tpu', 'tpu'


def on_gpu(patch):
  del patch
  return hopper_target.sharding(), 'gpu', 'cuda'


def account(sharding, platform, function, *arguments):
  """XLA's account of the memory that a program takes on a device."""
  # JAX knows no memory but the device's of a GPU that is not there: lowered
  # for a CPU, which has both, and compiled for the other.
  lowered = jax.jit(function).trace(*arguments).lower(
      lowering_platforms=(platform,))
  devices = sharding._internal_device_list
  return devices[0].client.compile(
      lowered.compiler_ir(), executable_devices=devices,
      compile_options=xla_client.CompileOptions()).get_compiled_memory_stats()


@pytest.fixture(scope='module', params=[on_tpu, on_gpu], ids=['tpu', 'gpu'])
def compiled(request):
  """(XLA's account where weights wait, and where not; bytes by layer)."""
  with pytest.MonkeyPatch.context() as patch:
    sharding, backend, platform = request.param(patch)
    cpu = jax.sharding.NamedSharding(
        jax.sharding.Mesh(jax.devices('cpu')[:1], ('x',)),
        jax.sharding.PartitionSpec())
    patch.setattr(jax, 'default_backend', lambda: backend)
    params = jax.tree.map(
        lambda leaf: np.broadcast_to(np.float32(0.5), leaf.shape),
        convert.abstract_params(MODEL))
    packed = msfp.pack(
        MODEL, params, msfp.calibrate(MODEL, params, recipe='nvfp4'), PLAN)
    at = lambda sharding: lambda part: jax.ShapeDtypeStruct(
        np.shape(part), part.dtype, sharding=sharding)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=cpu)
              for shape in ((1, 8, 8, 16), (1, 8, 256), (1, 128))]
    draw = lambda arrays, noise, *conditions: diffusion.sample(
        lambda x, t, index: packed.with_arrays(arrays).eps_fn(
            x, t, index, *conditions), PLAN, noise)
    other = jax.tree.map(at(cpu), packed.params)
    waits = {name: offload.arrange(
        layer, at(cpu.with_memory_kind(offload.KIND)), at(cpu))
             for name, layer in packed.layers.items()}
    stays = jax.tree.map(at(cpu), packed.layers)
    sizes = [sum(math.prod(part.shape) * part.dtype.itemsize
                 for part in jax.tree.leaves(layer)
                 if part.sharding.memory_kind == offload.KIND)
             for layer in waits.values()]
    return *(account(sharding, platform, draw, (other, layers), *inputs)
             for layers in (waits, stays)), sizes


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
