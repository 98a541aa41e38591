"""Slices of TPU chips that are not there, and programs compiled for them."""

import dataclasses
import functools
import os
import re
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np

from benchmarks import collectives
from benchmarks import flops
from benchmarks import tpu_cost
from benchmarks import work as work_lib
from msfp_jax.base import devices
from msfp_jax.tune import memory

CHIPS = ('v5e', 'v6e')
# How many chips stand how; the shapes that are rented.
SHAPES = {1: '1x1', 8: '2x4', 64: '8x8', 256: '16x16'}
# The compiler would look for a faster program for minutes. What it makes in
# seconds exchanges the same; of memory beside its arguments it needs another
# amount, of a UNet's prediction 0.14 GB for 0.11.
_QUICKLY = {'exec_time_optimization_effort': -1.0}
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
# `Used 20.51G of 15.75G hbm`, `(8.00T) exceeds available HBM (15.75G)`
_THERE = re.compile(r'(?:of |available HBM \()([\d.]+)([KMGT])')


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a step takes of chips, as the compiler says.

  Attributes:
    need: bytes of a chip; None where the compiler refuses, as it has less.
    lacking: what it said then.
    flops: of the traced program, see `benchmarks.flops`; what each chip
      computes for itself counts once.
    exchanged: with other chips.
  """

  need: memory.Need | None
  lacking: str = ''
  flops: float = 0.0
  exchanged: tuple[collectives.Collective, ...] = ()

  @property
  def sent(self) -> float:
    """Bytes that a chip sends to others."""
    return sum(one.sent for one in self.exchanged)


def layout(chip: str, count: int, model: int = 1) -> work_lib.Shapes:
  """So many chips, of which `model` share the large weights.

  Raises:
    ValueError: there is no such slice, or it cannot be shared so.
  """
  if (chip not in CHIPS or count not in SHAPES or model < 1
      or count % model):
    raise ValueError(f'{count} chips {chip}, {model} of which share weights: '
                     f'must be one of {CHIPS}, {tuple(SHAPES)} chips, and a '
                     'number that divides these')
  extra = {'chips_per_host_bounds': (1, 1, 1)} if count == 1 else {}
  with mock.patch.dict(os.environ, tpu_cost.LIBTPU_ENVIRONMENT):
    found = topologies.get_topology_desc(
        platform='tpu', topology_name=f'{chip}:{SHAPES[count]}', **extra)
  return work_lib.Shapes(jax.sharding.Mesh(
      np.asarray(found.devices).reshape(-1, model),
      (devices.DATA, devices.MODEL)))


@functools.cache
def capacity(chip: str) -> float:
  """Bytes of a chip's memory that programs can have, as its compiler says."""
  # By asking for what no chip has.
  too_much = layout(chip, 1).abstract(
      jax.ShapeDtypeStruct((2**40,), jnp.float32))
  try:
    jax.jit(jnp.sin).trace(too_much).lower(
        lowering_platforms=('tpu',)).compile(compiler_options=_QUICKLY)
  except jax.errors.JaxRuntimeError as error:
    if there := _THERE.search(str(error)):
      return float(there[1]) * _UNITS[there[2]]
    raise
  raise ValueError(f'{chip}: its compiler says of 4 TB that they fit')


def cost(function: Any, shapes: Any, count: int) -> Cost:
  """Compiles a jitted function for so many chips, in a hurry (`_QUICKLY`).

  Args:
    function: jitted.
    shapes: what it takes: of `work.Shapes`.
    count: chips.
  """
  # What JAX looks at to choose between a CPU's ways and those of others.
  with mock.patch.object(jax, 'default_backend', lambda: 'tpu'):
    traced = function.trace(*shapes)
    lowered = traced.lower(lowering_platforms=('tpu',))
  work = flops.of(traced.jaxpr)
  try:
    compiled = lowered.compile(compiler_options=_QUICKLY)
  except jax.errors.JaxRuntimeError as error:
    if not (lacking := memory.refusal(error)):
      raise
    return Cost(None, lacking, work)
  return Cost(memory.need_of(compiled), '', work,
              tuple(collectives.of(compiled.as_text(), count)))
