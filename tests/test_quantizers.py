"""Quantizers: where scales come from, what training moves, what is refused."""

import flax.struct
import jax
import jax.numpy as jnp
import kernel_cases
import kernel_oracle
import numpy as np
import pytest

from msfp_jax.quant import functional
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantizers import fields_of
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Quantizer
from msfp_jax.quant.quantizers import Static
from msfp_jax.quant.suppress import Suppressed

pytestmark = [pytest.mark.gpu, pytest.mark.optimized]

E2M1, UE2M2 = FPFormat.parse('E2M1'), FPFormat.parse('UE2M2')
NVFP4 = Block(E2M1, group=16, scale_type='e4m3', two_level=True)
X = np.random.default_rng(0).normal(size=(2, 2, 3, 40)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(3, 3, 40, 7)).astype(np.float32)
BLOCKS = {
    'tensor': Block(E2M1, 'tensor'), 'token': Block(E2M1, 'token'),
    'group': Block(E2M1, group=8), 'the last shorter': Block(E2M1, group=16),
    'one group': Block(E2M1, group=64),
    'zero points': Block(UE2M2, group=12),
    'zero points of tokens': Block(FPFormat.parse('UE1M3'), 'token'),
    'MXFP4': Block(E2M1, group=32, scale_type='e8m0'),
    'MXFP8': Block(FPFormat.parse('E4M3'), group=32, scale_type='e8m0'),
    'e4m3': Block(E2M1, group=16, scale_type='e4m3'), 'NVFP4': NVFP4,
    'bf16': Block(UE2M2, group=8, scale_type='bf16'),
    'one zero point': Block(UE2M2, group=8, zero_point=-0.25)}
SIDES = {'inputs': (X, -1), 'weights': (W, -2)}


@pytest.mark.parametrize('side', SIDES)
@pytest.mark.parametrize('name', BLOCKS)
def test_scales_from_the_data(name, side):
  """Every group is quantized by its own extremes, by brute force."""
  x, axis = SIDES[side]
  tensor = BLOCKS[name].quantize(x, axis)
  expected = kernel_oracle.block(x, BLOCKS[name], axis)
  np.testing.assert_allclose(tensor.dequantize(), expected, rtol=1e-6,
                             atol=1e-6)
  in_jit = kernel_cases.jit(lambda x: BLOCKS[name].quantize(x, axis))(x)
  jax.tree.map(np.testing.assert_array_equal, in_jit, tensor)


@pytest.mark.parametrize('quantizer, side', [
    (Block(E2M1, 'image'), 'inputs'), (Block(UE2M2, 'image'), 'inputs'),
    (Block(E2M1, 'channel'), 'weights'), (Block(UE2M2, 'channel'), 'weights')],
                         ids=str)
def test_scales_of_one_side_alone(quantizer, side):
  x, axis = SIDES[side]
  np.testing.assert_allclose(
      quantizer.quantize(x, axis).dequantize(),
      kernel_oracle.block(x, quantizer, axis), rtol=1e-6, atol=1e-6)
  other, axis = SIDES['weights' if side == 'inputs' else 'inputs']
  with pytest.raises(ValueError, match='is not for'):
    quantizer.quantize(other, axis)


@pytest.mark.parametrize('reach, power', [
    (1.0, 0), (1.99, 0), (2.0, 1), (0.75, -1), (6.0, 2), (7.9, 2), (8.0, 3)])
def test_powers_of_two_are_those_of_the_standard(reach, power):
  """OCP MX: floor(log2(largest)) less that of the format's maximum, 2."""
  tensor = Block(E2M1, 'token', scale_type='e8m0').quantize(
      np.float32([[reach, 0]]))
  np.testing.assert_array_equal(np.float32(tensor.scale), 2.0**(power - 2))


def test_two_levels_reach_the_largest_scale():
  """The largest of the inner scales is e4m3's maximum, 448."""
  tensor = NVFP4.quantize(1e-3 * X)
  assert np.float32(tensor.scale).max() == 448
  # One for each of the two images: a sample is quantized as if it were alone.
  largest = np.abs(1e-3 * X).max((1, 2, 3), keepdims=True)
  np.testing.assert_allclose(tensor.outer, largest / 6 / 448, rtol=1e-6)
  np.testing.assert_array_equal(
      NVFP4.quantize(X).dequantize()[1:], NVFP4.quantize(X[1:]).dequantize())
  assert np.shape(NVFP4.quantize(W, -2).outer) == (1, 1, 1, 1)


@pytest.mark.parametrize('name', sorted(BLOCKS.keys() - {'one zero point'}))
@pytest.mark.parametrize('value', [0.0, 1e-42, -3.0])
def test_groups_of_one_value(name, value):
  """A group of zeros or subnormals is 0; one of any other value nearly it."""
  x = np.full((2, 40), value, np.float32)
  found = np.asarray(BLOCKS[name].quantize(x).dequantize())
  assert np.isfinite(found).all()
  # e8m0 cuts off up to a quarter of the largest: 7.9 becomes 6.
  np.testing.assert_allclose(found, x, rtol=0.25 + 1e-6, atol=1e-37)


