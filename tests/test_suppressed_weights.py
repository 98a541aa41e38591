"""Weights in QuaRTZ by the TPU kernels: values, lowering, what is refused."""

import functools

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from kernel_cases import jit
from kernel_cases import prepared
import kernel_oracle
from kernel_oracle import integers
import marks
import numpy as np
import pytest

from msfp_jax import kernels
from msfp_jax.kernels import carriers
from msfp_jax.kernels import choice
from msfp_jax.kernels.mosaic_gpu import ops as mosaic_gpu
from msfp_jax.kernels.mosaic_tpu import ops as mosaic_tpu
from msfp_jax.quant import geometry as geometry_lib
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


def draw(shape, group, wide):
  """Codes `[..., K, N]`, FLAGs by group, and the integers that they are."""
  rng = np.random.default_rng(0)
  codes = rng.integers(0, 16, shape, dtype=np.uint8)
  flags = rng.integers(
      0, wide.bits - 3, (*shape[:-2], -(-shape[-2] // group), shape[-1]),
      dtype=np.uint8)
  return codes, flags, integers(codes, flags, group, wide.signed)


def run(op, x, codes, flags, group, fmt=E1M2, wide=INT8, interpret=True,
        **settings):
  """Scales of 1: the integers that a kernel sums, jitted."""
  n = codes.shape[-1]
  return jit(lambda x, codes, flags: getattr(mosaic_tpu, op)(
      x, codes, jnp.ones(n), jnp.zeros(n), fmt=fmt, wide=wide, flags=flags,
      flag_group=group, out_dtype=jnp.float32, interpret=interpret,
      **settings))(x, layout_lib.pack_halves(codes), flags)


@pytest.mark.parametrize('fmt, wide, carrier, group', [
    (E1M2, INT8, 'int8', 16), (E1M2, INT8, 'bf16', 32),
    (E1M2, FPFormat.parse('E1M4'), 'int8', 4), (UE1M3, UINT8, 'int8', 32),
    (UE1M3, FPFormat.parse('UE1M6'), 'bf16', 64)])
def test_every_code_under_every_flag(fmt, wide, carrier, group):
  """An identity matrix shows the weights, unsigned ones of 8 bits less 128."""
  codes, flags, expected = draw((128, 200), group, wide)
  pairs = codes + 16 * flags.repeat(group, 0)
  assert len(np.unique(pairs)) == 16 * (wide.bits - 3)
  identity = jnp.eye(128).astype(carriers.DTYPES[carrier][0])
  found = run('matmul', identity, codes, flags, group, fmt, wide)
  np.testing.assert_array_equal(found, expected - 128 * (wide == UINT8))


@pytest.mark.parametrize('case', ['random', 'worst'])
@pytest.mark.parametrize('k, group', [(600, 16), (640, 32), (77 + 3, 64)])
def test_products(case, k, group):
  """In several steps of K; of 600, FLAGs change within a half's groups of 4."""
  codes, flags, w = draw((k, 130), group, INT8)
  x = np.random.default_rng(1).integers(-128, 128, (40, k))
  if case == 'worst':
    # -7 << 4 and the largest of int8, without a term that cancels another.
    x, codes, flags = np.full_like(x, -128), codes | 15, flags * 0 + 4
    w = integers(codes, flags, group)
    assert set(w.flat) == {-112}
  found = run('matmul', np.int8(x), codes, flags, group,
              blocks=(32, 128, 128))
  np.testing.assert_array_equal(found, np.float32(x @ w))


@pytest.mark.parametrize('x_shape, window, group, geometry', [
    ((2, 5, 6, 40), (3, 3), 16, {'padding': BORDERS, 'blocks': (16, 128)}),
    ((1, 7, 5, 96), (3, 2), 32, {'padding': BORDERS, 'strides': (2, 1)}),
    ((2, 4, 4, 64), (1, 1), 32, {'padding': ((0, 0), (0, 0))})])
def test_convolutions(x_shape, window, group, geometry):
  settings = {'strides': (1, 1)} | geometry
  codes, flags, w = draw((*window, x_shape[-1], 130), group, INT8)
  x = np.random.default_rng(1).integers(-128, 128, x_shape)
  expected = kernel_oracle.conv(
      x, w, settings['strides'], settings['padding'], (1, 1))
  found = run('conv', np.int8(x), codes, flags, group, **settings)
  np.testing.assert_array_equal(found, np.float32(expected))


def test_no_races_and_no_reads_beyond_flags(capfd):
  """Where nothing fills blocks: part of a column tile, of rows, of a half."""
  interpret = pltpu.InterpretParams(
      detect_races=True, out_of_bounds_reads='raise')
  codes, flags, w = draw((600, 130), 16, INT8)
  x = np.random.default_rng(1).integers(-128, 128, (70, 600))
  found = run('matmul', np.int8(x), codes, flags, 16, interpret=interpret,
              blocks=(32, 128, 128))
  np.testing.assert_array_equal(found, np.float32(x @ w))
  assert 'RACE' not in capfd.readouterr().out


def layer_of(weights, inputs, shape):
  """A layer with weights of all magnitudes, packed."""
  rng = np.random.default_rng(2)
  kernel = rng.normal(size=shape) * np.exp2(-rng.integers(0, 7, shape))
  return QLayer(quantize(weights, np.float32(kernel), -2).packed(), inputs,
                np.float32(rng.normal(size=shape[-1])))


def quartz_weights(signed=True, **options):
  return quartz(4, first_stage(signed, 'channel'), **options)


STATIC = Static(UE1M3, np.float32(0.3), np.float32(-0.28))
LAYERS = {  # weights, inputs, window and inputs, bits are equal
    'dense': (quartz_weights(), Static(E1M2, np.float32(0.3)), (64,), True),
    'truncated': (quartz_weights(group=32, rounding='truncate'), STATIC,
                  (128,), True),
    'window': (quartz_weights(group=32), STATIC, (3, 3, 64), True),
    'QuaRTZ both': (quartz_weights(), quartz(4), (96,), True),
    'both, unsigned': (quartz_weights(False), quartz(4, first_stage(False)),
                       (64,), False),
    'scales of groups': (quartz(4, Block(INT8, 'group', 32, 'e4m3', True)),
                         Static(E1M2, np.float32(0.3)), (3, 3, 64), False)}


@pytest.mark.parametrize('name', marks.quick(('window',), LAYERS))
def test_layers(monkeypatch, name):
  """Through the door, packed and prepared: as XLA's int8, and as float64."""
  for op in ('matmul', 'conv'):
    monkeypatch.setattr(mosaic_tpu, op, functools.partial(
        getattr(mosaic_tpu, op), interpret=True))
  weights, inputs, shape, equal = LAYERS[name]
  layer = layer_of(weights, inputs, (*shape, 9))
  assert len(np.unique(layer.weight.shift)) > 1
  x = np.float32(np.random.default_rng(3).normal(size=(2, 4, 5, shape[-1])))
  geometry = None if len(shape) == 1 else geometry_lib.resolve(
      x.shape, shape[:-1], padding=BORDERS)
  compute = jit(lambda x, layer, **options: kernels.run(
      layer, x, geometry, **options), static_argnames='implementation')
  found = [compute(x, one, implementation='mosaic_tpu')
           for one in (layer, prepared(layer, 'mosaic_tpu'))]
  if equal:
    expected = jit(lambda x, layer: kernels.run(
        layer, x, geometry, implementation='xla', carrier='int8'))(x, layer)
    for one in found:
      np.testing.assert_array_equal(one, expected)
  x, w = (np.float64(tensor.dequantize())
          for tensor in (quantize(inputs, x, -1), layer.weight))
  exact = layer.bias + (x @ w if geometry is None else kernel_oracle.conv(
      x, w, (1, 1), BORDERS, (1, 1)))
  for one in found:
    np.testing.assert_allclose(
        one, exact, rtol=1e-6, atol=1e-6 * np.abs(exact).max())


def test_they_lower_for_tpus():
  struct = jax.ShapeDtypeStruct
  row = struct((50,), jnp.float32)
  settings = {'fmt': E1M2, 'wide': INT8, 'flag_group': 16,
              'out_dtype': jnp.bfloat16}
  for dtype in (jnp.int8, jnp.bfloat16):
    matmul = lambda x, codes, flags, *end: mosaic_tpu.matmul(
        x, codes, *end, flags=flags, **settings)
    conv = lambda x, codes, flags, *end: mosaic_tpu.conv(
        x, codes, *end, flags=flags, strides=(1, 1), padding=BORDERS,
        **settings)
    for op, window, shape in ((matmul, (), (40,)), (conv, (3, 3), (2, 8, 8))):
      text = jax.jit(op).trace(
          struct((*shape, 80), dtype), struct((*window, 40, 50), jnp.uint8),
          struct((*window, 5, 50), jnp.uint8), row, row).lower(
              lowering_platforms=('tpu',)).as_text()
      assert 'tpu_custom_call' in text


WIDE_BLOCK = Block(INT8, 'group', 32, 'bf16')
REFUSED = {
    'halves of 19': (quartz_weights(), 38, {},
                     'shifts the levels of 4 inputs at once, and FLAGs of 16'),
    'groups of 2': (quartz_weights(group=2), 64, {}, 'FLAGs of 2 are of fewer'),
    'scales in bfloat16': (quartz(4, WIDE_BLOCK), 64, {},
                           'has no room for the digits of bfloat16'),
    'fp8': (quartz_weights(), 64, {'carrier': 'fp8'},
            'fp8 does not hold weights in E1M6'),
    '5 bits': (quartz(5, first_stage(shared='channel')), 64, {},
               'it reads weights of 4 bits, and those of this layer are E1M3'),
    'unsigned in groups': (
        quartz(4, Block(UINT8, 'group', 32, 'e4m3', zero_point=0.0)), 64, {},
        'takes 128 off the levels of UE1M7')}


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_not_taken_says_why(name):
  weights, length, options, reason = REFUSED[name]
  layer = layer_of(weights, Static(E1M2, np.float32(0.3)), (length, 9))
  with pytest.raises(ValueError, match=reason):
    kernels.run(layer, np.zeros((2, length), np.float32),
                implementation='mosaic_tpu', **options)


def test_integers_alone_are_shifted():
  layer = layer_of(quartz_weights(), quartz(4), (64, 9))
  for parts, reason in (
      ({'wide': None}, 'E1M2, shifted to no wider format'),
      ({'fmt': FPFormat.parse('E2M1'), 'wide': FPFormat.parse('E2M5')},
       'E2M1, shifted to E2M5')):
    broken = layer.replace(weight=layer.weight.replace(**parts))
    assert reason in choice.why_not('mosaic_tpu', broken, (2, 64))
  x = jax.ShapeDtypeStruct((2, 64), jnp.float8_e4m3fn)
  assert 'shifted to E1M6, which fp8 does not hold' in mosaic_tpu.why_not(
      'matmul', x, layer.weight.data, fmt=E1M2, wide=INT8, flag_group=16)


@pytest.mark.parametrize('missing', [
    {'flag_group': 0}, {'wide': None}, {'flags': None},
    {'groups': np.ones((4, 8), np.float32)}, {'group': 16}])
@pytest.mark.parametrize('ops', [mosaic_tpu, mosaic_gpu])
def test_what_belongs_together_comes_together(ops, missing):
  """FLAGs without their group or format would be left out in silence."""
  x = jnp.zeros((8, 64), jnp.int8)
  given = {'flags': np.ones((4, 8), np.uint8), 'flag_group': 16,
           'wide': FPFormat.parse('E1M6')} | missing
  with pytest.raises(ValueError, match='all three, or none|both, or neither'):
    ops.matmul(x, np.zeros((32, 8), np.uint8), jnp.ones(8), jnp.zeros(8),
               fmt=FPFormat.parse('E1M2'), out_dtype=jnp.float32,
               interpret=True, **given)
