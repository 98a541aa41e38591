"""Layers of packed models: every kind of scale, and what stands around."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from packed_cases import conv
from packed_cases import Deep
from packed_cases import noise
import pytest
import tiny
import toy

from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import interception
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.around import Around
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantize import quantize
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Static

pytestmark = pytest.mark.gpu

E2M1 = FPFormat.parse('E2M1')
# Weights by groups of 16 inputs, in which a second pass would move values
# (see test_quantize), and inputs by group and by token.
BLOCKS = {
    'E2M3, scales in e4m3': Block(
        FPFormat.parse('E2M3'), group=16, scale_type='e4m3'),
    'NVFP4': Block(E2M1, group=16, scale_type='e4m3', two_level=True),
    'MXFP4': Block(E2M1, group=32, scale_type='e8m0'),
    'UE1M3, float32': Block(FPFormat.parse('UE1M3'), group=8),
}


@pytest.mark.slow
@pytest.mark.parametrize('block', BLOCKS)
def test_what_is_packed_is_what_quantize_made(block):
  """No second pass: every weight is bit for bit that of `quantize`."""
  weight = BLOCKS[block]
  params = jax.jit(Deep().init)(
      jax.random.key(0), noise((1, 4, 4, 40)), jnp.zeros(1))['params']
  spec = spec_lib.QuantSpec('mine', {
      name: spec_lib.LayerSpec('', '', weight, Full())
      for name in interception.leaves(params, 'kernel')})
  qparams = quantize(params, spec)
  packed = packed_lib.pack(Deep(), params, spec, tiny.PLAN)
  for name, layer in packed.layers.items():
    made = qparams[name]['kernel']
    assert layer.weight.is_packed
    np.testing.assert_array_equal(
        layer.weight.bank(0).dequantize(), made.dequantize(), name)
    np.testing.assert_array_equal(layer.weight.codes()[0], made.codes(), name)
    again = weight.quantize(made.dequantize(), axis=-2).dequantize()
    if block == 'E2M3, scales in e4m3':
      assert (again != made.dequantize()).any()


def by_step(act):
  """The toy's spec with an input of its first layer that differs by step."""
  spec = toy.spec()
  return dataclasses.replace(spec, layers=spec.layers | {
      'conv_in': dataclasses.replace(spec.layers['conv_in'], act=act)})


def test_each_step_uses_its_own_scale_and_zero_point():
  """Against one model a step, of plain static quantizers."""
  scales, zeros = (0.25, 0.4), (-0.25, -1.0)
  fmt = FPFormat.parse('UE2M2')
  steps = Static(fmt, jnp.asarray(scales), jnp.asarray(zeros), by_step=True)
  model, params, plan = toy.Toy(), toy.params(), toy.plan()
  simulated = packed_lib.simulate(model, params, by_step(steps), plan)
  packed = packed_lib.pack(model, params, by_step(steps), plan)
  x, t = noise((3, *toy.SHAPE)), jnp.full(3, 500.0)
  seen = []
  for index in (0, 1):
    alone = packed_lib.simulate(model, params, by_step(Static(
        fmt, jnp.float32(scales[index]), jnp.float32(zeros[index]))), plan)
    seen.append(jax.jit(alone.eps_fn)(x, t, 0))
    for ours in (simulated, packed):
      np.testing.assert_array_equal(
          jax.jit(ours.eps_fn)(x, t, index), seen[-1])
  assert np.abs(seen[0] - seen[1]).max() > 0.1
  # Both pairs are stored: 8 bytes more than one.
  assert packed.stored_bytes == packed_lib.pack(
      model, params, toy.spec(), plan).stored_bytes + 8


