"""The Hopper kernels compiled to machine code ahead of time, without a GPU.

Needs JAX's plugin for CUDA and nvcc; run by `make aot`.
"""

import functools
import re

import hopper_target
import jax
import jax.numpy as jnp
from kernel_cases import quantized_with_totals
import numpy as np
import pytest

from benchmarks import hopper_absent
from benchmarks import hopper_cases
from benchmarks import hopper_sweep
from msfp_jax.kernels import carriers
from msfp_jax.kernels.epilogue import Columns
from msfp_jax.kernels.epilogue import Rows
from msfp_jax.kernels.mosaic_gpu import blocks as blocks_lib
from msfp_jax.kernels.mosaic_gpu import ops as mosaic_gpu
from msfp_jax.quant.numbers import FPFormat

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures('uncached')]
E2M1 = FPFormat.parse('E2M1')
MULTIPLY = {'int8': 's32.s8.s8', 'fp8': 'f32.e4m3.e4m3'}


@pytest.fixture(scope='module')
def hopper():
  """Returns a sharding onto an H200 that is not there."""
  return hopper_target.sharding()


@pytest.fixture
def build(hopper, monkeypatch, capfd):
  """Compiles a function; returns what ptxas and Mosaic say of its kernel."""
  monkeypatch.setenv('MOSAIC_GPU_DUMP_PTXAS', '1')
  monkeypatch.setenv('MOSAIC_GPU_DUMP_PTX', '1')

  def compile_(function, *shapes):
    args = [jax.ShapeDtypeStruct(*shape, sharding=hopper) for shape in shapes]
    jax.jit(function).trace(*args).lower(
        lowering_platforms=('cuda',)).compile()
    return ''.join(capfd.readouterr())

  return compile_


def check(said, carrier, rows):
  """Checks that no register is spilled and tensor cores take the carrier."""
  stores, loads = re.findall(r'(\d+) bytes spill (?:stores|loads)', said)
  assert (stores, loads) == ('0', '0')
  # Three warpgroups of 128 threads share 65536 registers.
  assert int(re.search(r'Used (\d+) registers', said)[1]) <= 168
  assert set(re.findall(r'wgmma\.mma_async\.sync\.aligned\.(\S+)', said)) == {
      f'm64n{rows}k32.{MULTIPLY[carrier]}'}
  assert 'prmt.b32' in said


@pytest.mark.parametrize('carrier', MULTIPLY)
@pytest.mark.parametrize('rows, depth, split', [
    *((rows, 128, 1) for rows in blocks_lib.ROWS),
    *((256, depth, 1) for depth in blocks_lib.DEPTHS if depth != 128),
    (16, 256, 2)])
def test_matmul(build, rows, depth, split, carrier):
  stages = blocks_lib.most_stages(rows, depth, jnp.float32)
  said = build(
      functools.partial(
          mosaic_gpu.matmul, fmt=E2M1, out_dtype=jnp.float32,
          blocks=blocks_lib.Blocks(rows, depth, stages, split)),
      ((500, 3072), carriers.DTYPES[carrier][0]), ((320, 1536), jnp.uint8),
      ((320,), jnp.float32), ((320,), jnp.float32))
  check(said, carrier, rows)


@pytest.mark.parametrize('mapped', [False, True])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('carrier', MULTIPLY)
def test_conv(build, carrier, stride, mapped):
  size = 64 // stride
  said = build(
      functools.partial(
          mosaic_gpu.conv, fmt=E2M1, out_dtype=jnp.bfloat16,
          strides=(stride, stride), padding=((1, 1), (1, 1)),
          blocks=blocks_lib.Blocks(256, 64, 4)),
      ((8, 64, 64, 320), carriers.DTYPES[carrier][0]),
      ((320, 3, 3, 160), jnp.uint8), ((320,), jnp.float32),
      ((size, size, 320) if mapped else (320,), jnp.float32))
  check(said, carrier, 256)


@pytest.mark.parametrize('mapped', [False, True])
@pytest.mark.parametrize('carrier', MULTIPLY)
@pytest.mark.parametrize('rows', [256, 64])
def test_unsigned_weights_and_scales_by_row(build, carrier, rows, mapped):
  """With all of the epilogue, which needs registers of its own."""

  def conv(x, codes, scale, shift, *terms):
    return mosaic_gpu.conv(
        x, codes, scale, shift, fmt=FPFormat.parse('UE3M1'),
        out_dtype=jnp.bfloat16, strides=(1, 1), padding=((1, 1), (1, 1)),
        blocks=blocks_lib.Blocks(rows, 64, 4), rows=Rows(*terms[:4]),
        columns=Columns(*terms[4:]))

  column = ((320,), jnp.float32)
  said = build(
      conv, ((8, 64, 64, 320), carriers.DTYPES[carrier][0]),
      ((320, 3, 3, 160), jnp.uint8), column,
      ((64, 64, 320), jnp.float32) if mapped else column,
      *[((8, 64, 64), jnp.float32)] * 4, *[column] * 3)
  check(said, carrier, rows)


