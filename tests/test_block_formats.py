"""Block formats by their standards' own words, in ml_dtypes and NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from msfp_jax.quant import block
from msfp_jax.quant import block_formats
from msfp_jax.quant import quantizers
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat

pytestmark = pytest.mark.optimized

E2M1 = FPFormat.parse('E2M1')
F4, E4M3, E8M0 = (ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn,
                  ml_dtypes.float8_e8m0fnu)


def rows(seed=0):
  """Groups of 32, among them those on which implementations go wrong."""
  x = np.random.default_rng(seed).normal(size=(64, 96)).astype(np.float32)
  x *= np.exp2(np.random.default_rng(seed + 1).integers(-12, 12, (64, 1)))
  x[0] = 0  # an all-zero row, and groups of zeros in others
  x[1:4, 16:48] = 0
  x[4, :32] = 1e-38  # scales that are subnormal, or 0
  x[5, 32:64] = 3e38
  x[6, :16] = np.float32([6, -6, 5, 3.5, 2.5, 1.75, 1.25, .75, .25, 0, -0.0,
                          .5, 4.99, 5.01, -5, 7e-3])
  return x


def nvfp4(x):
  """NVIDIA's rules, group by group: (values, scales, scale of the tensor)."""
  outer = np.float32(np.abs(x).max() / np.float32(6) / np.float32(448))
  groups = x.reshape(len(x), -1, 16)
  largest = np.abs(groups).max(-1, keepdims=True)
  scale = (largest / np.float32(6) / outer).astype(np.float32)
  scale = np.minimum(scale, 448).astype(E4M3)
  divisor = scale.astype(np.float32) * outer
  with np.errstate(divide='ignore', invalid='ignore'):
    u = np.where(divisor > 0, groups / divisor, 0)
  # e2m1 has no infinity, and ml_dtypes rounds to even.
  values = np.clip(u, -6, 6).astype(F4).astype(np.float32)
  return values.reshape(x.shape), scale[..., 0], outer


def test_nvfp4_element_for_element():
  x = rows()[[0, 1, 2, 3, 6, 10, 11, 12, 13]]
  tensor = block_formats.nvfp4(4).quantize(x[None]).bank(0)  # one image
  values, scale, outer = nvfp4(x)
  # JAX and NumPy may disagree by one rounding on amax / 6 / outer, which shows
  # only where that is a tie of e4m3: none here.
  np.testing.assert_array_equal(np.float32(tensor.scale), np.float32(scale))
  np.testing.assert_array_equal(tensor.levels(), values)
  np.testing.assert_allclose(tensor.outer, outer, rtol=1e-7)
  assert tensor.nbits == x.size * 4 + x.size // 16 * 8 + 32
  assert (np.float32(scale) == 448).any()


def test_small_groups_beside_a_large_one_lose_their_scale():
  """e4m3 reaches down to 2^-9: what is below is 0, and no NaN."""
  x = np.ones((1, 48), np.float32)  # of which the scale is 448
  x[0, 16:32] = 2.0**-9 / 448
  x[0, 32:] = 2.0**-11 / 448
  tensor = block_formats.nvfp4(4).quantize(x)
  np.testing.assert_array_equal(
      np.float32(tensor.scale), [[448, 2.0**-9, 0]])
  assert np.isfinite(tensor.dequantize()).all()


def test_without_a_second_level_large_scales_stop_at_448():
  tensor = Block(E2M1, 'group', 16, 'e4m3').quantize(
      np.full((1, 16), 1e6, np.float32))
  np.testing.assert_array_equal(np.float32(tensor.scale), [[448]])
  np.testing.assert_array_equal(tensor.dequantize(), np.full((1, 16), 6 * 448))


# Where a group's largest magnitude lies on the scale of E2M1, from and to.
ENDS = {'floor': (4, 8), 'ceil': (2, 4), 'rceil': (3, 6), 'even': (3.5, 7)}


@pytest.mark.parametrize('fmt', ['E2M1', 'E3M0', 'E4M3'])
@pytest.mark.parametrize('rule', ENDS)
def test_powers_of_two_by_rule(rule, fmt):
  """By logarithms in float64, as OCP MX and its users write the rules."""
  fmt = FPFormat.parse(fmt)
  reach = np.exp2(np.random.default_rng(0).uniform(-30, 30, 500))
  reach = np.r_[reach, 2.0**np.arange(-5, 5), fmt.max, fmt.max / 2,
                fmt.max * 1.01, fmt.max / 1.01].astype(np.float32)
  top = np.floor(np.log2(fmt.max))
  rounded = np.float64(reach).copy()
  if rule == 'even':  # to the format's own digits, halves up
    unit = np.exp2(np.floor(np.log2(rounded)) - fmt.mantissa_bits)
    rounded = np.floor(rounded / unit + 0.5) * unit
  power = {'floor': np.floor(np.log2(rounded)) - top,
           'even': np.floor(np.log2(rounded)) - top,
           'ceil': np.ceil(np.log2(rounded)) - top,
           'rceil': np.ceil(np.log2(rounded / fmt.max))}[rule]
  tensor = quantizers.quantize(
      Block(fmt, 'token', 0, 'e8m0', rule=rule), reach[:, None], -1)
  np.testing.assert_array_equal(
      np.float32(tensor.scale)[:, 0], np.exp2(power))
  if fmt == E2M1:
    places = reach / np.exp2(power)
    low, high = ENDS[rule]
    assert places.min() >= low and places.max() <= high


