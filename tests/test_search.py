"""The search against brute force in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax.quant.numbers import formats_of_width
from msfp_jax.quant.search import search

FRACTIONS = np.linspace(0.02, 1.2, 111)
ZERO_POINTS = np.linspace(-0.3, 0, 7)


def silu(x):
  return x / (1 + np.exp(-x))


def draw(kind, size=1000, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.standard_t(4, size) if kind == 'student' else rng.normal(size=size)
  return (silu(x) if kind == 'silu' else x).astype(np.float32)


def quantization_mse(x, levels):
  """The error of rounding every value to its nearest level, float64."""
  middles = (levels[1:] + levels[:-1]) / 2
  return np.mean((levels[np.searchsorted(middles, x)] - x)**2)


def brute_force(x, fmt, zero_points=(0.0,)):
  """Searches the least error over all maximum values and zero points."""
  x = np.sort(np.asarray(x, np.float64).ravel())
  levels = fmt.levels() / fmt.levels().max()
  return min(quantization_mse(x, c * levels + zero)
             for c in FRACTIONS * np.abs(x).max() for zero in zero_points)


def achieved(x, quantizer):
  """The error of a quantizer on x, in float64 from its float32 outputs."""
  out = np.asarray(quantizer.fake_quant(jnp.asarray(x)), np.float64)
  return np.mean((out - x)**2)


def test_brute_force_knows_the_best_uniform_grid():
  """16 levels to 1.5 hold x = 0, .1, ... 1.5 without error."""
  fmt = formats_of_width(4, False)[0]
  levels = np.arange(16) / 10
  np.testing.assert_allclose(fmt.levels() / fmt.max * 1.5, levels, atol=1e-12)
  assert quantization_mse(levels, levels) == 0
  assert quantization_mse(levels + 0.05, levels) == pytest.approx(0.0025)


@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('bits', [
    4, *[pytest.param(bits, marks=pytest.mark.slow) for bits in (6, 8)]])
def test_never_worse_than_brute_force_and_true_to_its_word(bits, signed):
  formats = formats_of_width(bits, signed)
  zeros = None if signed else ZERO_POINTS
  for kind in ('silu', 'normal', 'student'):
    x = draw(kind)
    result = search(x, formats, zero_points=zeros)
    grid = min(brute_force(x, fmt, (0.0,) if signed else zeros)
               for fmt in formats)
    assert result.mse <= grid * (1 + 1e-9), kind
    assert result.mse > grid / 2, kind  # refined, but no miracle
    assert achieved(x, result.quantizer()) == pytest.approx(
        result.mse, rel=1e-4), kind
    assert result.fmt in formats
    assert result.scale.shape == () and result.scale.dtype == np.float32
    assert (result.zero_point is None) == signed


@pytest.mark.parametrize('bits, signed_mse, signed, unsigned_mse, unsigned', [
    (4, 6.1e-3, 'E2M1', 2.06e-3, 'UE2M2'),
    (6, 4.1e-4, 'E2M3', 1.48e-4, 'UE2M4'),
    (8, 2.8e-5, 'E2M5', 9.2e-6, 'UE2M6'),
])
def test_silu_of_a_normal_has_the_known_errors(
    bits, signed_mse, signed, unsigned_mse, unsigned):
  """Errors measured apart, on a plain grid; refining may gain a few percent."""
  x = draw('silu', 20_000)
  result = search(x, formats_of_width(bits, True))
  assert str(result.fmt) == signed
  assert signed_mse * 0.9 < result.mse < signed_mse * 1.05
  result = search(x, formats_of_width(bits, False), zero_points=ZERO_POINTS)
  assert str(result.fmt) == unsigned
  assert unsigned_mse * 0.9 < result.mse < unsigned_mse * 1.05
  assert result.zero_point == pytest.approx(-0.27, abs=0.04)


def channels(count, length=300):
  """Draws rows of different spread and shape, the odd ones with heavy tails."""
  rng = np.random.default_rng(1)
  rows = [rng.standard_t(3, length) if i % 2 else rng.uniform(-1, 1, length)
          for i in range(count)]
  return (np.stack(rows) * rng.uniform(0.1, 3, (count, 1))).astype(np.float32)


def test_channels_share_the_format_of_the_least_total_error():
  formats = formats_of_width(4, True)
  rows = channels(6)
  # Most channels prefer the uniform grid, one of large errors decides.
  rows[[1, 3]] = rows[[0, 2]] / 2
  rows[5] *= 20
  table = np.array([[brute_force(row, fmt) for fmt in formats]
                    for row in rows])
  votes = np.bincount(table.argmin(axis=1), minlength=len(formats))
  best = table.sum(axis=0).argmin()
  assert votes.argmax() != best  # or else the case shows nothing
  result = search(rows, formats, channel_axis=0)
  assert result.fmt == formats[best]
  assert result.scale.shape == (6,)
  assert result.mse <= table[:, best].mean() * (1 + 1e-9)


def test_every_channel_gets_its_own_best_scale():
  """40 channels: more than the search takes at once."""
  rows = channels(40)
  result = search(rows, formats_of_width(4, True), channel_axis=0)
  total = 0
  for row, scale in zip(rows, result.scale, strict=True):
    levels = result.fmt.levels() * np.float64(scale)
    mse = quantization_mse(row.astype(np.float64), levels)
    assert mse <= brute_force(row, result.fmt) * (1 + 1e-5)
    total += mse
  assert result.mse == pytest.approx(total / 40, rel=1e-5)


def test_the_last_axis_of_a_kernel():
  kernel = np.moveaxis(channels(5, 24).reshape(5, 2, 3, 4), 0, -1)
  result = search(kernel, formats_of_width(4, True), channel_axis=-1)
  first = search(np.moveaxis(kernel, -1, 0), formats_of_width(4, True),
                 channel_axis=0)
  np.testing.assert_array_equal(result.scale, first.scale)
  quantizer = result.quantizer(kernel.ndim)
  assert quantizer.scale.shape == (1, 1, 1, 5)
  assert achieved(kernel, quantizer) == pytest.approx(result.mse, rel=1e-4)


def test_channels_with_zero_points():
  rows = channels(5) + np.arange(5, dtype=np.float32)[:, None]
  formats = formats_of_width(4, False)[:1]
  result = search(rows, formats, channel_axis=0, zero_points='range')
  assert result.zero_point.shape == (5,)
  expected = np.mean([
      brute_force(row, formats[0], np.linspace(min(row.min(), 0), 0, 7))
      for row in rows])
  assert result.mse <= expected * (1 + 1e-9)
  columns = search(rows.T, formats, channel_axis=1, zero_points='range')
  assert achieved(rows.T, columns.quantizer(2)) == pytest.approx(
      columns.mse, rel=1e-4)


@pytest.mark.parametrize('exponent', [-60, 40])
@pytest.mark.parametrize('zero_points', [None, 'range'])
def test_a_power_of_two_moves_nothing_but_the_scale(zero_points, exponent):
  x = draw('silu').astype(np.float64)
  factor = 2.0**exponent
  formats = formats_of_width(4, zero_points is None)
  a = search(x, formats, zero_points=zero_points)
  b = search(x * factor, formats, zero_points=zero_points)
  assert a.fmt == b.fmt
  assert b.scale == a.scale * np.float32(factor)
  assert b.mse == a.mse * factor**2
  if zero_points:
    assert b.zero_point == a.zero_point * np.float32(factor)


def test_order_and_shape_do_not_matter():
  x = draw('normal')
  formats = formats_of_width(4, True)
  a, b = search(x, formats), search(x[::-1].reshape(10, 100), formats)
  assert (a.fmt, a.scale) == (b.fmt, b.scale)
  assert a.mse == pytest.approx(b.mse, rel=1e-9)


@pytest.mark.parametrize('zero_points', [None, ZERO_POINTS, 'range'])
def test_all_zero(zero_points):
  x = np.zeros((3, 40), np.float32)
  for axis in (None, 0):
    result = search(x, formats_of_width(4, zero_points is None),
                    channel_axis=axis, zero_points=zero_points)
    assert result.mse == 0
    assert (result.scale > 0).all() and np.isfinite(result.scale).all()
    np.testing.assert_allclose(
        result.quantizer(2).fake_quant(jnp.asarray(x.T)), 0, atol=1e-6)


@pytest.mark.parametrize('zero_points', [None, 'range'])
def test_a_constant_channel_is_met(zero_points):
  rows = channels(4)
  rows[1], rows[2] = 0.0, -0.7
  result = search(rows, formats_of_width(4, zero_points is None),
                  channel_axis=0, zero_points=zero_points)
  out = np.asarray(
      result.quantizer(2).fake_quant(jnp.asarray(rows.T))).T
  np.testing.assert_allclose(out[1], 0, atol=1e-6)
  np.testing.assert_allclose(out[2], -0.7, rtol=2e-3)


@pytest.mark.parametrize('value', [0.7, -0.7, 1e-30, 3e30, 0.0])
@pytest.mark.parametrize('zero_points', [None, 'range'])
@pytest.mark.parametrize('count', [1, 700])
def test_one_value(value, zero_points, count):
  x = np.full(count, value, np.float32)
  result = search(x, formats_of_width(4, zero_points is None),
                  zero_points=zero_points)
  assert 0 <= result.mse <= (2e-3 * value)**2
  out = result.quantizer().fake_quant(jnp.asarray(x))
  np.testing.assert_allclose(out, x, rtol=2e-3)


@pytest.mark.parametrize('low, high', [(2, 6), (-6, -2), (5, 5.5)])
def test_range_zero_points_of_one_sided_tensors(low, high):
  x = np.random.default_rng(0).uniform(low, high, 1000).astype(np.float32)
  fmt = formats_of_width(4, False)[0]
  result = search(x, [fmt], zero_points='range')
  zeros = np.linspace(min(x.min(), 0), 0, 7)
  assert result.mse <= brute_force(x, fmt, zeros) * (1 + 1e-9)
  assert achieved(x, result.quantizer()) == pytest.approx(
      result.mse, rel=1e-3)
  if low > 0:
    assert result.zero_point == 0
  else:
    # 16 levels over the range itself: step^2 / 12, within a fifth.
    assert result.mse < 1.2 * ((high - low) / 16)**2 / 12
    assert result.zero_point == pytest.approx(low, abs=0.3)


@pytest.mark.parametrize('shift', [0.5, 0.25])
def test_zero_points_are_refined_between_their_candidates(shift):
  """A uniform input, whose best zero point lies between two candidates.

  With 16 levels over [a, 1] the best step is (1 - a) / 16, and the best zero
  point half a step above a.
  """
  few, spacing = np.linspace(-0.6, 0, 4), 0.2
  best = few[1] + shift * spacing
  a = (best - 1 / 32) / (1 - 1 / 32)
  step = (1 - a) / 16
  assert best == pytest.approx(a + step / 2)
  x = np.float32(a + (1 - a) * (np.arange(4000) + 0.5) / 4000)
  result = search(
      x, formats_of_width(4, False)[:1], zero_points=few)
  assert result.mse < 1.15 * step**2 / 12
  # Of the candidates alone none comes near that.
  assert brute_force(x, formats_of_width(4, False)[0], few) > (
      1.9 * step**2 / 12)
  assert result.zero_point == pytest.approx(best, abs=0.2 * spacing)


@pytest.mark.parametrize('shape', [(0,), (3, 0)])
def test_an_empty_tensor_is_refused(shape):
  with pytest.raises(ValueError, match='nothing to search'):
    search(np.zeros(shape), formats_of_width(4, True))


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_counted_and_refused(bad):
  x = draw('normal')
  x[[3, 5]] = bad
  with pytest.raises(ValueError, match='2 of 1000 values are NaN or inf'):
    search(x, formats_of_width(4, True))


def test_unknown_zero_points():
  with pytest.raises(ValueError, match="'auto'.*'range'"):
    search(draw('normal'), formats_of_width(4, False), zero_points='auto')
