"""What the device at hand runs packed layers by, against float64.

On a CPU that is XLA; on a chip with kernels of its own, those.
"""

import jax
from kernel_cases import Case
from kernel_cases import conv_case
from kernel_cases import prepared
import numpy as np
import pytest

from benchmarks import hopper_checks
from msfp_jax.kernels import choice
from msfp_jax.quant import numbers as numbers_lib

pytestmark = pytest.mark.gpu
SIGNED = numbers_lib.formats_of_width(4, signed=True)
ALL = SIGNED + numbers_lib.formats_of_width(4, signed=False)


def cases(weight, act):
  """A product and a convolution, with zero points where formats have them."""
  zero = None if act.signed else -0.3
  yield Case((70, 96), (96, 80), weight, act, act_zero=zero)
  yield conv_case((2, 8, 8, 64), (3, 3, 64, 64), weight, act, act_zero=zero,
                  padding=1)


def bound(case, layer):
  """As tests of XLA's carriers have it; Hopper's sums in fp8 have their own."""
  kernel = choice.KERNELS.get(jax.default_backend())
  carrier = choice.pick_carrier(layer, case.x.shape, kernel or 'xla')
  rounding = 2.0**-24 * (2 * case.length + 8)
  if carrier == 'fp8':
    rounding += hopper_checks.fp8_bound(case.length)
  return rounding * case.span


@pytest.mark.slow
@pytest.mark.parametrize('weight', SIGNED, ids=str)
def test_every_pair_of_formats(weight):
  for act in ALL:
    for case in cases(weight, act):
      layer = prepared(case.packed)
      # Not jitted: on a CPU the cases share their operations.
      actual = np.asarray(case.apply(case.x, layer))
      assert (np.abs(actual - case.expected)
              <= bound(case, layer)).all(), act
