"""Bits per weight and activation, counted by hand."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import pytest

from msfp_jax import diffusion
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.around import Around
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Static
from msfp_jax.quant.suppress import Suppressed
from msfp_jax.run import bits

FMT, FULL = FPFormat.parse('E2M1'), Full()


class Pair(nn.Module):
  """A convolution of 6 channels to 4, and a dense layer of 4 to 5."""

  @nn.compact
  def __call__(self, x, t):
    h = nn.Conv(4, (3, 3), strides=2, name='conv')(x)
    return nn.Dense(5, name='dense')(h) + t[:, None, None, None]


MODEL = Pair()
X, T = jnp.zeros((1, 8, 8, 6)), jnp.zeros(1)
PARAMS = jax.jit(MODEL.init)(jax.random.key(0), X, T)['params']
PLAN = diffusion.ddim_plan(diffusion.make_schedule(
    'linear', num_train_steps=1000, beta_start=1e-4, beta_end=0.02), 2)
SHAPES = {'conv': (1, 8, 8, 6), 'dense': (1, 4, 4, 4)}
CONV, DENSE = 9 * 6 * 4, 4 * 5
SEEN, AFTER = 8 * 8 * 6, 4 * 4 * 4


def model_of(conv, dense=None):
  full = spec_lib.LayerSpec('', '')
  return packed_lib.simulate(MODEL, PARAMS, spec_lib.QuantSpec('by hand', {
      'conv': conv, 'dense': dense or full}), PLAN)


def layer(weight=FULL, act=FULL, around=None):
  return spec_lib.LayerSpec('', '', weight, act, around)


def test_shapes_of_inputs_are_found_without_a_run():
  shapes = jax.eval_shape(lambda: PARAMS)
  assert bits.input_shapes(MODEL, shapes, X, T) == SHAPES


def test_full_precision_has_32():
  model = packed_lib.full_precision(MODEL, PARAMS, PLAN)
  assert bits.per_weight(model) == bits.per_activation(model, SHAPES) == 32


def test_groups_that_do_not_divide_and_their_scales():
  """6 channels in groups of 4: two float8 scales a place."""
  block = Block(FMT, 'group', 4, 'e4m3', two_level=True)
  model = model_of(layer(block, block))
  weights = 4 * CONV + 8 * (9 * 2 * 4) + 32
  inputs = 4 * SEEN + 8 * (8 * 8 * 2) + 32
  assert bits.per_weight(model) == (weights + 32 * DENSE) / (CONV + DENSE)
  assert bits.per_activation(model, SHAPES) == (
      inputs + 32 * AFTER) / (SEEN + AFTER)


def test_zero_points_branch_and_smoothing_count():
  rank = 2
  around = Around(
      smooth=jnp.ones(6), down=jnp.zeros((3, 3, 6, rank), ml_dtypes.bfloat16),
      up=jnp.zeros((rank, 4), ml_dtypes.bfloat16))
  weight = Static(FMT, jnp.ones((1, 1, 1, 4)))
  act = Static(FPFormat.parse('UE2M2'), jnp.ones(()), jnp.zeros(()))
  eight = Static(FPFormat.parse('E4M3'), jnp.ones(()))
  model = model_of(layer(weight, act, around), layer(
      Static(FPFormat.parse('E4M3'), jnp.ones((1, 5))), eight))
  conv = 4 * CONV + 32 * 4 + 32 * 6 + 16 * rank * (9 * 6 + 4)
  dense = 8 * DENSE + 32 * 5
  assert bits.per_weight(model) == (conv + dense) / (CONV + DENSE)
  assert bits.per_activation(model, SHAPES) == (
      4 * SEEN + 2 * 32 + 8 * AFTER + 32) / (SEEN + AFTER)
  # Codes or levels: the same bits.
  assert bits.per_weight(model.packed()) == bits.per_weight(model)


@pytest.mark.parametrize('zero, extra', [(-0.25, 32), (0.0, 0), (None, 0)])
@pytest.mark.parametrize('kept', ['block', 'suppressed'])
def test_a_zero_point_from_calibration_counts_once(kept, zero, extra):
  """In the file's bytes as in an input's bits, and one of 0 is none."""
  act = Block(FPFormat.parse('UE1M7'), 'token', zero_point=zero)
  codes, flags = 8 * SEEN, 0
  if kept == 'suppressed':
    act = Suppressed(act, group=2)
    codes, flags = 4 * SEEN, 3 * SEEN // 2
  model = model_of(layer(Static(FMT, jnp.ones((1, 1, 1, 4))), act))
  conv = 4 * CONV + 32 * 4 + 32 * 4 + extra
  assert model.layers['conv'].nbits == conv
  assert model.stored_bytes == (conv + 32 * (DENSE + 5)) // 8
  assert model.packed().stored_bytes == model.stored_bytes
  # A float32 scale for each of 8 x 8 tokens, and without a zero point from
  # calibration the token's minimum.
  tokens = 32 * 8 * 8 * (2 if zero is None else 1)
  assert bits.per_activation(model, SHAPES) == (
      codes + flags + tokens + extra + 32 * AFTER) / (SEEN + AFTER)


def test_every_bank_adds_its_bits():
  weight = Static(FMT, jnp.ones((1, 1, 1, 4)))
  one = model_of(layer(weight))
  conv = one.layers['conv']
  kernel = PARAMS['conv']['kernel']
  two = dataclasses.replace(one, layers=one.layers | {'conv': conv.replace(
      weight=weight.quantize_banks(jnp.stack([kernel, -kernel])))})
  assert bits.per_weight(two) - bits.per_weight(one) == pytest.approx(
      4 * CONV / (CONV + DENSE))
