"""Packed products on Hopper: decoding, layout, lowering, and the arithmetic.

The last needs Pallas's interpreter of GPUs, of jax 0.11 and later. Compiling
for the GPU is test_aot_gpu.py, running benchmarks/hopper.py.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import kernel_oracle
import ml_dtypes
import numpy as np
import pytest

from msfp_jax.kernels.epilogue import Columns
from msfp_jax.kernels.epilogue import Rows
from msfp_jax.kernels.mosaic_gpu import blocks as blocks_lib
from msfp_jax.kernels.mosaic_gpu import decode as decode_lib
from msfp_jax.kernels.mosaic_gpu import ops as mosaic_gpu
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant.numbers import FPFormat

FORMATS = ('E1M2', 'E2M1', 'E3M0', 'UE1M3', 'UE2M2', 'UE3M1', 'UE4M0')
DTYPES = {'int8': np.int8, 'fp8': ml_dtypes.float8_e4m3fn}
# In steps of the format, as float4 and textbooks have them.
MAGNITUDES = {
    'E1M2': [0, 1, 2, 3, 4, 5, 6, 7], 'E2M1': [0, 1, 2, 3, 4, 6, 8, 12],
    'E3M0': [0, 1, 2, 4, 8, 16, 32, 64], 'UE1M3': range(16),
    'UE2M2': [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28],
    'UE3M1': [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192],
    'UE4M0': [0, *(2**n for n in range(15))]}

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason='the interpreter of GPUs is complete since jax 0.11')


def integers(codes, fmt):
  if fmt.startswith('U'):
    return np.array(MAGNITUDES[fmt])[codes]
  sign = np.where(codes & 8, -1, 1)
  return sign * np.array(MAGNITUDES[fmt])[codes & 7]


def draw(shape, carrier, seed=0):
  """Draws levels that int8 and fp8 both hold."""
  rng = np.random.default_rng(seed)
  return rng.integers(-8, 9, shape).astype(DTYPES[carrier])


def draw_codes(shape, seed=1):
  return np.random.default_rng(seed).integers(0, 16, shape).astype(np.uint8)


def on_gpu():
  """Lets jax 0.11 and later lower for a GPU that is not there."""
  if jax.__version_info__ < (0, 11):
    return contextlib.nullcontext()
  device = jax.sharding.AbstractDevice(
      device_kind='NVIDIA H200', num_cores=132, platform='cuda')
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(
      (1,), ('x',), abstract_device=device))


def lower(function, *shapes):
  args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
  with on_gpu():
    return jax.jit(function).trace(*args).lower(
        lowering_platforms=('cuda',)).as_text()


@pytest.mark.parametrize('fmt, carrier', [
    *((fmt, 'int8') for fmt in FORMATS if fmt != 'UE4M0'),
    *((fmt, 'fp8') for fmt in FORMATS)])
def test_every_byte_decodes(fmt, carrier):
  """Every pair of codes in a byte decodes, in each of a word's 4 bytes."""
  codes = np.arange(256, dtype=np.uint8)
  codes = np.stack([codes & 15, codes >> 4], -1)  # [256, 2]
  codes = np.concatenate([np.roll(codes, i, axis=0) for i in range(64)], 1)
  own = FPFormat.parse(fmt)
  packed = decode_lib.prepare(
      layout_lib.pack_halves(codes.T), 128, own.signed)
  got = decode_lib.decode_array(packed, own, carrier)
  assert got.dtype == DTYPES[carrier]
  unit, base = (of(own, carrier) for of in (
      mosaic_gpu.weight_unit, mosaic_gpu.weight_base))
  np.testing.assert_array_equal(
      got.astype(np.float64), (integers(codes, fmt) - base) * unit)


def test_permute_is_that_of_ptx():
  """Our prmt does what the PTX manual says: bytes by number, then signs."""
  ops = decode_lib.array_ops(np)
  low, high = np.uint32(0x83828180), np.uint32(0x07060504)
  pick = lambda selector: hex(ops.permute(low, high, np.uint32(selector)))
  assert pick(0x3210) == hex(low) and pick(0x7654) == hex(high)
  assert pick(0x0123) == '0x80818283' and pick(0x4540) == '0x4050480'
  assert pick(0xc8c8) == '0xff00ff' and pick(0xffff3210) == hex(low)


