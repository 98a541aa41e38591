"""The TPU kernels compiled to the end for TPUs that need not be there.

libtpu compiles for a chip that it is told about, and refuses what lowering
lets pass: instructions that a generation lacks, too much vector memory.
"""

import functools
import re

import jax
import jax.numpy as jnp
from kernel_cases import quantized_with_totals
import pytest

from benchmarks import tpu_cost
from msfp_jax.kernels import carriers
from msfp_jax.kernels.epilogue import Columns
from msfp_jax.kernels.epilogue import Rows
from msfp_jax.kernels.mosaic_tpu import blocks as blocks_lib
from msfp_jax.kernels.mosaic_tpu import ops as mosaic_tpu
from msfp_jax.quant import numbers as numbers_lib
from msfp_jax.quant.numbers import FPFormat

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures('uncached')]
pytest.importorskip('libtpu', reason='libtpu compiles for TPUs')

WEIGHTS = numbers_lib.formats_of_width(4, signed=True)
# All that int8 holds.
UNSIGNED = [fmt for fmt in numbers_lib.formats_of_width(4, signed=False)
            if carriers.carry(fmt, 'int8')]
CHIPS = tuple(tpu_cost.TOPOLOGIES)
NATIVE = [(chip, carrier) for chip in CHIPS
          for carrier in blocks_lib.CHIPS[chip].carriers]
# Products and convolutions of U-Nets (x and weights), and odd ones.
MATMULS = ((4096, 1280, 1280), (1024, 5120, 640), (154, 768, 320),
           (2, 320, 1280), (40, 1920, 1280), (33, 77, 50))
CONVS = {  # x, output channels, window, stride
    'SD 64': ((2, 64, 64, 320), 320, 3, 1),
    'SD 32 up': ((2, 32, 32, 1920), 640, 3, 1),
    'SD 16 down': ((2, 32, 32, 640), 640, 3, 2),
    'SD 8': ((2, 8, 8, 2560), 1280, 3, 1),
    'first': ((1, 64, 64, 4), 320, 3, 1),
    'last': ((1, 64, 64, 320), 4, 3, 1),
    'DDPM 256': ((1, 256, 256, 128), 128, 3, 1),
    'odd': ((1, 9, 11, 35), 21, 5, 1),
}


@pytest.fixture(scope='module')
def shardings():
  """Returns a sharding on one device of each chip."""
  with pytest.MonkeyPatch.context() as patch:
    for name, value in tpu_cost.LIBTPU_ENVIRONMENT.items():
      patch.setenv(name, value)
    return {chip: tpu_cost.sharding(chip) for chip in CHIPS}


@pytest.fixture
def compile_for(shardings, monkeypatch):
  """Returns a compiler: (chip, function, (shape, dtype)...) -> compiled."""

  def compile_(chip, function, *args):
    monkeypatch.setattr(blocks_lib, 'generation', lambda: chip)
    args = [jax.ShapeDtypeStruct(*a, sharding=shardings[chip]) for a in args]
    return jax.jit(function).trace(*args).lower(
        lowering_platforms=('tpu',)).compile()

  return compile_


