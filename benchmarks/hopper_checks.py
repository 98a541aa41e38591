"""Whether the Hopper kernels compute what they should, on this device."""

from collections.abc import Iterator
import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from msfp_jax.kernels import carriers
from msfp_jax.kernels.epilogue import Columns
from msfp_jax.kernels.epilogue import Rows
from msfp_jax.kernels.mosaic_gpu import blocks as blocks_lib
from msfp_jax.kernels.mosaic_gpu import ops as mosaic_gpu
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant.numbers import FPFormat

E2M1 = FPFormat.parse('E2M1')


def fp8_bound(length: int) -> float:
  """The largest error of a sum in fp8, over the sum of magnitudes.

  Hopper adds the 32 products of an instruction to the sum with 13 fractional
  bits of the largest.
  """
  return math.ceil(length / 32) * 2.0**-13


def exact(x, w, padding: int = 0, stride: int = 1) -> jax.Array:
  """Computes x @ w, or the convolution, exactly for integers up to 2^24.

  Pixel by pixel of the window, since cuDNN's fast algorithms round.

  Args:
    x: float32 `[M, K]` or `[B, H, W, C]`.
    w: `[K, N]` or HWIO.
    padding: zeros below and to the right of a stride of 2; else all around.
    stride: 1 or 2.
  """
  dot = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST)
  if x.ndim == 2:
    return dot(x, w)
  before = padding if stride == 1 else 0
  x = jnp.pad(x, ((0, 0), (before, padding), (before, padding), (0, 0)))
  kh, kw = w.shape[:2]
  h, width = x.shape[1] - kh + 1, x.shape[2] - kw + 1
  return sum(dot(x[:, i:i + h:stride, j:j + width:stride], w[i, j])
             for i in range(kh) for j in range(kw))


def check() -> Iterator[tuple[str, bool]]:
  """Yields claims about the kernels on this device, and whether they hold."""
  rng = np.random.default_rng(1)
  yield from _decoding(rng)
  yield from _blocks(rng)
  yield _subnormals(rng)
  yield from _convolutions(rng)
  yield from _by_row(rng)
  yield from _groups(rng)


def _multiply(x, codes, fmt=E2M1, blocks=None, **options) -> np.ndarray:
  """Multiplies x by codes `[K, N]`, in float32."""
  ones = np.ones(codes.shape[1], np.float32)
  run = jax.jit(functools.partial(
      mosaic_gpu.matmul, fmt=fmt, out_dtype=jnp.float32, blocks=blocks,
      **options))
  prepared = mosaic_gpu.prepare(
      layout_lib.pack_halves(codes), len(codes), fmt.signed)
  return np.asarray(run(x, prepared, ones, 0 * ones))


def _decoding(rng) -> Iterator[tuple[str, bool]]:
  codes = rng.integers(0, 16, (256, 64), np.uint8)
  for fmt in map(FPFormat.parse, ('E1M2', 'E2M1', 'E3M0')):
    for carrier in ('int8', 'fp8'):
      carried = carriers.carry(fmt, carrier)
      y = _multiply(jnp.eye(256, dtype=carried.dtype), codes, fmt)
      yield (f'{fmt} decodes to {carrier}',
             np.array_equal(y, carried.values()[codes]))


def _blocks(rng) -> Iterator[tuple[str, bool]]:
  """Checks every block with all int8 values, on shapes it does not divide."""
  codes = rng.integers(0, 16, (3072, 1000), np.uint8)
  x = rng.integers(-128, 128, (500, 3072)).astype(np.int8)
  levels = carriers.carry(E2M1, 'int8').values()[codes]
  want = np.float32(x.astype(np.float64) @ levels)  # exact in float64
  in_xla = np.asarray(jax.jit(functools.partial(
      lax.dot, preferred_element_type=jnp.int32))(x, levels.astype(np.int8)))
  yield 'int8 is exact in XLA', np.array_equal(in_xla, want)
  for rows in blocks_lib.ROWS:
    for split in (1, 4):
      blocks = blocks_lib.Blocks(rows, 128, 2, split)
      yield (f'int8 is exact in {blocks}',
             np.array_equal(_multiply(x, codes, blocks=blocks), want))


