"""The TPU kernels on the CPU: interpreted, and lowered for TPUs."""

import functools
import itertools

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import kernel_oracle
import marks
import numpy as np
import pytest

from msfp_jax.kernels import carriers
from msfp_jax.kernels.epilogue import Columns
from msfp_jax.kernels.epilogue import Rows
from msfp_jax.kernels.mosaic_tpu import blocks as blocks_lib
from msfp_jax.kernels.mosaic_tpu import ops as mosaic_tpu
from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant import numbers as numbers_lib
from msfp_jax.quant.numbers import FPFormat

SIGNED = numbers_lib.formats_of_width(4, signed=True)
ACTS = SIGNED + numbers_lib.formats_of_width(4, signed=False)
UE4M0 = FPFormat.parse('UE4M0')
# Of int8 and bf16; fp8 takes UE4M0 too.
WEIGHTS = [fmt for fmt in ACTS if fmt != UE4M0]
CARRIERS = ('int8', 'bf16', 'fp8')
E2M1 = FPFormat.parse('E2M1')


def _integers(fmt: FPFormat, carrier: str = 'int8') -> np.ndarray:
  """The level of each code in steps, less the kernels' base, int64."""
  return np.rint(fmt.values() / fmt.step).astype(
      np.int64) - mosaic_tpu.weight_base(fmt, carrier)


def _draw(shape):
  """Draws codes, and packs them in the canonical way."""
  codes = np.random.default_rng(0).integers(0, 16, shape, dtype=np.uint8)
  return codes, jnp.asarray(layout_lib.pack_halves(codes))


def _x(fmt: FPFormat, carrier: str, shape):
  """Draws levels, as the carrier holds them and in float64."""
  carried = carriers.carry(fmt, carrier)
  codes = np.random.default_rng(1).integers(0, 2**fmt.bits, shape)
  values = carried.values(carried.lowest_offset)[codes]
  x = jnp.asarray(values).astype(carried.dtype)
  np.testing.assert_array_equal(np.asarray(x, np.float64), values)
  return x, values


# Compiling what the interpreter unrolls takes longer than running it.
_jit = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def _matmul(fmt=E2M1, out_dtype=jnp.float32, interpret=True, **settings):
  jit = _jit if interpret else jax.jit
  return jit(functools.partial(
      mosaic_tpu.matmul, fmt=fmt, out_dtype=out_dtype, interpret=interpret,
      **settings))


def _conv(strides=(1, 1), padding=((1, 1), (1, 1)), fmt=E2M1,
          out_dtype=jnp.float32, interpret=True, **settings):
  jit = _jit if interpret else jax.jit
  return jit(functools.partial(
      mosaic_tpu.conv, fmt=fmt, strides=strides, padding=padding,
      out_dtype=out_dtype, interpret=interpret, **settings))


def _conv_oracle(x, w, strides, padding):
  """Convolves tap by tap; int64 stays int64."""
  x = np.pad(x, ((0, 0), *padding, (0, 0)))
  (kh, kw), (sh, sw) = w.shape[:2], strides
  height = (x.shape[1] - kh) // sh + 1
  width = (x.shape[2] - kw) // sw + 1
  y = 0
  for i, j in itertools.product(range(kh), range(kw)):
    tap = x[:, i:i + sh * height:sh, j:j + sw * width:sw]
    y = y + tap[:, :height, :width] @ w[i, j]
  return y


@pytest.mark.parametrize('carrier', CARRIERS)
@pytest.mark.parametrize('fmt', [
    *SIGNED, *(pytest.param(fmt, marks=pytest.mark.slow) for fmt in WEIGHTS
               if not fmt.signed)], ids=str)