def around_by_hand(x, w, around, weight, act):
  """A convolution with smoothing, rotation and branch, float64."""
  h = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
  full = np.kron(np.eye(len(around.smooth) // 2), h)
  smooth, down, up = (np.float64(part) for part in (
      around.smooth, around.down, around.up))
  seen = (x / smooth) @ full
  moved = np.einsum('ij,xyjo->xyio', full, smooth[:, None] * w)
  rest = moved - np.einsum('xyir,ro->xyio', down, up)
  quantized = conv(tiny.fake_quant(seen, act), tiny.fake_quant(rest, weight))
  return quantized + conv(conv(seen, down), up[None, None])


class One(nn.Module):
  window: tuple[int, int] = (3, 3)

  @nn.compact
  def __call__(self, x, t):
    return nn.Conv(x.shape[-1], self.window, name='conv')(x)


@pytest.mark.parametrize('packed', [False, True])
def test_what_stands_around_a_product(packed):
  """y = Q(H x / s) Q(H^-1 s W - A B) + (H x / s) A B + bias, float64."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x, kernel, bias = draw(2, 5, 6, 4), draw(3, 3, 4, 4), draw(4)
  around = Around(jnp.exp(draw(4)), jnp.bfloat16(draw(3, 3, 4, 2)),
                  jnp.bfloat16(draw(2, 4)), rotation=2)
  weight = Static(E2M1, jnp.exp(0.3 * draw(1, 1, 1, 4)))
  act = Static(FPFormat.parse('UE2M2'), jnp.float32(0.6), jnp.float32(-2.0))
  spec = spec_lib.QuantSpec('mine', {
      'conv': spec_lib.LayerSpec('', '', weight, act, around)})
  make = packed_lib.pack if packed else packed_lib.simulate
  model = make(One(), {'conv': {'kernel': kernel, 'bias': bias}}, spec,
               tiny.PLAN)
  expected = around_by_hand(
      np.asarray(x), np.float64(kernel), around, weight, act) + bias
  np.testing.assert_allclose(
      jax.jit(model.eps_fn)(x, jnp.zeros(2), 0), expected, rtol=1e-5,
      atol=1e-5 * np.abs(expected).max())
  plain = conv(x, np.float64(kernel)) + bias
  assert np.abs(expected - plain).max() > 0.3
  # Branch, factors, scales of weights and input, bias; codes.
  assert model.stored_bytes == 2 * (9 * 4 * 2 + 2 * 4) + 4 * (
      4 + 4 + 2 + 4) + 9 * 4 * 4 // 2


@pytest.mark.slow
@pytest.mark.parametrize('act', [
    Block(FPFormat.parse('UE1M3'), shared='token'),
    Block(FPFormat.parse('UE1M3'), group=2),
    Block(E2M1, group=2, scale_type='e4m3', two_level=True)])
@pytest.mark.parametrize('weight', [
    Block(FPFormat.parse('UE1M3'), shared='channel'),
    Block(FPFormat.parse('UE1M3'), group=2)])
@pytest.mark.parametrize('window', [(1, 1), (3, 3)])
def test_pixels_and_channels_of_equal_values(act, weight, window):
  """Nothing is divided by a range of 0: zeros stay zeros, and ones ones."""
  kernel = noise((*window, 4, 4)).at[..., 1].set(0).at[..., 2].set(1)
  x = noise((2, 5, 6, 4)).at[:, :3].set(0).at[1].set(1)
  spec = spec_lib.QuantSpec('mine', {
      'conv': spec_lib.LayerSpec('', '', weight, act)})
  model = packed_lib.pack(
      One(window), {'conv': {'kernel': kernel, 'bias': jnp.zeros(4)}}, spec,
      tiny.PLAN)
  found = model.eps_fn(x, jnp.zeros(2), 0)
  w = weight.quantize(kernel, axis=-2).dequantize()
  expected = conv(np.asarray(act.quantize(x).dequantize()), np.float64(w))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(found[0, :2], 0)
  np.testing.assert_array_equal(found[..., 1], 0)
  # A scale in e4m3 has 3 bits behind its first.
  np.testing.assert_allclose(found[1, 1:-1, 1:-1, 2], 4 * np.prod(window),
                             rtol=2**-4)
