"""What a device holds of a transformer whose weights wait on the host.

  python -m benchmarks.offloaded

Compiles sampling of 1024 x 1024 pixels with three blocks of FLUX.1's width, for
an H200 and a TPU v6e that are not there, and prints the table of docs/usage.md:
XLA's own account of the memory that the programs take. Needs what `make aot`
installs: libtpu, JAX's plugin for CUDA and nvcc.
"""

from collections.abc import Sequence
import contextlib
import math
import os
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jaxlib import xla_client
import numpy as np

from benchmarks import hopper_absent
from benchmarks import tpu_cost
import msfp_jax as msfp
from msfp_jax import convert
from msfp_jax import diffusion
from msfp_jax.base import markdown
from msfp_jax.kernels import offload
from msfp_jax.kernels.mosaic_tpu import blocks as blocks_lib
from msfp_jax.models.flux import Flux
from msfp_jax.models.flux import FluxConfig
from msfp_jax.run import cli

CHIP = 'v6e'
PLAN = diffusion.SamplerPlan(
    np.array([1.0, 0.5]), np.ones(2), np.full(2, 0.5), np.zeros(2))
# A double block and two single ones: 32 layers.
FLUX = Flux(FluxConfig(
    image_size=128, num_layers=1, num_single_layers=2, num_heads=24))
TOKENS = 512  # of text


@contextlib.contextmanager
def on_tpu():
  """Gives (sharding, JAX's platform to lower for); kernels are for a TPU."""
  with (mock.patch.dict(os.environ, tpu_cost.LIBTPU_ENVIRONMENT),
        mock.patch.object(blocks_lib, 'generation', lambda: CHIP),
        mock.patch.object(jax, 'default_backend', lambda: 'tpu')):
    yield tpu_cost.sharding(CHIP), 'tpu'


@contextlib.contextmanager
def on_gpu():
  """Gives (sharding, JAX's platform to lower for); kernels are for an H200."""
  with mock.patch.object(jax, 'default_backend', lambda: 'gpu'):
    yield hopper_absent.sharding(), 'cuda'


def accounts(model: Flux, tokens: int, sharding: jax.sharding.NamedSharding,
             platform: str) -> tuple[Any, Any, list[int]]:
  """Compiles a sampler of two steps of a model in `nvfp4`.

  Args:
    model: whose weights are not computed.
    tokens: of text, of one prompt.
    sharding: onto the device.
    platform: JAX's name of it.

  Returns:
    XLA's account where weights wait on the host; where they are on the device;
    and of every layer the bytes that wait.
  """
  cpu = jax.sharding.NamedSharding(
      jax.sharding.Mesh(jax.devices('cpu')[:1], ('x',)),
      jax.sharding.PartitionSpec())
  params = jax.tree.map(
      lambda leaf: np.broadcast_to(np.float32(0.5), leaf.shape),
      convert.abstract_params(model))
  packed = msfp.pack(
      model, params, msfp.calibrate(model, params, recipe='nvfp4'), PLAN)
  at = lambda sharding: lambda part: jax.ShapeDtypeStruct(
      np.shape(part), part.dtype, sharding=sharding)
  config = model.config
  shapes = ((1, config.image_size, config.image_size, config.in_channels),
            (1, tokens, config.text_dim), (1, config.pooled_dim))
  inputs = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=cpu)
            for shape in shapes]
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
  return *(_account(sharding, platform, draw, (other, layers), *inputs)
           for layers in (waits, stays)), sizes


def _account(sharding, platform, function, *arguments):
  # JAX knows no memory but the device's of a GPU that is not there: lowered
  # for a CPU, which has both, and compiled for the other.
  lowered = jax.jit(function).trace(*arguments).lower(
      lowering_platforms=(platform,))
  devices = sharding._internal_device_list
  return devices[0].client.compile(
      lowered.compiler_ir(), executable_devices=devices,
      compile_options=xla_client.CompileOptions()).get_compiled_memory_stats()


def main(argv: Sequence[str]) -> None:
  del argv
  rows = []
  for name, device in (('H200', on_gpu), (f'TPU {CHIP}', on_tpu)):
    with device() as (sharding, platform):
      waits, stays, sizes = accounts(FLUX, TOKENS, sharding, platform)
    rows += [[name if place == 'device' else '', f'on the {place}', *(
        f'{size / 1e6:,.0f} MB' for size in (
            found.host_argument_size_in_bytes, found.argument_size_in_bytes,
            found.temp_size_in_bytes + found.output_size_in_bytes))]
             for place, found in (('device', stays), ('host', waits))]
    print(f'{name}: the largest layer has {max(sizes) / 1e6:.0f} MB')
  print(markdown.table(
      ['device', 'weights', 'on the host', 'on the device: arguments',
       'all else'], rows))


if __name__ == '__main__':
  cli.run(main)