def test_matmul_of_every_pair_of_formats(fmt, carrier):
  m, k, n = 40, 77, 50
  codes, packed = _draw((k, n))
  w = _integers(fmt, carrier)[codes]
  rng = np.random.default_rng(2)
  scale = np.exp2(rng.integers(-3, 3, n)).astype(np.float32)
  shift = rng.integers(-9, 9, n).astype(np.float32)
  multiply = _matmul(fmt)
  for act in ACTS:
    if not carriers.carry(act, carrier):
      assert (str(act), carrier) == ('UE4M0', 'int8')
      continue
    x, values = _x(act, carrier, (m, k))
    y = multiply(x, packed, scale / mosaic_tpu.weight_unit(fmt, carrier), shift)
    sums = values @ w
    exact = carrier == 'int8' or (
        fmt.signed and kernel_oracle.is_exact(fmt, act, k, 'bf16'))
    if exact:
      expected = sums.astype(np.float32) * scale + shift
      np.testing.assert_array_equal(np.asarray(y), expected, str(act))
    else:
      # Any order of k roundings, and two of the epilogue.
      bound = (k + 2) * 2.0**-24 * (np.abs(values) @ np.abs(w) * scale + 9)
      assert (np.abs(y - (sums * scale + shift)) <= bound).all(), act


@pytest.mark.parametrize('m,k,n,blocks', [
    (1, 2, 1, None), (33, 320, 130, (32, 128, 1024)),
    (40, 1025, 257, (32, 128, 256))])
def test_matmul_of_odd_shapes(m, k, n, blocks):
  codes, packed = _draw((k, n))
  x, values = _x(E2M1, 'int8', (m, k))
  y = _matmul(blocks=blocks)(x, packed, jnp.ones(n), jnp.zeros(n))
  np.testing.assert_array_equal(
      np.asarray(y, np.int64), values.astype(np.int64) @ _integers(E2M1)[codes])


@pytest.mark.parametrize('op', [
    'matmul', pytest.param('conv', marks=pytest.mark.slow)])
