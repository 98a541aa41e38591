"""QuaRTZ: its codes and FLAGs one by one, its product, and what it refuses."""

import itertools

import jax
import jax.numpy as jnp
from kernel_cases import jit
import kernel_oracle
import marks
import numpy as np
import pytest

from msfp_jax.quant import block_formats
from msfp_jax.quant import recipes
from msfp_jax.quant import serialize
from msfp_jax.quant.block import Block
from msfp_jax.quant.fit import Seen
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import quantize
from msfp_jax.quant.quantizers import Static
from msfp_jax.quant.suppress import first_stage
from msfp_jax.quant.suppress import quartz
from msfp_jax.quant.suppress import Suppressed

INT8, UINT8 = FPFormat.parse('E1M6'), FPFormat.parse('UE1M7')
INT4 = FPFormat.parse('E1M2')
ROUNDINGS = ('nearest', 'truncate')
RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(2, 5, 4, 48)))
W = np.float32(RNG.normal(size=(3, 3, 48, 6)))


def integers(fmt, **options):
  """Suppresses numbers that are 8-bit integers already: their scale is 1."""
  return Suppressed(Static(fmt, jnp.float32(1 / fmt.step)), **options)


def by_hand(group, signed, rounding, bits=4):
  """(FLAG, integers that come back) of one group, in Python's integers."""
  kept = bits - signed
  flag = max(max(abs(n) for n in group).bit_length() - kept, 0)
  half = (1 << flag) // 2 if rounding == 'nearest' else 0
  back = [min((abs(n) + half) >> flag, 2**kept - 1) << flag for n in group]
  return flag, [-b if n < 0 else b for n, b in zip(group, back, strict=True)]


@pytest.mark.parametrize('rounding', ROUNDINGS)
@pytest.mark.parametrize('fmt', [INT8, UINT8], ids=str)
def test_every_code_under_every_flag(fmt, rounding):
  """All 8-bit codes, alone and beside one that makes each of the FLAGs."""
  codes = np.unique(fmt.values() / fmt.step).astype(int)
  pairs = [*itertools.product(codes, (0, 7, 15, 31, 63, 127, max(codes)))]
  tensor = integers(fmt, group=2, rounding=rounding).quantize(
      np.float32(pairs))
  flags, back = zip(*[by_hand(pair, fmt.signed, rounding)
                      for pair in map(tuple, np.array(pairs).tolist())],
                    strict=True)
  assert set(flags) == {0, 1, 2, 3, 4}
  np.testing.assert_array_equal(tensor.shift[:, 0], flags)
  np.testing.assert_array_equal(tensor.dequantize(), back)
  # 4 bits hold the codes: a sign and 3 of magnitude, or 4 of magnitude.
  magnitude = np.abs(back) >> np.array(flags)[:, None]
  sign = 8 * np.signbit(pairs) if fmt.signed else 0
  np.testing.assert_array_equal(tensor.codes(), magnitude | sign)


@pytest.mark.parametrize('bits', [3, 5, 6, 7])
@pytest.mark.parametrize('fmt', [INT8, UINT8], ids=str)
def test_other_widths(fmt, bits):
  codes = np.unique(fmt.values() / fmt.step).astype(int)
  tensor = integers(fmt, group=1, bits=bits).quantize(
      np.float32(codes)[:, None])
  flags, back = zip(*[by_hand([code], fmt.signed, 'nearest', bits)
                      for code in codes.tolist()], strict=True)
  np.testing.assert_array_equal(tensor.shift[:, 0], flags)
  np.testing.assert_array_equal(tensor.dequantize(), back)
  assert tensor.fmt.bits == bits


@pytest.mark.parametrize('group, flag, back', [
    ([3, -2, 5, 0], 0, [3, -2, 5, 0]),
    ([100, 3, -2, 10], 4, [96, 0, 0, 16]),  # 10 / 16 is nearer to 1
    ([7, 0, 0, 0], 0, [7, 0, 0, 0]), ([8, 1, 0, 0], 1, [8, 2, 0, 0]),
    ([15, -1, 0, 0], 1, [14, -2, 0, 0]), ([16, 2, 0, 0], 2, [16, 4, 0, 0]),
    ([31, 0, 0, 0], 2, [28, 0, 0, 0]), ([32, 4, 3, 0], 3, [32, 8, 0, 0]),
    ([63, 0, 0, 0], 3, [56, 0, 0, 0]), ([64, 8, -8, 7], 4, [64, 16, -16, 0]),
    ([127, 0, 0, 0], 4, [112, 0, 0, 0])])