def test_nan_stays_nan():
  x = X.copy()
  x[0, 0, 0, 3] = np.nan
  for quantizer in (Block(E2M1, group=8), Static(E2M1, jnp.float32(0.5))):
    found = np.asarray(quantizer.quantize(x).dequantize())
    assert np.isnan(found[0, 0, 0, 3])
    assert np.isfinite(found[1]).all()


@pytest.mark.parametrize('quantizer', [
    NVFP4, Block(UE2M2, 'token'),
    Static(UE2M2, np.float32(.375), np.float32(-1)),
    Static(E2M1, np.float32(.4))], ids=lambda q: type(q).__name__)
def test_fake_quant_is_what_quantize_stands_for(quantizer):
  x = jnp.asarray(X, jnp.bfloat16)
  np.testing.assert_array_equal(
      quantizer.fake_quant(X), quantizer.quantize(X).dequantize())
  assert quantizer.fake_quant(x).dtype == jnp.bfloat16


def test_gradients_pass_straight_through_scales_from_the_data():
  g = np.random.default_rng(2).normal(size=X.shape).astype(np.float32)
  _, pullback = jax.vjp(NVFP4.fake_quant, X)
  np.testing.assert_array_equal(pullback(jnp.asarray(g))[0], g)


ZERO = -0.25
# Of one range: all x of the test below lie in one group, up to 3.5.
CUT_BELOW = {
    'Block': Block(UE2M2, 'tensor', zero_point=ZERO),
    'Block of groups': Block(UE2M2, group=4, zero_point=ZERO),
    'none, of 0': Block(UE2M2, 'token', zero_point=0.0),
    'QuaRTZ': Suppressed(Block(
        FPFormat.parse('UE1M7'), 'token', zero_point=ZERO)),
    'Static': Static(UE2M2, jnp.float32(3.75 / UE2M2.max), jnp.float32(ZERO))}


@pytest.mark.parametrize('name', CUT_BELOW)
def test_what_a_zero_point_from_calibration_cuts_off_gets_no_gradient(name):
  """Differences of max(x, zero point), the quantizer without its rounding."""
  quantizer = CUT_BELOW[name]
  zero = 0.0 if 'none' in name else ZERO
  # Every group of four has some of both sides; the largest is at the end of a
  # range that follows it.
  x = np.linspace(-3.1, 3.5, 40).reshape(4, 10).T.reshape(1, 40)
  g, h = np.random.default_rng(3).normal(size=x.shape), 1e-6
  assert np.abs(x - zero).min() > h and (x < zero).any() and (x > zero).any()
  held = lambda x: np.maximum(x, zero)
  expected = g * (held(x + h) - held(x - h)) / (2 * h)
  _, pullback = jax.vjp(quantizer.fake_quant, jnp.float32(x))
  np.testing.assert_allclose(pullback(jnp.float32(g))[0], expected, rtol=1e-5)


def test_the_least_of_a_group_is_not_cut_off_by_its_rounded_zero_point():
  """In bfloat16 a minimum may round upwards; it follows the data all the same.
  """
  x = jnp.float32([[-1.003, 0.5, 1.7, 2.2]])
  quantizer = Block(UE2M2, 'token', scale_type='bf16')
  assert float(quantizer.quantize(x).zero_point[0, 0]) > -1.003
  found = jax.grad(lambda x: quantizer.fake_quant(x).sum())(x)
  np.testing.assert_array_equal(found, np.ones((1, 4)))


def test_static_is_a_pytree_with_a_static_format():
  quantizer = Static(UE2M2, np.float32(1), np.float32(-1))
  assert quantizer.bits == 4
  assert len(jax.tree.leaves(quantizer)) == 2
  assert len(jax.tree.leaves(Static(E2M1, np.float32(1)))) == 1
  gradient = jax.grad(lambda q: q.fake_quant(X).sum())(quantizer)
  assert gradient.fmt == quantizer.fmt and gradient.scale.shape == ()


def test_full_precision_is_left_alone():
  assert Full().is_full and Full().bits == 32 and not NVFP4.is_full
  assert Full().fake_quant(X) is X
  with pytest.raises(TypeError, match='has no quantized form'):
    Full().quantize(X)


def test_offsets_of_zero_move_nothing():
  for quantizer in (
      Static(E2M1, jnp.linspace(0.1, 1, 7)),
      Static(UE2M2, functional.snap_scale(jnp.float32(0.3)), jnp.float32(-.7)),
      NVFP4, Full()):
    moved = quantizer.moved(quantizer.offsets())
    jax.tree.map(np.testing.assert_array_equal, moved, quantizer)