def _subnormals(rng) -> tuple[str, bool]:
  """Checks inputs below fp8's least normal number, 2^-6."""
  codes = rng.integers(0, 16, (256, 64), np.uint8)
  levels = carriers.carry(E2M1, 'fp8').values()[codes]
  x = np.ldexp(rng.integers(-7, 8, (64, 256)).astype(np.float32), -9)
  error = np.abs(_multiply(jnp.asarray(x, jnp.float8_e4m3fn), codes)
                 - x @ levels)
  bound = fp8_bound(256) * (np.abs(x) @ np.abs(levels))
  return "fp8's subnormals count", bool((error <= bound).all())


def _convolutions(rng) -> Iterator[tuple[str, bool]]:
  """Checks convolutions with a map of shifts."""
  codes = rng.integers(0, 16, (3, 3, 96, 80), np.uint8)
  x = rng.integers(-7, 8, (3, 20, 24, 96)).astype(np.int8)
  levels = carriers.carry(E2M1, 'int8').values()[codes].astype(np.float32)
  ones = np.ones(80, np.float32)
  prepared = mosaic_gpu.prepare(layout_lib.pack_halves(codes), 96)
  for stride in (1, 2):
    want = np.asarray(exact(np.float32(x), levels, 1, stride))
    magnitude = np.asarray(exact(np.abs(np.float32(x)), np.abs(levels), 1,
                                 stride))
    shift = rng.integers(-9, 9, want.shape[1:]).astype(np.float32)
    before = 1 if stride == 1 else 0
    run = jax.jit(functools.partial(
        mosaic_gpu.conv, fmt=E2M1, strides=(stride, stride),
        padding=((before, 1), (before, 1)), out_dtype=jnp.float32))
    for carrier, bound in (('int8', 0.0), ('fp8', fp8_bound(9 * 96))):
      y = np.asarray(run(jnp.asarray(x, carriers.DTYPES[carrier][0]), prepared,
                         ones, shift))
      yield (f'convolution of stride {stride} in {carrier}', bool(
          (np.abs(y - want - shift) <= bound * magnitude).all()))


def _by_row(rng) -> Iterator[tuple[str, bool]]:
  """Checks scales by token and weights less an offset, all exact."""
  fmt = FPFormat.parse('UE2M2')
  codes = rng.integers(0, 16, (320, 200), np.uint8)
  levels = carriers.carry(fmt, 'int8').values()[codes]
  x = rng.integers(-128, 128, (100, 320)).astype(np.int8)
  scale = np.ldexp(np.float32(1), rng.integers(-3, 3, 100))
  offset = rng.integers(0, 29, 200).astype(np.float32)
  wide = x.astype(np.float64)
  y = _multiply(x, codes, fmt, rows=Rows(
      scale=scale, total=wide.sum(1).astype(np.float32)),
                columns=Columns(offset=offset))
  yield ('scales by token, unsigned weights with zero points',
         np.array_equal(y, wide @ (levels - offset) * scale[:, None]))


def _groups(rng) -> Iterator[tuple[str, bool]]:
  """Checks what differs by group, of powers of two, so that it is exact."""
  codes = rng.integers(0, 16, (320, 200), np.uint8)
  x = rng.integers(-7, 8, (100, 320)).astype(np.int8)
  integers = np.where(codes & 8, -1.0, 1.0) * (codes & 7)
  for group in (16, 32, 64):
    power = lambda *shape: np.ldexp(np.float32(1), rng.integers(-3, 3, shape))
    of_w, of_x = power(320 // group, 200), power(100, 320 // group)
    scaled = integers * of_w.repeat(group, 0)
    options = {'fmt': FPFormat.parse('E1M2'), 'groups': of_w, 'group': group}
    yield (f'scales of weights in groups of {group}', np.array_equal(
        _multiply(x, codes, **options), x @ scaled))
    yield (f'scales of both in groups of {group}', np.array_equal(
        _multiply(x, codes, **options, inputs=of_x, input_group=group),
        x * of_x.repeat(group, 1) @ scaled))
    flags = rng.integers(0, 5, (320 // group, 200), np.uint8)
    yield (f"QuaRTZ's FLAGs of {group}", np.array_equal(
        _multiply(x, codes, FPFormat.parse('E1M2'), flags=flags,
                  flag_group=group, wide=FPFormat.parse('E1M6')),
        x @ np.ldexp(integers, flags.repeat(group, 0))))