def test_worked_examples(group, flag, back):
  """Bit lengths and FLAGs, and ties away from zero, from published examples.
  """
  tensor = integers(INT8, group=4).quantize(np.float32([group]))
  np.testing.assert_array_equal(tensor.shift, [[flag]])
  np.testing.assert_array_equal(tensor.dequantize(), [back])


def test_truncation_wipes_small_values_beside_a_large_one():
  tensor = integers(INT8, group=4, rounding='truncate').quantize(
      np.float32([[100, 3, -2, 10]]))
  np.testing.assert_array_equal(tensor.dequantize(), [[96, 0, 0, 0]])


def suppressed(x, quantizer, axis):
  """Quantizes in float64: the first stage by `kernel_oracle`, then by hand."""
  inner, group = quantizer.inner, quantizer.group
  stage = np.moveaxis(np.float64(kernel_oracle.block(x, inner, axis)), axis, -1)
  whole = inner.quantize(x, axis)
  moved = lambda part: np.broadcast_to(np.moveaxis(np.float64(
      whole.spread(jnp.float32(part))), axis, -1), stage.shape)
  scale = moved(whole.scale) * inner.fmt.step
  zero = 0 if whole.zero_point is None else moved(whole.zero_point)
  n = np.rint((stage - zero) / scale).astype(int)
  back = np.empty(n.shape)
  for at in np.ndindex(n.shape[:-1]):
    for start in range(0, n.shape[-1], group):
      one = slice(start, start + group)
      _, back[at][one] = by_hand(
          n[at][one].tolist(), inner.fmt.signed, quantizer.rounding)
  return np.moveaxis(back * scale + zero, -1, axis)


FROM_DATA = {
    'a token': quartz(4), 'truncated': quartz(4, rounding='truncate'),
    '32': quartz(4, group=32),
    'groups': quartz(4, first_stage(shared='group', group=32)),
    'zero points': quartz(4, first_stage(signed=False)),
    'zero points of groups': quartz(
        4, first_stage(False, 'group', 32), group=32)}


@pytest.mark.optimized
@pytest.mark.parametrize('name', marks.quick(
    ('a token', 'zero points'), FROM_DATA))
def test_both_stages_from_the_data(name):
  """Inputs of 40 channels, which no group divides; jitted or not."""
  quantizer, x = FROM_DATA[name], X[..., :40]
  tensor = quantizer.quantize(x)
  np.testing.assert_allclose(
      tensor.dequantize(), suppressed(x, quantizer, -1), rtol=1e-5, atol=1e-6)
  jax.tree.map(np.testing.assert_array_equal,
               jax.jit(quantizer.quantize)(x), tensor)
  np.testing.assert_array_equal(quantizer.fake_quant(x), tensor.dequantize())


@pytest.mark.parametrize('inner', [
    first_stage(shared='channel'), first_stage(shared='token'),
    first_stage(shared='group', group=32)], ids=str)
def test_weights(inner):
  quantizer = quartz(4, inner)
  kernel = W[:1, :2, :40]
  np.testing.assert_allclose(
      quantizer.quantize(kernel, -2).dequantize(),
      suppressed(kernel, quantizer, -2), rtol=1e-5, atol=1e-6)


def test_bits_are_counted_with_flags_and_scales():
  """The last group is short, and its FLAG counts like any other."""
  rows = 2 * 5 * 4
  for channels in (48, 40):
    tensor = quantize(quartz(4), X[..., :channels], -1)
    assert tensor.nbits == rows * (channels * 4 + 3 * 3 + 32)
  # 4 + 3 / 16 + 16 / 64 of an element; an unsigned one has 16 / 64 more.
  x = np.float32(RNG.normal(size=(3, 128)))
  for signed, bits in ((True, 4.4375), (False, 4.6875)):
    tensor = quantize(quartz(4, first_stage(signed, 'group', 64)), x, -1)
    assert tensor.nbits == bits * x.size
  kernel = quantize(quartz(4, first_stage(shared='channel')), W, -2)
  assert kernel.nbits == W.size * 4 + 9 * 3 * 6 * 3 + 6 * 32
  banks = quartz(4, first_stage(shared='channel')).quantize_banks(
      np.stack([W, 2 * W]))
  assert banks.nbits == 2 * kernel.nbits
  np.testing.assert_array_equal(
      banks.bank(1).dequantize(), 2 * kernel.dequantize())


