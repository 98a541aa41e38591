"""A Hopper GPU that is not there, to compile for."""

import pytest

from benchmarks import hopper_absent


def sharding():
  """Returns a sharding onto an H200; skips where JAX's plugin is missing."""
  pytest.importorskip('jax_cuda12_plugin')
  return hopper_absent.sharding()
