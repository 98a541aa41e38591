"""What differs by group on Hopper: QuaRTZ's FLAGs, scales of both sides.

Layers with scales of groups are in test_epilogue.py, compiling for the GPU in
test_aot_gpu.py.
"""

import functools

import jax
import jax.numpy as jnp
import kernel_oracle
from kernel_oracle import integers
import numpy as np
import pytest
from test_mosaic_gpu import interpreted
from test_mosaic_gpu import lower

from msfp_jax.kernels import choice
from msfp_jax.kernels.mosaic_gpu import blocks as blocks_lib
from msfp_jax.kernels.mosaic_gpu import decode as decode_lib
from msfp_jax.kernels.mosaic_gpu import ops as mosaic_gpu
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.quantizers import quantize
from msfp_jax.quant.quantizers import Static
from msfp_jax.quant.suppress import first_stage
from msfp_jax.quant.suppress import quartz

E1M2, UE1M3, INT8, UINT8 = map(
    FPFormat.parse, ('E1M2', 'UE1M3', 'E1M6', 'UE1M7'))
BORDERS = ((1, 1), (1, 1))


def draw(shape, group):
  """Codes `[..., K, N]` and their FLAGs."""
  rng = np.random.default_rng(0)
  return (rng.integers(0, 16, shape, np.uint8), rng.integers(
      0, 5, (*shape[:-2], -(-shape[-2] // group), shape[-1]), np.uint8))


@pytest.mark.parametrize('fmt, base', [(E1M2, 0), (UE1M3, 128)])
def test_every_code_under_every_flag(fmt, base):
  """Beside every code in the byte below, whose bits must not reach it."""
  below, code = np.divmod(np.arange(256), 16)
  codes = np.tile(np.stack([below, code], 1).reshape(-1).astype(np.uint8), 5)
  flags = np.repeat(np.arange(5), 512 // 16)
  packed = decode_lib.prepare(
      layout_lib.pack_halves(codes[:, None]), len(codes), fmt.signed)
  found = decode_lib.decode_array(packed[:1], fmt, 'int8', flags, base)
  assert found.dtype == np.int8
  expected = integers(codes[:, None], flags[:, None], 16, fmt.signed)
  np.testing.assert_array_equal(np.int64(found[0]), expected[:, 0] - base)


def run(op, x, codes, flags, group, blocks, **settings):
  """The integers that the kernel sums, scaled by 1."""
  n = codes.shape[-1]
  return getattr(mosaic_gpu, op)(
      jnp.asarray(x),
      decode_lib.prepare(layout_lib.pack_halves(codes), codes.shape[-2]),
      np.ones(n, np.float32), np.zeros(n, np.float32), fmt=E1M2, wide=INT8,
      flags=jnp.asarray(flags), flag_group=group, out_dtype=jnp.float32,
      blocks=blocks_lib.Blocks(*blocks), interpret=True, **settings)


@interpreted
@pytest.mark.parametrize('k, group, blocks', [
    (130, 16, (16, 64, 2)), (256, 32, (16, 128, 2, 2)),
    (256, 128, (16, 128, 1))])
def test_products(k, group, blocks):
  """Of 130, the last FLAG is that of two codes; sums in two shares too."""
  codes, flags = draw((k, 70), group)
  x = np.random.default_rng(1).integers(-128, 128, (9, k)).astype(np.int8)
  np.testing.assert_array_equal(
      run('matmul', x, codes, flags, group, blocks),
      np.float32(np.int64(x) @ integers(codes, flags, group)))


@interpreted
def test_convolutions():
  codes, flags = draw((3, 3, 70, 20), 16)
  x = np.random.default_rng(1).integers(-128, 128, (2, 3, 4, 70), np.int8)
  np.testing.assert_array_equal(
      run('conv', x, codes, flags, 16, (16, 64, 2), strides=(1, 1),
          padding=BORDERS),
      np.float32(kernel_oracle.conv(
          np.int64(x), integers(codes, flags, 16), (1, 1), BORDERS, (1, 1))))


def test_scales_of_groups_take_room_of_stages():
  """By the shapes of what a step has: scales in float32, FLAGs in bytes."""
  groups = blocks_lib.Groups(16, 0, weights=True, inputs=True)
  # 4 groups of 64 codes, 128 channels and 64 rows.
  assert groups.bytes(64) == 4 * 4 * (128 + 64)
  assert blocks_lib.Groups(48, 128, weights=True).bytes(64) == 4 * 4 * 128 + 128


def test_they_lower():
  column = ((320,), jnp.float32)
  text = lower(
      lambda x, codes, groups, inputs, flags, *end: mosaic_gpu.conv(
          x, codes, *end, fmt=E1M2, wide=INT8, groups=groups, group=32,
          inputs=inputs, input_group=64, flags=flags, flag_group=16,
          strides=(1, 1), padding=BORDERS, out_dtype=jnp.bfloat16),
      ((2, 8, 8, 320), jnp.int8), ((320, 3, 3, 160), jnp.uint8),
      ((3, 3, 10, 320), jnp.float32), ((2, 8, 8, 5), jnp.float32),
      ((3, 3, 20, 320), jnp.uint8), column, column)
  assert text.count('custom_call @mosaic_gpu') == 1


def test_flags_lie_in_device_memory_as_in_a_file():
  """No copy of FLAGs is made where K and N are multiples of 64 and 16."""
  column = ((320,), jnp.float32)
  text = lower(
      lambda x, codes, flags, *end: mosaic_gpu.matmul(
          x, codes, *end, fmt=E1M2, wide=INT8, flags=flags, flag_group=16,
          out_dtype=jnp.bfloat16),
      ((64, 640), jnp.int8), ((320, 320), jnp.uint8),
      ((40, 320), jnp.uint8), column, column)
  call, = [line for line in text.splitlines() if '@mosaic_gpu' in line]
  assert '%arg2)' in call and 'tensor<40x320xui8>' in call


@pytest.mark.parametrize('groups, blocks, reason', [
    ({'group': 16}, (128, 64, 2), 'at most 96 rows'),
    ({'input_group': 64}, (96, 64, 2), 'at most 64 rows'),
    ({'flag_group': 16, 'wide': INT8}, (16, 256, 2), 'a depth of 128'),
    ({'group': 64}, (16, 64, 2, 2), 'no split'),
    ({'flag_group': 16, 'wide': INT8}, (16, 64, 6), '1 to 5 stages fit')])
def test_why_not_blocks(groups, blocks, reason):
  x = jax.ShapeDtypeStruct((16, 256), jnp.int8)
  codes = jax.ShapeDtypeStruct((64, 128), jnp.uint8)
  assert reason in mosaic_gpu.why_not(
      'matmul', x, codes, fmt=E1M2, blocks=blocks_lib.Blocks(*blocks), **groups)


STATIC = Static(E1M2, np.float32(0.3))
channel = functools.partial(quartz, 4, first_stage(shared='channel'))
REFUSED = {
    'FLAGs of 8': (channel(8), STATIC, None, 'FLAGs of these weights change '
                   'every 8'),
    'fp8': (channel(), STATIC, 'fp8', 'fp8 does not hold weights in E1M6'),
    'scales of 24': (Block(E1M2, 'group', 24), STATIC, None,
                     'scales of these weights change every 24'),
    'inputs of 8': (Block(E1M2, 'group', 16), Block(E1M2, 'group', 8), None,
                    'scales of these inputs change every 8'),
    'zeros of inputs': (Block(E1M2, 'channel'), Block(UE1M3, 'group', 16), None,
                        'does not add what their zeros make'),
    'unsigned groups': (quartz(4, Block(UINT8, 'group', 32, zero_point=0.0)),
                        STATIC, None, 'takes 128 off the levels of UE1M7')}


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_not_taken_says_why(name):
  weights, inputs, carrier, reason = REFUSED[name]
  kernel = np.random.default_rng(0).normal(size=(96, 9)).astype(np.float32)
  layer = QLayer(quantize(weights, kernel, -2).packed(), inputs, None)
  assert reason in choice.why_not(
      'mosaic_gpu', layer, (2, 96), carrier=carrier)