def test_eight_bits_are_the_first_stage():
  assert quartz(8) == first_stage()
  assert isinstance(quartz(5), Suppressed)


def test_zeros_subnormals_and_nan():
  x = X.copy()
  x[0, 0, 0] = 0
  x[0, 0, 1] = 1e-42
  x[1, 0, 0, 3] = np.nan
  for quantizer in FROM_DATA.values():
    found = np.asarray(jit(quantizer.fake_quant)(x))
    np.testing.assert_allclose(found[0, 0, :2], 0, atol=1e-37)
    assert np.isnan(found[1, 0, 0, 3])
    assert np.isfinite(found[1, 1:]).all()


@pytest.mark.parametrize('make, part', [
    (lambda: quartz(4, group=12), 'group=12: must be a power of two'),
    (lambda: quartz(4, group=0), 'group=0: must be a power of two'),
    (lambda: quartz(4, rounding='down'), "rounding='down': must be one of"),
    (lambda: Suppressed(Full()), 'must be a Block or Static of integers'),
    (lambda: Suppressed(Block(FPFormat.parse('E4M3'), 'token')),
     'must be a Block or Static of integers'),
    (lambda: Suppressed(quartz(4)), 'must be a Block or Static of integers'),
    (lambda: Suppressed(first_stage(), bits=8), '8 bits of E1M6: must be 3'),
    (lambda: Suppressed(Block(INT4, 'token')), '4 bits of E1M2: must be 3'),
    (lambda: quartz(4, first_stage(shared='group', group=24)),
     'group=16: must divide the 24 neighbours')])
def test_what_is_refused(make, part):
  with pytest.raises(ValueError, match=part):
    make()


def test_it_comes_back_from_json():
  for quantizer in [*FROM_DATA.values(), integers(UINT8, bits=5)]:
    row = serialize.quantizer_to_dict(quantizer)
    assert row['kind'] == 'Suppressed'
    back = serialize.quantizer_from_dict(row)
    jax.tree.map(np.testing.assert_array_equal, back, quantizer)
  row = serialize.quantizer_to_dict(quartz(4)) | {'group': 12}
  with pytest.raises(ValueError, match='group=12: must be a power of two'):
    serialize.quantizer_from_dict(row)
  row = serialize.quantizer_to_dict(quartz(4)) | {'inner': {'kind': 'Full'}}
  with pytest.raises(ValueError, match='inner='):
    serialize.quantizer_from_dict(row)


def test_gradients_pass_straight_through():
  g = np.float32(RNG.normal(size=X.shape))
  for quantizer in FROM_DATA.values():
    found = jit(lambda x, g, q=quantizer: jax.vjp(
        q.fake_quant, x)[1](g))(X, g)[0]
    np.testing.assert_array_equal(found, g)


def test_training_moves_the_first_stage():
  """Of a static scale: q - u, with q as it comes back, shifts included."""
  quantizer = integers(INT8)
  offsets = quantizer.offsets()
  assert offsets.keys() == {'log_scale'}
  x = jnp.float32([[100.0, 22.4, -3.0, 300.0]])
  found = jax.grad(lambda scale: quantizer.moved(
      {'log_scale': scale}).fake_quant(x).sum())(offsets['log_scale'])
  # 300 saturates at 112; one step is 1, and so d/dlog_scale is this sum.
  np.testing.assert_allclose(
      found, (96 - 100) + (16 - 22.4) + (0 + 3) + 112, rtol=1e-5)
  by_step = Suppressed(Static(
      INT8, jnp.float32([32, 64]), by_step=True))
  assert by_step.num_steps == 2
  np.testing.assert_array_equal(
      by_step.at(1).quantize(x).dequantize(),
      Suppressed(Static(INT8, jnp.float32(64))).quantize(x).dequantize())


def test_exceptions_of_eight_bits():
  of = recipes.get('quartz')
  assert of.nal(Seen(), 8, -1).quantizer == first_stage()
  assert of.aal(Seen(), 8, -1).quantizer == first_stage(signed=False)
  assert of.weight(Seen(), 4, -2).quantizer == block_formats.int_group(4)
  assert recipes.get('quartz_32').nal(Seen(), 4, -1).quantizer.group == 32
