"""Steps of many chips, compiled for TPUs that are not there.

Needs libtpu; run by `make aot`, the dearest by `make test-long`.
"""

import dataclasses
import functools
import math

import jax
import pytest

from benchmarks import planned
from benchmarks import slices
from benchmarks import work as work_lib
from configs import flux_schnell
from configs import imagenet256
from msfp_jax.base import devices

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures('uncached')]


@pytest.fixture(scope='module', autouse=True)
def libtpu():
  pytest.importorskip('libtpu', reason='it compiles for such chips')


@pytest.mark.long
def test_what_fine_tuning_sums_are_gradients_of_kernels():
  """On 8 chips the weights are on each, and each has 2 of 16 images.

  What is trained follows from the gradients of the kernels that have banks,
  and of ranges: XLA sums those.
  """
  work = dataclasses.replace(
      planned.STEPS['LDM fine-tuning'],
      config=functools.partial(imagenet256.get_config, 'smoke'))
  task = work_lib.task_of(work, 8)
  assert task.batch == 16
  banked = sum(4 * math.prod(task.experiment.job.kernels[name].shape)
               for name, layer in task.experiment.spec.layers.items()
               if layer.weight.bits == 4)
  one, eight = (planned.cost(work, 'v5e', count) for count in (1, 8))
  assert one.exchanged == () and one.sent == 0
  sums = [part for part in eight.exchanged if part.kind == 'all-reduce']
  assert {part.group for part in sums} == {8}
  assert banked <= sum(part.size for part in sums) < 1.1 * banked
  # Banks are merged once, whatever the batch.
  assert eight.flops == pytest.approx(8 * one.flops, rel=0.01)
  assert eight.need.kept == pytest.approx(one.need.kept, rel=0.01)


def test_chips_that_share_weights_hold_less_of_them(monkeypatch):
  """And give each other what one of them does not have."""
  monkeypatch.setattr(devices, '_LARGE', 128)
  work = dataclasses.replace(
      planned.STEPS['FLUX sampling'],
      config=functools.partial(flux_schnell.get_config, 'smoke'))
  one, eight = (planned.cost(work, 'v6e', count) for count in (1, 8))
  assert one.sent == 0 < eight.sent
  packed = work_lib.task_of(work, 1).experiment.packed
  shared = sum(
      leaf.nbytes for leaf in jax.tree.leaves(packed.arrays)
      if leaf.ndim > 1 and leaf.size >= 128 and leaf.shape[-1] % 8 == 0)
  # Chips store arrays in tiles: small ones take more than their bytes.
  assert one.need.kept - eight.need.kept > 0.5 * 7 / 8 * shared > 0


def test_a_chip_has_the_memory_that_its_compiler_says():
  assert 15.5 < slices.capacity('v5e') / 2**30 < 16
  assert 31 < slices.capacity('v6e') / 2**30 < 32


def test_a_slice_that_there_is_not_is_refused():
  for chip, count, model in (('v9', 8, 1), ('v5e', 7, 1), ('v5e', 8, 3),
                             ('v5e', 8, 0)):
    with pytest.raises(ValueError, match='must be one of'):
      slices.layout(chip, count, model)