def test_rows_of_several_blocks(op):
  """Each block of rows and columns has its own terms of the epilogue."""
  rng = np.random.default_rng(4)
  draw = lambda *shape: rng.integers(-9, 9, shape).astype(np.float32)
  if op == 'matmul':
    codes, packed = _draw((300, 130))
    x, values = _x(E2M1, 'int8', (70, 300))
    sums = values @ _integers(E2M1)[codes]
    run, shift = _matmul(blocks=(32, 128, 128)), draw(130)
  else:
    codes, packed = _draw((3, 3, 16, 130))
    x, values = _x(E2M1, 'int8', (2, 3, 8, 16))
    sums = _conv_oracle(
        values, _integers(E2M1)[codes], (1, 1), ((1, 1), (1, 1)))
    run, shift = _conv(blocks=(16, 128)), draw(3, 8, 130)
  scale, columns = draw(130), [draw(130) for _ in Columns._fields]
  rows = [draw(*sums.shape[:-1]) for _ in Rows._fields]
  y = run(x, packed, scale, shift, rows=Rows(*rows), columns=Columns(*columns))
  expected = kernel_oracle.epilogue(sums, scale, shift, rows, columns)
  np.testing.assert_allclose(
      y, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


CONVS = {  # x, window, output channels, strides, padding, blocks
    '3x3, a row fills registers': (
        (2, 5, 30, 16), (3, 3), 24, (1, 1), ((1, 1), (1, 1)), (64, 128)),
    '3x3': ((2, 8, 8, 32), (3, 3), 40, (1, 1), ((1, 1), (1, 1)), None),
    '3x3, rows apart': (
        (2, 10, 9, 64), (3, 3), 130, (1, 1), ((1, 1), (1, 1)), (32, 128)),
    '3x3 by 2': (
        (1, 9, 8, 48), (3, 3), 16, (2, 2), ((0, 1), (0, 1)), (16, 128)),
    '3x3, no borders': (
        (1, 7, 6, 5), (3, 3), 3, (1, 1), ((0, 0), (0, 0)), None),
    '5x2 by 3 and 1': (
        (1, 11, 7, 34), (5, 2), 8, (3, 1), ((2, 1), (0, 2)), None),
    '1x1 by 2': ((2, 6, 5, 24), (1, 1), 12, (2, 2), ((0, 0), (0, 0)), None),
    '1x1 in borders': (
        (1, 3, 3, 8), (1, 1), 8, (1, 1), ((1, 1), (1, 1)), None),
}


@pytest.mark.parametrize('case', marks.quick(
    [list(CONVS)[0], '3x3 by 2', '5x2 by 3 and 1', '1x1 in borders'], CONVS))
def test_conv(case):
  shape, window, n, strides, padding, blocks = CONVS[case]
  codes, packed = _draw((*window, shape[-1], n))
  x, values = _x(E2M1, 'int8', shape)
  sums = _conv_oracle(
      values.astype(np.int64), _integers(E2M1)[codes], strides, padding)
  scale = np.exp2(np.arange(n) % 5 - 2).astype(np.float32)
  shift = np.random.default_rng(3).integers(-50, 50, sums.shape[1:]).astype(
      np.float32)
  if '1x1' in case:
    shift = shift[0, 0]
  y = _conv(strides, padding, blocks=blocks)(x, packed, scale, shift)
  np.testing.assert_array_equal(y, sums.astype(np.float32) * scale + shift)


@pytest.mark.parametrize('fmt,carrier', [
    *((fmt, 'int8') for fmt in SIGNED), (E2M1, 'bf16'), (E2M1, 'fp8')])
def test_conv_of_every_activation_format(fmt, carrier):
  codes, packed = _draw((3, 3, 20, 24))
  convolve = _conv(fmt=fmt)
  for act in ACTS:
    if not carriers.carry(act, carrier):
      continue
    x, values = _x(act, carrier, (1, 6, 8, 20))
    if not kernel_oracle.is_exact(fmt, act, 9 * 20, 'bf16'):
      values = np.sign(values)
      x = jnp.asarray(values).astype(x.dtype)
    y = convolve(x, packed, jnp.full(
        24, 1 / mosaic_tpu.weight_unit(fmt, carrier)), jnp.zeros(24))
    expected = _conv_oracle(
        values, _integers(fmt)[codes], (1, 1), ((1, 1), (1, 1)))
    np.testing.assert_array_equal(np.asarray(y, np.float64), expected, str(act))


@pytest.mark.parametrize('fmt, carrier', [
    *itertools.product(WEIGHTS, CARRIERS), (UE4M0, 'fp8')])
def test_every_byte_is_decoded_in_every_row(fmt, carrier):
  # An identity matrix shows the weights; all bytes beside all bytes' shifts.
  packed = (np.arange(64, dtype=np.uint8)[:, None]
            + np.arange(256, dtype=np.uint8)[None] * 37)
  identity = jnp.eye(128).astype(carriers.DTYPES[carrier][0])
  unit = mosaic_tpu.weight_unit(fmt, carrier)
  w = _matmul(fmt)(
      identity, packed, np.full(256, 1 / unit, np.float32), np.zeros(256))
  codes = layout_lib.unpack_halves(packed, 128)
  assert len(np.unique(codes[:64] + codes[64:] * 16)) == 256
  np.testing.assert_array_equal(
      np.asarray(w, np.int64), _integers(fmt, carrier)[codes])


def test_result_is_rounded_once_to_bfloat16():
  codes, packed = _draw((30, 20))
  x, values = _x(E2M1, 'int8', (10, 30))
  scale, shift = np.float32(0.75), np.float32(3.0)
  y = _matmul(out_dtype=jnp.bfloat16)(
      x, packed, np.full(20, scale), np.full(20, shift))
  exact = values @ _integers(E2M1)[codes] * 0.75 + 3
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


@pytest.mark.slow
def test_no_races_and_no_reads_beyond_an_array(capfd):
  interpret = pltpu.InterpretParams(
      detect_races=True, out_of_bounds_reads='raise')
  codes, packed = _draw((600, 130))
  x, values = _x(E2M1, 'int8', (70, 600))
  y = _matmul(blocks=(32, 128, 128), interpret=interpret)(
      x, packed, np.ones(130), np.zeros(130))
  np.testing.assert_array_equal(y, values @ _integers(E2M1)[codes])
  codes, packed = _draw((3, 3, 40, 130))
  x, values = _x(E2M1, 'bf16', (2, 9, 8, 40))
  y = _conv((2, 1), blocks=(16, 128), interpret=interpret)(
      x, packed, np.ones(130), np.zeros(130))
  np.testing.assert_array_equal(y, _conv_oracle(
      values, _integers(E2M1)[codes], (2, 1), ((1, 1), (1, 1))))
  assert 'RACE' not in capfd.readouterr().out


def _specs(carrier, k=100, n=50):
  struct = jax.ShapeDtypeStruct
  half, dtype = -(-k // 2), carriers.DTYPES[carrier][0]
  row = struct((n,), jnp.float32)
  return ((struct((40, k), dtype), struct((half, n), jnp.uint8), row, row),
          (struct((2, 8, 8, k), dtype), struct((3, 3, half, n), jnp.uint8), row,
           struct((8, 8, n), jnp.float32)))


@pytest.mark.parametrize('carrier', CARRIERS)
def test_lowers_for_tpus(carrier):
  for fmt in SIGNED:
    for op, specs in zip((
        _matmul(fmt, jnp.bfloat16, interpret=False),
        _conv(fmt=fmt, interpret=False)), _specs(carrier), strict=True):
      text = op.trace(*specs).lower(lowering_platforms=('tpu',)).as_text()
      assert 'tpu_custom_call' in text


@pytest.mark.parametrize('op', ['matmul', 'conv'])
def test_why_not(op):
  make = lambda carrier, **sizes: _specs(carrier, **sizes)[op == 'conv'][:2]
  why_not = functools.partial(mosaic_tpu.why_not, op)
  x, codes = make('int8')
  assert why_not(x, codes, fmt=E2M1) is None
  assert why_not(x, codes, fmt=E2M1, chip='v5e') is None
  for chip, carrier, ways_out in (
      ('7x', 'int8', 'fp8 or bf16'), ('v6e', 'fp8', 'int8 or bf16')):
    reason = why_not(*make(carrier), fmt=E2M1, chip=chip)
    assert f'TPU {chip}' in reason and ways_out in reason
  for text, args, settings in (
      ('UE4M0', (x, codes), {'fmt': UE4M0}),
      ('E3M2', (x, codes), {'fmt': FPFormat.parse('E3M2')}),
      ('float32', make('f32'), {}),
      ('float16', (x, codes), {'out_dtype': jnp.float16}),
      ('grouped', (x, make('int8', k=50)[1]), {}),
      ('axes', (x, jnp.zeros((3,), jnp.uint8)), {}),
      ('nothing', make('int8', n=0), {}),
      ('int32', make('int8', k=2**18), {'fmt': FPFormat.parse('E3M0')}),
      ('MiB', make('bf16', k=2**18), {})):
    reason = why_not(*args, **{'fmt': E2M1, **settings})
    assert text in reason, reason


def test_unknown_tpus_are_refused(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  x, codes = _specs('int8')[0][:2]
  assert 'none of the TPUs' in mosaic_tpu.why_not('matmul', x, codes, fmt=E2M1)


def test_operations_raise_what_why_not_says():
  x, codes, scale, shift = (np.zeros(s.shape, s.dtype)
                            for s in _specs('f32')[0])
  with pytest.raises(ValueError, match='x is float32'):
    mosaic_tpu.matmul(x, codes, scale, shift, fmt=E2M1, out_dtype=jnp.float32)
  x, codes, scale, shift = (np.zeros(s.shape, s.dtype)
                            for s in _specs('int8')[1])
  with pytest.raises(ValueError, match='window of'):
    mosaic_tpu.conv(x[:, :2], codes, scale, shift, fmt=E2M1, strides=(1, 1),
                    padding=((0, 0), (0, 0)), out_dtype=jnp.float32)


@pytest.mark.parametrize('chip', [None, *blocks_lib.CHIPS])
def test_blocks_fit_the_vector_memory(chip):
  for itemsize, n, beside, (size, c) in itertools.product(
      (1, 2), (64, 320, 1280), (0, blocks_lib.SCALING + blocks_lib.SHIFTING), (
          (8, 2560), (32, 1920), (64, 960), (128, 512), (256, 256))):
    cut = blocks_lib.conv((size, size), (3, 3), (1, 1), c // 2, n, itemsize, 4,
                          chip, beside=beside)
    assert cut.vmem(
        (3, 3), (1, 1), itemsize, 4, beside) <= blocks_lib.budget(chip)
    cut = blocks_lib.matmul(
        size * size, c * 2, n, itemsize, 4, chip, beside=beside)
    assert cut.vmem(itemsize, 4, beside) <= blocks_lib.budget(chip)
