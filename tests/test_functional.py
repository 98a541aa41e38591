"""Fake quantizers: rounding, saturation, gradients, encode and decode."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from msfp_jax.quant import functional
from msfp_jax.quant.functional import decode
from msfp_jax.quant.functional import encode
from msfp_jax.quant.functional import fake_quant
from msfp_jax.quant.functional import nearest_level
from msfp_jax.quant.numbers import formats_of_width
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.numbers import int_format

pytestmark = pytest.mark.gpu

ALL = [f for bits in range(3, 9) for signed in (True, False)
       for f in formats_of_width(bits, signed)]
# Of the odd widths, which share all code with the even ones, one is quick.
MOST = [pytest.param(fmt, id=str(fmt), marks=[pytest.mark.slow] * (
    fmt.bits in (3, 7))) for fmt in ALL]
FOUR_BITS = formats_of_width(4, True) + formats_of_width(4, False)
TWINS = {'E2M1': ml_dtypes.float4_e2m1fn, 'E2M3': ml_dtypes.float6_e2m3fn,
         'E3M2': ml_dtypes.float6_e3m2fn}


def nearest(u, fmt):
  """Rounds to levels, with a scale of 1."""
  return nearest_level(u, fmt, 1.0)


def rng():
  return np.random.default_rng(0)


def assert_same_bits(actual, desired):
  actual, desired = np.asarray(actual), np.asarray(desired)
  assert (actual.dtype, actual.shape) == (desired.dtype, desired.shape)
  bits = f'u{actual.dtype.itemsize}'
  np.testing.assert_array_equal(actual.view(bits), desired.view(bits))


def log_uniform(fmt, size):
  """Draws both signs, from far below the smallest level to past the largest."""
  low = np.log2(fmt.levels()[fmt.levels() > 0][0]) - 3
  magnitude = 2.0**rng().uniform(low, np.log2(fmt.max) + 1, size)
  return (magnitude * rng().choice([-1, 1], size)).astype(np.float32)


def brute_force(u, fmt):
  """Finds the nearest level in float64, and whether another is as near."""
  levels = fmt.levels()
  u = np.clip(np.asarray(u, np.float64), fmt.lowest, fmt.max)
  distance = np.abs(u[..., None] - levels)
  two = np.sort(distance, axis=-1)[..., :2]
  return levels[distance.argmin(-1)], two[..., 0] == two[..., 1]


def affine_case(fmt):
  """Draws x `[64, 5]`, and scales and zero points per column."""
  x = (3 * rng().normal(size=(64, 5))).astype(np.float32)
  scale = (rng().uniform(2, 8, 5) / fmt.max).astype(np.float32)
  zero_point = rng().uniform(-1, 1, 5).astype(np.float32)
  return x, scale, None if fmt.signed else zero_point


@pytest.mark.parametrize('fmt', ALL, ids=str)
def test_nearest_is_the_nearest_level(fmt):
  u = log_uniform(fmt, 2000)
  expected, tied = brute_force(u, fmt)
  assert tied.sum() < 50
  np.testing.assert_array_equal(
      np.asarray(nearest(u, fmt))[~tied], expected[~tied])


@pytest.mark.parametrize('fmt', ALL, ids=str)
def test_ties_go_to_the_even_mantissa(fmt):
  magnitudes = fmt.values()[:2**(fmt.bits - fmt.signed)]
  low, high = magnitudes[:-1], magnitudes[1:]
  middle = ((low + high) / 2).astype(np.float32)
  code = np.arange(len(low))
  # No mantissa, none is even: up, but to 0 below the lowest power of two.
  to_low = code % 2 == 0 if fmt.mantissa_bits else code == 0
  expected = np.where(to_low, low, high).astype(np.float32)
  assert_same_bits(nearest(middle, fmt), expected)
  assert_same_bits(nearest(np.nextafter(middle, np.float32(0)), fmt),
                   low.astype(np.float32))
  assert_same_bits(nearest(np.nextafter(middle, np.float32(np.inf)), fmt),
                   high.astype(np.float32))
  if fmt.signed:
    assert_same_bits(nearest(-middle, fmt), -expected)


@pytest.mark.parametrize('name', TWINS)
def test_agrees_with_ml_dtypes_on_every_float16(name):
  # ml_dtypes saturates too, inf included; it maps NaN to -0, we keep it.
  x = np.arange(2**16, dtype=np.uint16).view(np.float16)
  assert np.isnan(nearest(x[np.isnan(x)], name)).all()
  x = x[~np.isnan(x)]
  assert_same_bits(nearest(x, name), x.astype(TWINS[name]).astype(np.float32))
  codes = encode(x, name, 1.0)
  assert_same_bits(codes, x.astype(TWINS[name]).view(np.uint8))


@pytest.mark.parametrize('name', TWINS)
def test_agrees_with_ml_dtypes_on_float32(name):
  x = rng().normal(size=(8, 4096)) * 4.0**np.arange(-5, 3)[:, None]
  x = x.astype(np.float32)
  assert_same_bits(nearest(x, name), x.astype(TWINS[name]).astype(np.float32))


def test_powers_of_two_tie_as_in_ml_dtypes():
  power = 2.0**np.arange(-12, 13)
  x = np.concatenate([power, 1.5 * power, 1.49 * power, 1.51 * power])
  x = x.astype(np.float32)
  theirs = x.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
  assert_same_bits(nearest(x, 'UE5M0'), theirs)


@pytest.mark.parametrize('fmt', MOST)
def test_ends_and_special_values(fmt):
  top, low = np.float32(fmt.max), np.float32(fmt.lowest)
  huge = np.finfo(np.float32).max
  tiny = np.float32(1e-45)
  x = np.array([top, np.nextafter(top, huge), huge, np.inf,
                -top, -huge, -np.inf, tiny, 0], np.float32)
  expected = np.array([top] * 4 + [low] * 3 + [0, 0], np.float32)
  assert_same_bits(nearest(x, fmt), expected)
  zero = np.float32(-0.0 if fmt.signed else 0.0)
  for x in -0.0, -tiny:
    assert_same_bits(nearest(np.float32(x), fmt), zero)
  assert np.isnan(nearest(np.array([np.nan, -np.nan], np.float32), fmt)).all()


@pytest.mark.parametrize('fmt', FOUR_BITS, ids=str)
def test_fake_quant_is_its_formula(fmt):
  x, scale, zero_point = affine_case(fmt)
  for z in zero_point, rng().normal(size=(64, 1)).astype(np.float32):
    shift = 0 if z is None else z.astype(np.float64)
    u = (x - shift) / scale
    q, tied = brute_force(u, fmt)
    assert not tied.any()
    y = fake_quant(x, fmt, scale, z)
    assert (y.dtype, y.shape) == (jnp.float32, x.shape)
    np.testing.assert_allclose(y, scale * q + shift, rtol=3e-7, atol=1e-6)


@pytest.mark.optimized
def test_division_is_exact_so_that_ties_stay_ties():
  ties = np.array([.25, .75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)[:, None]
  scale = rng().uniform(.01, 3, 4000).astype(np.float32)
  x = ties * scale
  fmt = FPFormat(2, 1)
  # float4_e2m1fn of NumPy's division, which is correctly rounded.
  q = (x / scale).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
  assert_same_bits(fake_quant(x, fmt, scale), q * scale)
  closed = jax.jit(lambda x: fake_quant(x, fmt, scale))
  assert_same_bits(closed(x), q * scale)
  for i in range(5):
    s = float(scale[i])
    column = jnp.asarray(ties * scale[i])
    expected = (np.asarray(column) / scale[i]).astype(ml_dtypes.float4_e2m1fn)
    expected = expected.astype(np.float32) * scale[i]
    assert_same_bits(fake_quant(column, fmt, s), expected)
    assert_same_bits(jax.jit(lambda x, s=s: fake_quant(x, fmt, s))(column),
                     expected)


@pytest.mark.parametrize('zero_point', [0, 0.0, None])
def test_no_zero_point_keeps_negative_zero(zero_point):
  y = fake_quant(np.float32(-.01), 'E2M1', .5, zero_point)
  assert_same_bits(y, np.float32(-0.0))


def test_nan_and_inf_pass_scale_and_zero_point():
  x = np.array([np.nan, np.inf, -np.inf], np.float32)
  y = np.asarray(fake_quant(x, 'UE2M2', .5, -.25))
  np.testing.assert_array_equal(y, [np.nan, 3.25, -.25])
  y = fake_quant(np.ones(3, np.float32), 'E2M1', jnp.float32(np.nan))
  assert np.isnan(y).all()


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
  x = jnp.asarray(rng().normal(size=512), dtype)
  wide = fake_quant(x.astype(jnp.float32), 'UE2M2', .3, -.4)
  assert_same_bits(fake_quant(x, 'UE2M2', .3, -.4), wide.astype(dtype))
  assert_same_bits(decode(encode(x, 'UE2M2', .3, -.4), 'UE2M2', .3, -.4, dtype),
                   wide.astype(dtype))
  dx = jax.grad(lambda x: fake_quant(x, 'E2M1', .3).sum().astype(jnp.float32))
  assert dx(x).dtype == dtype


@pytest.mark.parametrize('bits', range(3, 9))
def test_one_exponent_bit_is_int_quantization(bits):
  x = rng().normal(size=3000).astype(np.float32)
  z, scale = np.float32(-1.3), np.float32(.37)
  step = float(scale) * 2.0**(2 - bits)
  k = np.clip(np.rint((x - float(z)) / step), 0, 2**bits - 1)
  np.testing.assert_allclose(
      fake_quant(x, int_format(bits), scale, z),
      k * step + float(z), atol=1e-6)
  np.testing.assert_array_equal(
      encode(x, int_format(bits), scale, z), k)
  step, top = 2 * step, 2**(bits - 1) - 1
  k = np.clip(np.rint(x / step), -top, top)
  np.testing.assert_allclose(
      fake_quant(x, FPFormat(1, bits - 2), scale), k * step, rtol=3e-7)


@pytest.mark.parametrize('fmt', MOST)
def test_encode_gives_the_code_of_the_level(fmt):
  values = fmt.values().astype(np.float32)
  codes = encode(values, fmt, 1.0)
  assert_same_bits(codes, np.arange(2**fmt.bits, dtype=np.uint8))
  assert_same_bits(decode(codes, fmt, 1.0), values)


@pytest.mark.optimized
@pytest.mark.parametrize('fmt', MOST)
def test_decode_of_encode_is_fake_quant_bit_for_bit(fmt):
  x, scale, zero_point = affine_case(fmt)
  if zero_point is not None:  # see decode: what is asked of the scale
    scale = np.asarray(functional.snap_scale(scale))
  x[0] = 0, -0.0, np.inf, -np.inf, 1e-30
  both = lambda x, *a: (
      fake_quant(x, fmt, *a), decode(encode(x, fmt, *a), fmt, *a))
  expected, decoded = jax.jit(both)(x, scale, zero_point)
  assert_same_bits(decoded, expected)
  if fmt.bits in (4, 8):  # Compilation takes its time.
    for eager in both(x, scale, zero_point):
      assert_same_bits(eager, expected)


@pytest.mark.optimized
def test_snapped_scale_makes_the_products_exact():
  scale = np.exp(rng().uniform(-9, 9, 200)).astype(np.float32)
  snapped = np.asarray(functional.snap_scale(scale))
  assert_same_bits(jax.jit(functional.snap_scale)(scale), snapped)
  assert (snapped != scale).any()
  assert (np.abs(snapped / scale.astype(np.float64) - 1) <= 2.0**-16).all()
  for fmt in ALL:
    levels = fmt.levels().astype(np.float32)
    product = levels * snapped[:, None]
    exact = levels.astype(np.float64) * snapped[:, None]
    np.testing.assert_array_equal(product, exact)


@pytest.mark.optimized
@pytest.mark.parametrize('fmt', FOUR_BITS, ids=str)
def test_snapped_scale_leaves_no_choice_to_the_compiler(fmt):
  x, scale, _ = affine_case(fmt)
  zero_point = rng().normal(size=5).astype(np.float32)
  scale = functional.snap_scale(scale)
  q = fmt.values()[np.asarray(encode(x, fmt, scale, zero_point))]
  expected = q.astype(np.float32) * np.asarray(scale) + zero_point
  assert_same_bits(fake_quant(x, fmt, scale, zero_point), expected)


def test_snap_scale_has_gradient_one():
  scale = jnp.array([.1, .3, 7.])
  gradient = jax.grad(lambda s: (functional.snap_scale(s) * scale).sum())
  np.testing.assert_array_equal(gradient(scale), scale)


@pytest.mark.parametrize('name', ['E2M1', 'UE2M2'])
@pytest.mark.parametrize('scale_shape, zero_shape', [
    ((), None), ((), ()), ((5,), (5,)), ((1, 5), (64, 1)), ((64, 5), ()),
    ((2, 1, 1), (64, 5))])
def test_gradients_are_the_written_formulas(name, scale_shape, zero_shape):
  fmt, r = FPFormat.parse(name), rng()
  x = 3 * r.normal(size=(2, 64, 5)).astype(np.float32)
  g = r.normal(size=x.shape).astype(np.float32)
  scale = (r.uniform(2, 4, scale_shape) / fmt.max).astype(np.float32)
  zero = None if zero_shape is None else r.normal(size=zero_shape).astype('f4')
  u = (x - (0 if zero is None else zero)) / scale
  q, tied = brute_force(u, fmt)
  inside = (u >= fmt.lowest) & (u <= fmt.max)
  assert not tied.any() and .1 < inside.mean() < .95

  def transposed_broadcast(full, shape):
    padded = (1,) * (full.ndim - len(shape)) + shape
    axes = tuple(i for i, n in enumerate(padded) if n == 1)
    return full.sum(axes).reshape(shape)

  _, pullback = jax.vjp(lambda *a: fake_quant(a[0], fmt, *a[1:]), x, scale,
                        zero)
  dx, dscale, dzero = pullback(jnp.asarray(g))
  np.testing.assert_array_equal(dx, np.where(inside, g, 0))
  expected = transposed_broadcast(g * np.where(inside, q - u, q), scale.shape)
  np.testing.assert_allclose(dscale, expected, rtol=1e-4, atol=1e-4)
  if zero is not None:
    expected = transposed_broadcast(g * ~inside, zero.shape)
    np.testing.assert_allclose(dzero, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('fmt', FOUR_BITS, ids=str)
def test_gradients_are_differences_with_the_rounding_held(fmt):
  # Straight-through: nearest(u) is clip(u) plus a constant, the rounding error.
  x = np.array([-2.9, -1.3, -.61, -.13, .17, .57, 1.41, 3.7])
  scale, zero, h = 1.9 / fmt.max, -.27, 1e-6
  u = (x - zero) / scale
  error = brute_force(u, fmt)[0] - np.clip(u, fmt.lowest, fmt.max)

  def held(x, scale, zero):
    clipped = np.clip((x - zero) / scale, fmt.lowest, fmt.max)
    return scale * (clipped + error) + zero

  point = (x, np.full(8, scale), np.full(8, zero))
  summed = lambda *a: fake_quant(a[0], fmt, *a[1:]).sum()
  actual = jax.grad(summed, (0, 1, 2))(*(a.astype(np.float32) for a in point))
  for i in range(3):
    up, down = list(point), list(point)
    up[i], down[i] = point[i] + h, point[i] - h
    difference = (held(*up) - held(*down)) / (2 * h)
    np.testing.assert_allclose(actual[i], difference, rtol=1e-4, atol=1e-4)


def test_nan_reaches_the_gradients():
  loss = lambda x, s: (fake_quant(x, 'E2M1', s)**2).sum()
  dx, dscale = jax.grad(loss, (0, 1))(jnp.array([1., np.nan]), .5)
  np.testing.assert_array_equal(dx, [2, np.nan])
  assert np.isnan(dscale)


def test_vmap_over_scales_is_a_loop_over_scales():
  x = rng().normal(size=(64, 3)).astype(np.float32)
  scales = jnp.array([.1, .3, .7])
  looped = jnp.stack([fake_quant(x, 'E2M1', s) for s in scales])
  assert_same_bits(jax.vmap(lambda s: fake_quant(x, 'E2M1', s))(scales), looped)


@pytest.mark.parametrize('name', ['E2M1', 'UE2M2'])
@pytest.mark.parametrize('size', [0, 1, 4, 5, 9])
def test_pieces_are_parts_of_the_whole(monkeypatch, name, size):
  """Weights quantized in pieces, the last not full, have all their levels."""
  monkeypatch.setattr(functional, '_PIECE', 4)
  x = rng().normal(size=(size, 3)).astype(np.float32)
  scale = np.float32([[.3, .5, .7]])
  zero_point = np.float32([[-.1, -.2, -.3]]) if name[0] == 'U' else None
  levels = functional.nearest_level_in_pieces(x, name, scale, zero_point)
  assert isinstance(levels, np.ndarray)
  assert_same_bits(levels, nearest_level(x, name, scale, zero_point))


@pytest.mark.parametrize('function', [fake_quant, encode, nearest_level])
@pytest.mark.parametrize('arguments, error, message', [
    ((np.arange(3), 'E2M1', 1.), TypeError, 'floating point, got int32'),
    ((np.ones(3), 'fp4', 1.), ValueError, "'fp4' is no number format"),
    ((np.ones(3), 'UE8M0', 1.), ValueError, r'UE8M0 reaches 2\^128'),
    ((np.ones(3), 'E2M1', 0.), ValueError, 'scale must be positive, got 0.0'),
    ((np.ones(3), 'E2M1', np.array([1, -1, 1.])), ValueError, 'positive'),
    ((np.ones(3), 'E2M1', np.nan), ValueError, 'positive, got nan'),
    ((np.ones(3), 'E2M1', 1e-40), ValueError, 'got 1e-40, and no subnormal'),
    ((np.ones(3), 'E2M1', np.inf), ValueError, 'got inf.* finite'),
    ((np.ones((4, 3)), 'E2M1', np.ones(4)), ValueError,
     r'scale of shape \(4,\) does not broadcast to the shape \(4, 3\)'),
    ((np.ones(3), 'E2M1', 1., np.ones((2, 3))), ValueError,
     r'zero_point of shape \(2, 3\) does not broadcast'),
])
def test_bad_input_is_named(function, arguments, error, message):
  with pytest.raises(error, match=message):
    function(*arguments)


def test_encode_and_decode_name_bad_input():
  x = np.array([1, np.nan, np.nan], np.float32)
  with pytest.raises(ValueError, match='2 of 3 values are NaN.*E2M1 has no'):
    encode(x, 'E2M1', 1.)
  assert jax.jit(lambda x: encode(x, 'E2M1', 1.))(x).max() < 16
  with pytest.raises(TypeError, match='codes must be uint8, got int32'):
    decode(np.arange(3), 'E2M1', 1.)