def _compile_matmul(compile_for, chip, carrier, fmt, m, k, n, out_dtype):
  return compile_for(
      chip, functools.partial(mosaic_tpu.matmul, fmt=fmt, out_dtype=out_dtype),
      ((m, k), carriers.DTYPES[carrier][0]), ((-(-k // 2), n), jnp.uint8),
      ((n,), jnp.float32), ((n,), jnp.float32))


def _compile_conv(compile_for, chip, carrier, fmt, case, out_dtype):
  x, n, window, stride = CONVS[case]
  pad = ((window // 2,) * 2,) * 2
  out = tuple(-(-size // stride) for size in x[1:3])
  return compile_for(
      chip, functools.partial(
          mosaic_tpu.conv, fmt=fmt, strides=(stride, stride), padding=pad,
          out_dtype=out_dtype),
      (x, carriers.DTYPES[carrier][0]),
      ((window, window, -(-x[-1] // 2), n), jnp.uint8),
      ((n,), jnp.float32), ((*out, n), jnp.float32))


@pytest.mark.parametrize('chip,carrier', NATIVE)
@pytest.mark.parametrize('fmt', WEIGHTS, ids=str)
def test_every_weight_format_compiles(compile_for, chip, carrier, fmt):
  _compile_matmul(compile_for, chip, carrier, fmt, 256, 640, 320, jnp.bfloat16)
  _compile_conv(compile_for, chip, carrier, fmt, 'odd', jnp.bfloat16)


@pytest.mark.parametrize('chip,carrier', NATIVE)
@pytest.mark.parametrize('m,k,n', MATMULS)
def test_matmul_compiles(compile_for, chip, carrier, m, k, n):
  _compile_matmul(compile_for, chip, carrier, WEIGHTS[1], m, k, n, jnp.float32)


@pytest.mark.parametrize('chip,carrier', NATIVE)
@pytest.mark.parametrize('case', CONVS)
def test_conv_compiles(compile_for, chip, carrier, case):
  _compile_conv(compile_for, chip, carrier, WEIGHTS[1], case, jnp.bfloat16)


def _all_terms(rows, n):
  """Shapes of an epilogue of which nothing is absent."""
  return (*[(rows, jnp.float32)] * 4, *[((n,), jnp.float32)] * 3)


# All formats by each carrier, those of int8 and bfloat16 on one chip of two.
@pytest.mark.parametrize('chip,carrier,fmt', [
    pytest.param(chip, carrier, fmt, id=f'{fmt}-{chip}-{carrier}')
    for chip, carrier in NATIVE for fmt in UNSIGNED
    if chip == 'v6e' or carrier == 'fp8' or fmt == UNSIGNED[0]])
def test_unsigned_weights_and_scales_by_row_compile(
    compile_for, chip, carrier, fmt):
  """With all of the epilogue, in blocks as large as they become."""

  def matmul(x, codes, scale, shift, *terms):
    return mosaic_tpu.matmul(
        x, codes, scale, shift, fmt=fmt, out_dtype=jnp.bfloat16,
        rows=Rows(*terms[:4]), columns=Columns(*terms[4:]))

  def conv(x, codes, scale, shift, *terms):
    return mosaic_tpu.conv(
        x, codes, scale, shift, fmt=fmt, out_dtype=jnp.bfloat16,
        strides=(1, 1), padding=((1, 1), (1, 1)), rows=Rows(*terms[:4]),
        columns=Columns(*terms[4:]))

  dtype, row = carriers.DTYPES[carrier][0], ((640,), jnp.float32)
  compile_for(chip, matmul, ((4096, 1280), dtype), ((640, 640), jnp.uint8),
              row, row, *_all_terms((4096,), 640))
  compile_for(chip, conv, ((2, 32, 31, 320), dtype),
              ((3, 3, 160, 640), jnp.uint8), row,
              ((32, 31, 640), jnp.float32), *_all_terms((2, 32, 31), 640))


@pytest.mark.parametrize('chip', CHIPS)
@pytest.mark.parametrize('group', [16, 32])
def test_scales_of_groups_compile(compile_for, chip, group):
  """In one step of K, in several, and under a window."""

  def matmul(x, codes, scale, shift, groups):
    return mosaic_tpu.matmul(
        x, codes, scale, shift, fmt=WEIGHTS[1], out_dtype=jnp.bfloat16,
        groups=groups, group=group)

  def conv(x, codes, scale, shift, groups):
    return mosaic_tpu.conv(
        x, codes, scale, shift, fmt=WEIGHTS[1], out_dtype=jnp.bfloat16,
        strides=(1, 1), padding=((1, 1), (1, 1)), groups=groups, group=group)

  row = ((640,), jnp.float32)
  for k in (320, 5120):
    compile_for(chip, matmul, ((4096, k), jnp.bfloat16),
                ((k // 2, 640), jnp.uint8), row, row,
                ((k // group, 640), jnp.float32))
  compile_for(chip, conv, ((2, 32, 32, 320), jnp.bfloat16),
              ((3, 3, 160, 640), jnp.uint8), row, row,
              ((3, 3, 320 // group, 640), jnp.float32))


@pytest.mark.parametrize('chip,carrier,group,k,c', [
    (chip, carrier, *shape) for chip, carrier in NATIVE if carrier != 'fp8'
    for shape in ((16, 320, 600), (32, 5120, 320))
    if chip == 'v6e' or shape[0] == 32])
def test_quartz_weights_compile(compile_for, chip, carrier, group, k, c):
  """In one step of K, in several, and where a half has part of a group."""
  settings = {'fmt': FPFormat.parse('E1M2'), 'wide': FPFormat.parse('E1M6'),
              'flag_group': group, 'out_dtype': jnp.bfloat16}

  def matmul(x, codes, scale, shift, flags):
    return mosaic_tpu.matmul(x, codes, scale, shift, flags=flags, **settings)

  def conv(x, codes, scale, shift, flags):
    return mosaic_tpu.conv(
        x, codes, scale, shift, flags=flags, strides=(1, 1),
        padding=((1, 1), (1, 1)), **settings)

  dtype, row = carriers.DTYPES[carrier][0], ((640,), jnp.float32)
  compile_for(chip, matmul, ((4096, k), dtype), ((k // 2, 640), jnp.uint8),
              row, row, ((-(-k // group), 640), jnp.uint8))
  compile_for(chip, conv, ((2, 32, 32, c), dtype),
              ((3, 3, c // 2, 640), jnp.uint8), row, row,
              ((3, 3, -(-c // group), 640), jnp.uint8))


@pytest.mark.parametrize('chip', CHIPS)
def test_quartz_weights_of_other_kinds_compile(compile_for, chip):
  """Unsigned, less 128; and with scales of groups as well, in bfloat16."""
  struct = lambda *shape: (shape, jnp.float32)
  codes, flags = ((640, 640), jnp.uint8), ((80, 640), jnp.uint8)
  settings = {'flag_group': 16, 'out_dtype': jnp.bfloat16}
  compile_for(
      chip, lambda x, codes, scale, shift, flags: mosaic_tpu.matmul(
          x, codes, scale, shift, flags=flags, fmt=FPFormat.parse('UE1M3'),
          wide=FPFormat.parse('UE1M7'), **settings),
      ((4096, 1280), jnp.bfloat16), codes, struct(640), struct(640), flags)
  compile_for(
      chip, lambda x, codes, scale, shift, flags, groups: mosaic_tpu.matmul(
          x, codes, scale, shift, flags=flags, groups=groups, group=32,
          fmt=FPFormat.parse('E1M2'), wide=FPFormat.parse('E1M6'), **settings),
      ((4096, 1280), jnp.bfloat16), codes, struct(640), struct(640), flags,
      struct(40, 640))


@pytest.mark.parametrize('chip', CHIPS)
def test_rows_are_summed_where_they_are_quantized(compile_for, chip):
  """The input's row sums come out of the fusion that writes its codes."""
  text = compile_for(chip, quantized_with_totals, (
      (4096, 1280), jnp.bfloat16)).as_text()
  fused, = re.findall(r'= (\S.*) fusion\(', text[text.index('ENTRY'):])
  assert 'f32[4096]' in fused and 's8[4096,1280]' in fused


@pytest.mark.parametrize('chip,carrier', [
    (chip, carrier) for chip in CHIPS for carrier in ('int8', 'fp8')
    if (chip, carrier) not in NATIVE])
def test_carriers_that_a_chip_lacks_are_refused(compile_for, chip, carrier):
  with pytest.raises(ValueError, match=f'TPU {chip} does not .*{carrier}'):
    _compile_matmul(
        compile_for, chip, carrier, WEIGHTS[1], 8, 64, 128, jnp.float32)