def test_even_is_the_overflow_aware_rule():
  """floor(log2(largest / 6 * 12 / 7)) of arXiv 2603.08713, for E2M1."""
  reach = np.random.default_rng(0).uniform(1e-3, 1e3, 1000).astype(np.float32)
  power = np.floor(np.log2(np.float64(reach) / 6 * 12 / 7))
  tensor = block_formats.mxfp4(4, 'even').quantize(reach[:, None])
  np.testing.assert_array_equal(np.float32(tensor.scale)[:, 0],
                                np.exp2(power))


@pytest.mark.parametrize('shared, group', [('group', 32), ('token', 0)])
def test_the_optimal_power_loses_least_of_all(shared, group):
  """No rule's error is smaller in any group; -2 to 2 powers are tried."""
  x = np.random.default_rng(0).normal(size=(50, 80)).astype(np.float32)

  def errors(quantizer):
    back = quantizers.quantize(quantizer, x, -1).dequantize()
    squares = (np.float64(back) - x)**2
    parts = np.split(squares, [32, 64], 1) if group else [squares]
    return np.stack([part.sum(1) for part in parts])

  best = errors(Block(E2M1, shared, group, 'e8m0', rule='optimal'))
  for rule in ENDS:
    other = errors(Block(E2M1, shared, group, 'e8m0', rule=rule))
    assert (best <= other * (1 + 1e-6)).all()
  assert (best < other).any()


@pytest.mark.parametrize('name, bits', [
    # 4, a scale of 16 bits for 64, of 8 for 32 and for 16; twice 16 for 64.
    ('int_group', 4.25), ('mxfp4', 4.25), ('nvfp4', 4.5 + 32 / 4096),
    ('int_minmax', 4.5)])
def test_bits_of_an_element(name, bits):
  tensor = getattr(block_formats, name)(4).quantize(
      np.random.default_rng(0).normal(size=(1, 64, 64)).astype(np.float32))
  assert tensor.nbits == bits * 4096


def test_integers_of_a_group():
  """Symmetric ones go from -7 to 7, the others from minimum to maximum."""
  x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
  tensor = block_formats.int_group(4).quantize(x)
  scale = (np.abs(x).max(1, keepdims=True) / np.float32(7)).astype(
      ml_dtypes.bfloat16).astype(np.float64)
  np.testing.assert_allclose(
      tensor.dequantize(), np.clip(np.rint(x / scale), -7, 7) * scale,
      rtol=1e-5)
  tensor = block_formats.int_minmax(4).quantize(x)
  low = np.float64(x.min(1, keepdims=True).astype(ml_dtypes.bfloat16))
  scale = np.float64(((x.max(1, keepdims=True) - np.float32(low)) / np.float32(
      15)).astype(ml_dtypes.bfloat16))
  np.testing.assert_allclose(
      tensor.dequantize(),
      np.clip(np.rint((x - low) / scale), 0, 15) * scale + low, rtol=1e-5,
      atol=1e-5)
  assert tensor.scale.dtype == tensor.zero_point.dtype == jnp.bfloat16


@pytest.mark.parametrize('zero', [-0.25, 0.0])
def test_one_zero_point_for_all_groups(zero):
  """What lies below it becomes it; scales reach from it to the maximum."""
  x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
  x[2] = -1.0  # a group with nothing above it
  quantizer = Block(FPFormat.parse('UE1M3'), 'token', zero_point=zero)
  tensor = quantizer.quantize(x)
  back = np.asarray(tensor.dequantize())
  assert (back[x <= zero] == np.float32(zero)).all()
  above = x[:2] > zero
  step = (x[:2].max(1, keepdims=True) - zero) / 15
  np.testing.assert_array_less(
      np.abs(back - x)[:2][above],
      np.broadcast_to(step / 2 * 1.0001, above.shape)[above])
  # No zero point is stored where it is 0.
  assert (tensor.zero_point is None) == (zero == 0)
  np.testing.assert_array_equal(
      jax.jit(quantizer.fake_quant)(x), back)


def test_every_rule_is_known():
  assert set(ENDS) | {'optimal'} == set(block.RULES)
