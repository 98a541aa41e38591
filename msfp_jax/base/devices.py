"""Splitting batches over all devices."""

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np


def batch_sharding() -> NamedSharding | None:
  """The sharding that splits a first axis over all devices; None if one."""
  if jax.device_count() == 1:
    return None
  # One axis over all devices of all processes: data parallel, nothing else.
  mesh = Mesh(np.asarray(jax.devices()), ('batch',))
  return NamedSharding(mesh, PartitionSpec('batch'))


def on_all(tree):
  """Copies a tree of arrays to every device, where there are several."""
  sharding = batch_sharding()
  if sharding is None:
    return tree
  # A specification that names no axis splits nothing: whole copies.
  return jax.device_put(tree, NamedSharding(sharding.mesh, PartitionSpec()))


def check_batch(name: str, batch_size: int) -> None:
  """Raises ValueError unless a batch can be split evenly over all devices."""
  count = jax.device_count()
  if batch_size < 1 or batch_size % count:
    raise ValueError(f'{name}={batch_size}: must be a multiple of the {count} '
                     'devices')
