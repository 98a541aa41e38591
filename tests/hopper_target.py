"""A Hopper GPU that is not there, to compile for."""

import pathlib

import jax
from jax.experimental import topologies
import pytest


def sharding():
  """Returns a sharding onto an H200; skips where JAX's plugin is missing."""
  pytest.importorskip('jax_cuda12_plugin')
  # As in `make aot`, for who runs a file alone.
  jax.config.update('jax_platforms', 'cpu')
  topology = topologies.get_topology_desc(
      platform='cuda', topology='1x1x1',
      target_config=pathlib.Path(__file__).with_name('h200.txtpb').read_text())
  return jax.sharding.NamedSharding(
      topologies.make_mesh(topology, (1,), ('x',)),
      jax.sharding.PartitionSpec())