def test_offsets_are_logarithms_and_scales():
  """A scale moves by a factor of e^offset, a zero point by old scales."""
  scale, zero_point = jnp.float32(0.3), jnp.float32(-0.7)
  moved = Static(UE2M2, scale, zero_point).moved(
      {'log_scale': jnp.float32(0.2), 'zero_point': jnp.float32(1.5)})
  np.testing.assert_allclose(moved.scale, 0.3 * np.exp(0.2), rtol=2.0**-16)
  np.testing.assert_allclose(moved.zero_point, -0.7 + 0.3 * 1.5, rtol=1e-6)
  # Where a zero point is added, products with levels are exact.
  assert not np.asarray(moved.scale).view(np.uint32) & 0xff
  with pytest.raises(ValueError, match=r"Block has nothing to train, got \['a"):
    NVFP4.moved({'a': 1})


def test_each_step_has_its_own():
  scale, zero_point = np.float32([.1, .2, .4]), np.float32([-1, -2, -3])
  quantizer = Static(UE2M2, scale, zero_point, by_step=True)
  for step in range(3):
    expected = Static(UE2M2, scale[step], zero_point[step]).fake_quant(X)
    np.testing.assert_array_equal(
        jax.jit(lambda q, step: q.at(step).fake_quant(X))(quantizer, step),
        expected)
  for use in (quantizer.quantize, quantizer.fake_quant):
    with pytest.raises(ValueError, match=r'take at\(step\) first'):
      use(X)
  assert NVFP4.at(1) is NVFP4


@pytest.mark.parametrize('options, message', [
    ({'shared': 'row', 'group': 0}, "shared='row': must be one of"),
    ({'group': 0}, "group=0 and shared='group'"),
    ({'shared': 'token', 'group': 8}, "group=8 and shared='token'"),
    ({'group': 8, 'scale_type': 'f16'}, "scale_type='f16': must be one of"),
    ({'group': 8, 'rule': 'up'}, "rule='up': must be one of"),
    ({'group': 8, 'zero_point': -1.0}, 'zero_point=-1.0 of E2M1')])
def test_blocks_that_there_are_not(options, message):
  with pytest.raises(ValueError, match=message):
    Block(E2M1, **options)


def test_what_files_and_people_are_told():
  assert fields_of(NVFP4) == {
      'fmt': E2M1, 'group': 16, 'scale_type': 'e4m3', 'two_level': True}
  assert NVFP4.describe() == {'format': 'E2M1', 'scale': 'e4m3 by 16'}
  static = Static(UE2M2, np.float32([0.25, 0.5]), np.float32(-1))
  assert static.describe() == {
      'format': 'UE2M2', 'scale': '0.25 to 0.5', 'zero_point': '-1'}
  assert Quantizer.KINDS['Block'] is Block


@flax.struct.dataclass
class Learned(Quantizer):
  """A quantizer of one's own that is trained, with the inherited gradient."""

  fmt: FPFormat = flax.struct.field(pytree_node=False)
  scale: jax.Array
  zero_point: jax.Array | None = None

  @property
  def bits(self):
    return self.fmt.bits

  def quantize(self, x, axis=-1):
    return Static(self.fmt, self.scale, self.zero_point).quantize(x, axis)

  def offsets(self):
    return {'shift': jnp.zeros_like(self.scale)}

  def moved(self, offsets):
    return self.replace(scale=self.scale + offsets['shift'])


@pytest.mark.parametrize('fmt, zero', [('E2M1', None), ('UE2M2', -0.5)])
def test_parameters_of_ones_own_get_the_gradient_of_a_static_scale(fmt, zero):
  """That of x inside the range too; beyond it, it stays 1."""
  fmt = FPFormat.parse(fmt)
  x = jnp.linspace(-2.3, 4.0, 201)
  scale = jnp.float32(0.3)
  zero = None if zero is None else jnp.float32(zero)

  def loss(cls, x, scale, zero):
    return jnp.sin(cls(fmt, scale, zero).fake_quant(x)).sum()

  at = (0, 1) if zero is None else (0, 1, 2)
  own, static = (jax.grad(
      lambda *a, cls=cls: loss(cls, *a), at)(x, scale, zero)
                 for cls in (Learned, Static))
  u = (x - (0 if zero is None else zero)) / scale
  inside = np.asarray((u >= fmt.lowest) & (u <= fmt.max))
  np.testing.assert_allclose(own[0][inside], static[0][inside], rtol=1e-6)
  assert (np.abs(own[0][~inside]) > 0).all() and not static[0][~inside].any()
  for mine, theirs in zip(own[1:], static[1:], strict=True):
    assert abs(float(theirs)) > 0.1
    np.testing.assert_allclose(mine, theirs, rtol=1e-4)