@pytest.mark.parametrize('carrier', MULTIPLY)
@pytest.mark.parametrize('rows, group, inputs', [
    (128, 64, False), (64, 64, False), (8, 64, False), (128, 32, False),
    (96, 16, False), (8, 16, False), (64, 64, True), (64, 16, True),
    (8, 16, True)])
def test_scales_of_groups(build, carrier, rows, group, inputs):
  """Sums that are scaled by group and those of a group fit the registers."""

  def conv(x, codes, scale, shift, groups, of_inputs, *terms):
    options = {'inputs': of_inputs, 'input_group': group} if inputs else {}
    return mosaic_gpu.conv(
        x, codes, scale, shift, fmt=E2M1, out_dtype=jnp.bfloat16,
        strides=(1, 1), padding=((1, 1), (1, 1)), groups=groups, group=group,
        blocks=blocks_lib.Blocks(rows, 64, 4), rows=Rows(*terms[:2]),
        columns=Columns(*terms[2:]), **options)

  column, count = ((320,), jnp.float32), 320 // group
  said = build(
      conv, ((8, 64, 64, 320), carriers.DTYPES[carrier][0]),
      ((320, 3, 3, 160), jnp.uint8), column, ((64, 64, 320), jnp.float32),
      ((3, 3, count, 320), jnp.float32), ((8, 64, 64, count), jnp.float32),
      *[((8, 64, 64), jnp.float32)] * 2, column)
  check(said, carrier, rows)


@pytest.mark.parametrize('fmt, wide', [('E1M2', 'E1M6'), ('UE1M3', 'UE1M7')])
@pytest.mark.parametrize('rows, depth, group, split', [
    (256, 128, 16, 1), (64, 128, 32, 1), (8, 128, 16, 2), (128, 64, 64, 1)])
def test_flags(build, rows, depth, group, split, fmt, wide):
  stages = blocks_lib.most_stages(
      rows, depth, jnp.float32, blocks_lib.Groups(flagged=group))
  said = build(
      lambda x, codes, flags, *end: mosaic_gpu.matmul(
          x, codes, *end, flags=flags, flag_group=group,
          fmt=FPFormat.parse(fmt), wide=FPFormat.parse(wide),
          out_dtype=jnp.float32,
          blocks=blocks_lib.Blocks(rows, depth, stages, split)),
      ((500, 3072), jnp.int8), ((320, 1536), jnp.uint8),
      ((3072 // group, 320), jnp.uint8), ((320,), jnp.float32),
      ((320,), jnp.float32))
  check(said, 'int8', rows)


def test_flags_and_scales_of_groups(build):
  """All that the registers of a block may have to hold."""

  def matmul(x, codes, groups, inputs, flags, *terms):
    return mosaic_gpu.matmul(
        x, codes, *terms[:2], fmt=FPFormat.parse('E1M2'),
        wide=FPFormat.parse('E1M6'), out_dtype=jnp.bfloat16, groups=groups,
        group=32, inputs=inputs, input_group=32, flags=flags, flag_group=16,
        rows=Rows(*terms[2:4]), columns=Columns(*terms[4:]),
        blocks=blocks_lib.Blocks(64, 64, 4))

  column, row = ((320,), jnp.float32), ((500,), jnp.float32)
  said = build(
      matmul, ((500, 3072), jnp.int8), ((320, 1536), jnp.uint8),
      ((96, 320), jnp.float32), ((500, 96), jnp.float32),
      ((192, 320), jnp.uint8), column, column, row, row, column)
  check(said, 'int8', 64)


def test_rows_are_summed_where_they_are_quantized(hopper):
  """The input's row sums come out of the fusion that writes its codes."""
  text = jax.jit(quantized_with_totals).trace(jax.ShapeDtypeStruct(
      (4096, 1280), jnp.bfloat16, sharding=hopper)).lower(
          lowering_platforms=('cuda',)).compile().as_text()
  assert re.findall(r'= (\S.*) fusion\(', text[text.index('ENTRY'):]) == [
      '(f32[4096]{0}, s8[4096,1280]{1,0})']


@pytest.mark.parametrize('name, which', [
    ('few 128', 1), ('conv SD up', 1), ('conv CIFAR 16', -1),
    ('quartz SD 32', 1), ('quartz few 16', -1)])
def test_blocks_that_are_tried(build, name, which):
  """Some of those by which benchmarks.gpu sweeps."""
  case = next(case for case in hopper_cases.CASES if case.name == name)
  blocks = hopper_sweep.blocks(case)[which]
  method = hopper_sweep.method(case, blocks)
  check(build(method.function, *hopper_absent.shapes(case, method)), 'int8',
        blocks.rows)


def test_odd_shapes(build):
  """Shapes that the wrapper pads and cuts off compile too."""
  said = build(
      functools.partial(mosaic_gpu.matmul, fmt=E2M1, out_dtype=jnp.bfloat16),
      ((5, 30), np.int8), ((64, 32), jnp.uint8), ((7,), jnp.float32),
      ((7,), jnp.float32))
  check(said, 'int8', 8)
