"""Products with scales of every kind, against float64."""

import functools

import jax.numpy as jnp
from kernel_cases import Case
from kernel_cases import conv_case
from kernel_cases import jit
import kernel_oracle
import numpy as np
import pytest

from msfp_jax.kernels import product
from msfp_jax.quant import geometry as geometry_lib
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantizers import Static

pytestmark = [pytest.mark.gpu, pytest.mark.optimized]

SIGNED, UNSIGNED = FPFormat.parse('E2M1'), FPFormat.parse('UE2M2')
INT = FPFormat.parse('UE1M3')
NVFP4 = Block(SIGNED, group=16, scale_type='e4m3', two_level=True)
MXFP4 = Block(SIGNED, group=32, scale_type='e8m0')
STATIC = Static(UNSIGNED, np.float32(0.4), np.float32(-0.3))
PAIRS = {  # of inputs, of weights; of 24 channels
    'static, by channel': (STATIC, Block(SIGNED, 'channel')),
    'static, tensor': (Static(SIGNED, np.float32(0.5)),
                       Static(SIGNED, np.float32(0.5))),
    'tensors from the data': (Block(UNSIGNED, 'tensor'),
                              Block(SIGNED, 'tensor')),
    'images': (Block(SIGNED, 'image'), Block(SIGNED, 'channel')),
    'images with zero points': (Block(INT, 'image'), Block(INT, 'channel')),
    'tokens': (Block(SIGNED, 'token'), Block(SIGNED, 'channel')),
    'tokens with zero points': (Block(INT, 'token'), Block(INT, 'channel')),
    'groups of 8': (Block(SIGNED, group=8), Block(SIGNED, group=8)),
    'groups of 16, the last shorter': (
        Block(SIGNED, group=16), Block(SIGNED, group=16)),
    'groups with zero points': (Block(INT, group=8), Block(INT, group=16)),
    'groups with zero points, the last shorter': (
        Block(UNSIGNED, group=10), Block(INT, group=15)),
    'groups of inputs alone': (Block(SIGNED, group=8),
                               Block(SIGNED, 'channel')),
    'groups of weights alone': (STATIC, Block(SIGNED, group=16)),
    'tokens, groups of weights': (Block(INT, 'token'), Block(SIGNED, group=8)),
    'rows of weights': (STATIC, Block(INT, 'token')),
    'NVFP4': (NVFP4, NVFP4),
    'MXFP4': (MXFP4, MXFP4),
    'e4m3 without a second level': (
        Block(SIGNED, group=8, scale_type='e4m3'), Block(SIGNED, 'channel')),
    '8 bits': (Block(FPFormat.parse('E4M3'), 'token'),
               Block(FPFormat.parse('E4M3'), group=16)),
}
GEOMETRIES = {
    'dense': lambda **options: Case(
        (2, 3, 24), (24, 5), 'E2M1', None, **options),
    '1x1, strides': lambda **options: conv_case(
        (2, 5, 4, 24), (1, 1, 24, 5), 'E2M1', None, strides=2, **options),
    '3x3, borders': lambda **options: conv_case(
        (2, 5, 4, 24), (3, 3, 24, 5), 'E2M1', None, padding=1, **options),
    '3x3, strides': lambda **options: conv_case(
        (2, 6, 5, 24), (3, 3, 24, 5), 'E2M1', None, padding=(0, 1), strides=2,
        **options),
    '3x3, dilation': lambda **options: conv_case(
        (2, 6, 5, 24), (3, 3, 24, 5), 'E2M1', None, padding=2, dilation=2,
        **options),
}
WAYS = [('reference', 'f32'), ('xla', 'f32'), ('xla', 'bf16'), ('xla', 'int8')]


EVERYWHERE = ('images with zero points', 'tokens with zero points',
              'groups with zero points, the last shorter',
              'groups of weights alone', 'static, by channel')
WITH_DILATION = EVERYWHERE[1:3]
QUICK = EVERYWHERE[2:]  # at borders
DENSE = (*EVERYWHERE, 'NVFP4', 'MXFP4', '8 bits', 'rows of weights')


def each(case, x, *layers, **options):
  return [case.apply(x, layer, **options) for layer in layers]


@pytest.mark.parametrize('name, geometry', [
    pytest.param(name, geometry, marks=(
        () if name in QUICK and geometry == '3x3, borders'
        else pytest.mark.long if geometry == 'dense' and name not in DENSE
        else pytest.mark.slow))
    for name in PAIRS for geometry in GEOMETRIES
    if geometry in ('dense', '3x3, borders') or name in (
        WITH_DILATION if geometry == '3x3, dilation' else EVERYWHERE)])
def test_every_kind_of_scale(name, geometry):
  """Every way is within 1e-6 of float64; packed is not packed, bit for bit."""
  inputs, weights = PAIRS[name]
  case = GEOMETRIES[geometry](inputs=inputs, weights=weights)
  for implementation, carrier in WAYS:
    if carrier == 'int8' and name == '8 bits':
      continue
    simulated, packed = jit(functools.partial(
        each, case, implementation=implementation, carrier=carrier))(
            case.x, case.layer, case.packed)
    case.assert_close(simulated, rtol=1e-6)
    np.testing.assert_array_equal(packed, simulated)


@pytest.mark.parametrize('name', ['groups with zero points', 'NVFP4'])
def test_a_program_computes_what_its_parts_do(name):
  """Compiled as one, a layer is within 1e-6 of float64 too."""
  inputs, weights = PAIRS[name]
  case = GEOMETRIES['3x3, borders'](inputs=inputs, weights=weights)
  case.assert_close(case.run(implementation='reference'))
  case.assert_close(case.run())


def test_groups_of_channels_with_groups_of_scales():
  """A grouped convolution with scales inside of its sums is computed, too."""
  case = conv_case((1, 4, 4, 16), (3, 3, 8, 6), 'E2M1', None, padding=1,
                   groups=2, inputs=Block(SIGNED, group=4),
                   weights=Block(SIGNED, group=4))
  for layer in (case.layer, case.packed):
    case.assert_close(case.apply(case.x, layer))


def test_sums_inside_count_the_taps_that_see_the_image():
  """At a border the sum of weights is that of the taps inside."""
  sums = np.random.default_rng(0).integers(-9, 9, (3, 3, 4)).astype(np.float32)
  geometry = geometry_lib.resolve((1, 5, 4, 7), (3, 3), 2, ((1, 2), (0, 1)))
  expected = kernel_oracle.conv(
      np.ones((1, 5, 4, 1)), sums[..., None, :], geometry.strides,
      geometry.padding, geometry.dilation)[0]
  np.testing.assert_array_equal(
      product.sums_inside(jnp.asarray(sums), geometry, (5, 4)), expected)