@pytest.mark.parametrize('fmt', FORMATS)
def test_no_level_is_a_subnormal_of_fp8(fmt):
  """No level is a subnormal of fp8, which a device may flush to 0."""
  unit = mosaic_gpu.weight_unit(FPFormat.parse(fmt), 'fp8')
  levels = np.abs(integers(np.arange(16), fmt)) * unit
  least = ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).smallest_normal
  assert levels[levels > 0].min() >= least


@pytest.mark.parametrize('length, padded', [(64, 64), (37, 64), (130, 192)])
def test_prepare_pads_with_zeros_and_agrees_in_jax(length, padded):
  codes = draw_codes((3, length, 70))
  packed = layout_lib.pack_halves(codes)
  got = decode_lib.prepare(packed, length)
  assert got.shape == (128, 3, padded // 2) and got.dtype == np.uint8

  @jax.jit
  def in_jax(packed):
    prepared = decode_lib.prepare(packed, length)
    return prepared, decode_lib.decode_array(
        prepared, FPFormat.parse('E2M1'), 'int8')

  prepared, levels = in_jax(packed)
  np.testing.assert_array_equal(prepared, got)
  want = np.zeros((128, 3, padded))
  want[:70, :, :length] = np.moveaxis(integers(codes, 'E2M1'), -1, 0)
  np.testing.assert_array_equal(levels, want)


# M, K, N of the demo's and of real layers, and odd ones.
@pytest.mark.parametrize('carrier', DTYPES)
@pytest.mark.parametrize('shape', [
    (8192, 320, 320), (256, 1152, 4608), (16, 8192, 8192), (5, 30, 7)])
def test_matmul_lowers(shape, carrier):
  m, k, n = shape
  packed = jax.eval_shape(
      functools.partial(decode_lib.prepare, length=k),
      jax.ShapeDtypeStruct((-(-k // 2), n), jnp.uint8))
  text = lower(
      functools.partial(mosaic_gpu.matmul, fmt=FPFormat.parse('E2M1'),
                        out_dtype=jnp.bfloat16),
      ((m, k), DTYPES[carrier]), (packed.shape, jnp.uint8),
      ((n,), jnp.float32), ((n,), jnp.float32))
  assert text.count('custom_call @mosaic_gpu') == 1


@pytest.mark.parametrize('mapped', [False, True])
@pytest.mark.parametrize('stride', [1, 2])
def test_conv_lowers(stride, mapped):
  packed = ((320, 3, 3, 160), jnp.uint8)
  size = 32 // stride
  text = lower(
      functools.partial(mosaic_gpu.conv, fmt=FPFormat.parse('E3M0'),
                        strides=(stride, stride), padding=((1, 1), (1, 1)),
                        out_dtype=jnp.float32),
      ((2, 32, 32, 320), jnp.int8), packed, ((320,), jnp.float32),
      ((size, size, 320) if mapped else (320,), jnp.float32))
  assert text.count('custom_call @mosaic_gpu') == 1


@pytest.mark.parametrize('rows, depth', [
    *((rows, 128) for rows in blocks_lib.ROWS),
    *((256, depth) for depth in blocks_lib.DEPTHS)])
def test_blocks_fit_into_shared_memory(rows, depth):
  """The largest blocks fit: Mosaic adds up shared memory when it lowers."""
  stages = blocks_lib.most_stages(rows, depth, jnp.float32)
  text = lower(
      functools.partial(
          mosaic_gpu.matmul, fmt=FPFormat.parse('E2M1'), out_dtype=jnp.float32,
          blocks=blocks_lib.Blocks(rows, depth, stages)),
      ((512, 3072), jnp.int8), ((256, 1536), jnp.uint8),
      ((256,), jnp.float32), ((256,), jnp.float32))
  assert 'mosaic_gpu' in text


def test_choice_of_blocks():
  choose = lambda *sizes, **options: blocks_lib.ranked(
      blocks_lib.Work(*sizes, **options))[0]
  large = choose(8192, 8192, 8192)
  assert (large.rows, large.depth, large.split) == (256, 128, 1)
  few = choose(16, 8192, 8192)
  assert few.rows == 16 and few.split > 1
  # 132 multiprocessors: one wave of 66 * 2 blocks, not 33 * 2.
  assert choose(64 * 66, 256, 1024).rows == 64
  assert choose(16, 8192, 8192, splittable=False).split == 1


def test_why_not():
  e2m1 = FPFormat.parse('E2M1')
  x = jax.ShapeDtypeStruct((16, 256), jnp.int8)
  codes = jax.ShapeDtypeStruct((64, 128), jnp.uint8)
  why = functools.partial(mosaic_gpu.why_not, 'matmul')
  assert why(x, codes, fmt=e2m1) is None
  for reason, changes in {
      'UE4M0': {'fmt': FPFormat.parse('UE4M0')},
      'E3M2': {'fmt': FPFormat.parse('E3M2')},
      'x is bfloat16': {'x': jax.ShapeDtypeStruct((16, 256), jnp.bfloat16)},
      'see mosaic_gpu.prepare': {'codes': jax.ShapeDtypeStruct(
          (128, 64), jnp.uint8)},
      'not uint8': {'codes': jax.ShapeDtypeStruct((64, 128), jnp.int8)},
      'float16': {'out_dtype': jnp.float16},
      'nothing to multiply': {'x': jax.ShapeDtypeStruct((0, 256), jnp.int8)},
      'rows must be one of': {'blocks': blocks_lib.Blocks(40, 128, 2)},
      'whole steps': {'blocks': blocks_lib.Blocks(64, 192, 2)},
      'stages fit': {'blocks': blocks_lib.Blocks(256, 128, 9)},
      'multiple of the split': {'blocks': blocks_lib.Blocks(16, 128, 2, 4)},
      'ask for a depth of 64': {
          'blocks': blocks_lib.Blocks(16, 128, 2), 'group': 64},
  }.items():
    asked = {'x': x, 'codes': codes, 'fmt': e2m1} | changes
    assert reason in why(**asked)
  long = jax.ShapeDtypeStruct((1, 2**19), jnp.int8)
  codes = jax.ShapeDtypeStruct((64, 2**18), jnp.uint8)
  assert 'may leave int32' in why(long, codes, fmt=FPFormat.parse('E3M0'))
  with pytest.raises(ValueError, match='may leave int32'):
    mosaic_gpu.matmul(long, codes, None, None, fmt=FPFormat.parse('E3M0'),
                      out_dtype=jnp.float32)


def test_why_not_conv():
  x = jax.ShapeDtypeStruct((1, 2, 2, 64), jnp.int8)
  codes = jax.ShapeDtypeStruct((64, 3, 3, 32), jnp.uint8)
  why = functools.partial(
      mosaic_gpu.why_not, 'conv', x, codes, fmt=FPFormat.parse('E2M1'))
  assert why(padding=((1, 1), (1, 1))) is None
  assert 'a window of (3, 3)' in why(padding=((0, 0), (0, 0)))


def test_old_jax_does_not_interpret(monkeypatch):
  monkeypatch.setattr(jax, '__version_info__', (0, 10, 2))
  with pytest.raises(ValueError, match='use jax 0.11 or later'):
    mosaic_gpu.matmul(
        draw((8, 64), 'int8'), np.zeros((64, 32), np.uint8), np.ones(8),
        np.ones(8), fmt=FPFormat.parse('E2M1'), out_dtype=jnp.float32,
        interpret=True)


def epilogue(sums, scale, shift, out_dtype=np.float32):
  return (sums * scale.astype(np.float64) + shift).astype(out_dtype)


def affine(n, map_size=()):
  """Draws a scale of powers of two and a shift, so that float32 is exact."""
  rng = np.random.default_rng(2)
  scale = np.ldexp(1.0, rng.integers(-3, 3, n)).astype(np.float32)
  return scale, rng.integers(-9, 9, (*map_size, n)).astype(np.float32)


@interpreted
@pytest.mark.parametrize('fmt, carrier, shape, blocks, out_dtype', [
    ('E2M1', 'int8', (40, 256, 192), (32, 128, 2), np.float32),
    ('E3M0', 'fp8', (9, 130, 70), (16, 64, 2), ml_dtypes.bfloat16),
    ('E1M2', 'int8', (70, 256, 64), (64, 256, 1), np.float32),
    ('E2M1', 'int8', (16, 256, 130), (16, 64, 2, 4), np.float32),
    ('E1M2', 'int8', (5, 30, 7), None, np.float32)])
def test_matmul(fmt, carrier, shape, blocks, out_dtype):
  m, k, n = shape
  x, codes = draw((m, k), carrier), draw_codes((k, n))
  scale, shift = affine(n)
  y = mosaic_gpu.matmul(
      jnp.asarray(x), decode_lib.prepare(layout_lib.pack_halves(codes), k),
      scale, shift, fmt=FPFormat.parse(fmt), out_dtype=out_dtype,
      blocks=blocks and blocks_lib.Blocks(*blocks), interpret=True)
  sums = x.astype(np.int64) @ integers(codes, fmt)
  np.testing.assert_array_equal(
      np.asarray(y), epilogue(sums, scale, shift, out_dtype))


@interpreted
@pytest.mark.parametrize('split', [1, 2])
def test_rows_of_several_blocks(split):
  """Each block of rows and columns has its own terms of the epilogue."""
  rng = np.random.default_rng(4)
  vector = lambda n: rng.integers(-9, 9, n).astype(np.float32)
  x, codes = draw((70, 256), 'int8'), draw_codes((256, 192))
  rows = [vector(70) for _ in Rows._fields]
  columns = [vector(192) for _ in Columns._fields]
  scale, shift = vector(192), vector(192)
  y = mosaic_gpu.matmul(
      jnp.asarray(x), decode_lib.prepare(layout_lib.pack_halves(codes), 256),
      scale, shift, fmt=FPFormat.parse('E2M1'), out_dtype=jnp.float32,
      blocks=blocks_lib.Blocks(32, 64, 2, split), interpret=True,
      rows=Rows(*map(jnp.asarray, rows)),
      columns=Columns(*map(jnp.asarray, columns)))
  expected = kernel_oracle.epilogue(
      x.astype(np.int64) @ integers(codes, 'E2M1'), scale, shift, rows, columns)
  np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6 * np.abs(
      expected).max())


def convolve(x, w, strides, padding):
  """Convolves by the definition, in int64."""
  x = np.pad(x.astype(np.int64), ((0, 0), *padding, (0, 0)))
  kh, kw = w.shape[:2]
  h, w_ = ((s - k) // d + 1 for s, k, d in zip(
      x.shape[1:3], (kh, kw), strides, strict=True))
  return np.stack([np.stack([
      np.einsum('bijc,ijcn->bn', x[:, r * strides[0]:r * strides[0] + kh,
                                   c * strides[1]:c * strides[1] + kw], w)
      for c in range(w_)], 1) for r in range(h)], 1)


@interpreted
@pytest.mark.parametrize('window, strides, padding, mapped, size', [
    ((3, 3), (1, 1), ((1, 1), (1, 1)), False, (5, 8)),
    ((3, 3), (1, 1), ((1, 1), (1, 1)), True, (5, 6)),
    ((3, 3), (2, 2), ((0, 1), (0, 1)), True, (6, 6)),
    ((2, 5), (1, 1), ((0, 2), (3, 1)), True, (2, 5)),
    ((1, 1), (1, 1), ((2, 1), (0, 0)), False, (1, 5))])
def test_conv(window, strides, padding, mapped, size):
  x, codes = draw((2, *size, 70), 'int8'), draw_codes((*window, 70, 20))
  sums = convolve(x, integers(codes, 'E2M1'), strides, padding)
  scale, shift = affine(20, sums.shape[1:3] if mapped else ())
  y = mosaic_gpu.conv(
      jnp.asarray(x), decode_lib.prepare(layout_lib.pack_halves(codes), 70),
      scale, shift, fmt=FPFormat.parse('E2M1'), strides=strides,
      padding=padding, out_dtype=jnp.float32, interpret=True,
      blocks=blocks_lib.Blocks(64, 64, 2))
  np.testing.assert_array_equal(np.asarray(y), epilogue(sums, scale, shift))
