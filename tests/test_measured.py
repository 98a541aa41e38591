"""What a device has measured decides: blocks that won, products that XLA takes.

Tables of made-up rows; those of the package hold what was measured.
"""

import functools

import jax
import jax.numpy as jnp
from kernel_cases import Case
from kernel_cases import conv_case
from kernel_cases import prepared
from kernel_cases import SOME
import numpy as np
import pytest

from msfp_jax.kernels import choice
from msfp_jax.kernels import slower
from msfp_jax.kernels.mosaic_gpu import blocks as blocks_lib
from msfp_jax.kernels.mosaic_gpu import measured as of_gpu
from msfp_jax.kernels.mosaic_gpu import ops as mosaic_gpu
from msfp_jax.kernels.mosaic_tpu import blocks as blocks_of_tpu
from msfp_jax.kernels.mosaic_tpu import measured as of_tpu
from msfp_jax.kernels.mosaic_tpu import ops as mosaic_tpu
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.suppress import Suppressed

E2M1, INT8 = FPFormat.parse('E2M1'), FPFormat.parse('E1M6')
WORK = blocks_lib.Work(64, 128, 256)
OTHER = blocks_lib.Blocks(8, 64, 3)
KIND = slower.Kind('matmul', 'int8')
CHIPS = {'mosaic_tpu': ('tpu', of_tpu), 'mosaic_gpu': ('gpu', of_gpu)}


def here():
  return jax.devices()[0].device_kind


def tuned(work=WORK, blocks=OTHER, device=None, versions='some', speedup=1.5):
  return of_gpu.Tuned(
      work, blocks, here() if device is None else device, versions, speedup)


def lost(kind=KIND, least=0, most=None, length=None, channels=None,
         device=None, versions='some', slowdown=1.5):
  return slower.Slower(
      kind, least, most, length, channels,
      here() if device is None else device, versions, slowdown)


def on(monkeypatch, backend):
  """Lets the CPU pass for a chip that has kernels."""
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(blocks_of_tpu, 'generation', lambda: 'v6e')


def test_blocks_that_won_are_taken_for_what_was_measured(monkeypatch):
  own = blocks_lib.ranked(WORK)[0]
  assert own != OTHER
  assert of_gpu.choose(WORK) == own
  monkeypatch.setattr(of_gpu, 'BLOCKS', (
      tuned(device='another card'), tuned(blocks_lib.Work(72, 128, 256))))
  assert of_gpu.choose(WORK) == own
  monkeypatch.setattr(of_gpu, 'BLOCKS', (*of_gpu.BLOCKS, tuned()))
  assert of_gpu.choose(WORK) == OTHER


def test_rows_are_tried_before_those_of_the_table(monkeypatch):
  own, table = blocks_lib.ranked(WORK)[0], blocks_lib.Blocks(16, 64, 3)
  monkeypatch.setattr(of_gpu, 'BLOCKS', (tuned(blocks=table),))
  with pytest.raises(KeyError), of_gpu.trying(tuned()):
    assert of_gpu.choose(WORK) == OTHER
    with of_gpu.trying(tuned(blocks=own)):
      assert of_gpu.choose(WORK) == own
    assert of_gpu.choose(WORK) == OTHER
    raise KeyError
  assert of_gpu.choose(WORK) == table


def test_the_kernel_asks_the_table(monkeypatch):
  """Unless blocks are given."""
  asked = []

  def choose(work):
    asked.append(work)
    return OTHER

  monkeypatch.setattr(of_gpu, 'choose', choose)
  run = functools.partial(mosaic_gpu.matmul, fmt=E2M1, out_dtype=jnp.bfloat16)
  shapes = [jax.ShapeDtypeStruct(*shape) for shape in (
      ((61, 250), jnp.int8), ((128, 128), jnp.uint8), ((128,), jnp.float32),
      ((128,), jnp.float32))]
  asks = jax.make_jaxpr(run)(*shapes)
  assert asked == [WORK]
  given = jax.make_jaxpr(functools.partial(run, blocks=OTHER))(*shapes)
  assert asked == [WORK] and 'grid' in str(given)
  assert str(asks) == str(given)


@pytest.mark.parametrize('reason, changes', [
    ('stages fit', {'blocks': blocks_lib.Blocks(256, 128, 9)}),
    ('whole steps', {'blocks': blocks_lib.Blocks(64, 192, 2)}),
    ('cannot be split', {
        'work': blocks_lib.Work(64, 128, 256, splittable=False),
        'blocks': blocks_lib.Blocks(8, 64, 3, 2)}),
    ('speedup must be above 1', {'speedup': 0.9}),
    ('name the device', {'device': ''}),
    ('the versions', {'versions': ''})])
def test_rows_that_could_not_have_been_measured(reason, changes):
  with pytest.raises(ValueError, match=reason):
    tuned(**changes)


@pytest.mark.parametrize('changes', [
    {'slowdown': 1.0}, {'slowdown': float('nan')}, {'device': ''},
    {'versions': ''}])
def test_losses_that_are_none(changes):
  with pytest.raises(ValueError, match='leave the row out|name the device'):
    lost(**changes)


@pytest.mark.parametrize('holds, changes', [
    (True, {}), (True, {'least': 64, 'most': 64}),
    (True, {'length': 32, 'channels': 16}), (False, {'least': 65}),
    (False, {'most': 63}), (False, {'length': 31}), (False, {'channels': 17}),
    (False, {'device': 'another card'}),
    (False, {'kind': slower.Kind('conv', 'int8')}),
    (False, {'kind': slower.Kind('matmul', 'int8', group=16)})])
def test_what_a_row_holds_for(holds, changes):
  found = slower.loses(
      (lost(**changes),), slower.Operation(KIND, 64, 32, 16))
  assert found == holds


FLAGGED = Suppressed(Block(INT8, 'channel'), group=16)
OPERATIONS = {
    'dense': (Case((5, 3, 32), (32, 6), 'E2M1', 'E2M1'),
              slower.Operation(KIND, 15, 32, 6)),
    'conv': (conv_case((2, 8, 6, 32), (3, 3, 32, 4), 'E2M1', 'E2M1', strides=2,
                       padding=1),
             slower.Operation(
                 slower.Kind('conv', 'int8', window=(3, 3), strides=(2, 2)),
                 2 * 4 * 3, 288, 4)),
    'groups': (Case((5, 64), (64, 6), 'E2M1', 'E2M1',
                    weights=Block(E2M1, group=16), inputs=Block(
                        E2M1, group=32)),
               slower.Operation(slower.Kind('matmul', 'int8', 16, 32), 5, 64,
                                6)),
    'FLAGs': (Case((5, 32), (32, 6), 'E2M1', 'E2M1', weights=FLAGGED),
              slower.Operation(slower.Kind('matmul', 'int8', 0, 0, 16), 5, 32,
                               6))}


@pytest.mark.parametrize('laid_out', [False, True])
@pytest.mark.parametrize('name', OPERATIONS)
def test_what_measurements_call_a_layer(name, laid_out):
  case, expected = OPERATIONS[name]
  layer = prepared(case.packed, 'mosaic_gpu') if laid_out else case.packed
  assert choice.operation(
      'mosaic_gpu', layer, case.x.shape, case.resolved) == expected


@pytest.mark.parametrize('name', CHIPS)
def test_what_a_kernel_loses_is_left_to_xla(name, monkeypatch):
  """Of the kind and the size that a row names, and of no other."""
  backend, tables = CHIPS[name]
  on(monkeypatch, backend)
  case = Case((70, 64), (64, 6), 'E2M1', 'E2M1')
  pick = lambda: choice.pick(case.packed, case.x.shape, case.resolved)
  assert pick() == name
  monkeypatch.setattr(tables, 'SLOWER', (
      lost(slower.Kind('conv', 'int8')), lost(least=71)))
  assert pick() == name
  monkeypatch.setattr(tables, 'SLOWER', (lost(least=70),))
  assert pick() == 'xla'


@pytest.mark.parametrize('name', CHIPS)
def test_a_lost_convolution_says_nothing_of_other_windows(name, monkeypatch):
  """Nor of other strides, though all have as many rows of as many channels."""
  backend, tables = CHIPS[name]
  on(monkeypatch, backend)
  window = lambda size, side, **geometry: conv_case(
      (2, side, side, 32), (size, size, 32, 4), 'E2M1', 'E2M1', **geometry)
  cases = {((3, 3), (1, 1)): window(3, 4, padding=1),
           ((3, 3), (2, 2)): window(3, 8, strides=2, padding=1),
           ((1, 1), (1, 1)): window(1, 4), ((1, 1), (2, 2)): window(
               1, 8, strides=2)}
  picks = lambda: {key: choice.pick(case.packed, case.x.shape, case.resolved)
                   for key, case in cases.items()}
  assert set(picks().values()) == {name}
  for taps, strides in cases:
    monkeypatch.setattr(tables, 'SLOWER', (lost(slower.Kind(
        'conv', 'int8', window=taps, strides=strides)),))
    assert [key for key, pick in picks().items() if pick == 'xla'] == [
        (taps, strides)]


def test_a_kernel_that_is_asked_for_runs_though_it_loses(monkeypatch):
  """And XLA runs the layers that were laid out for the kernel."""
  ran = []

  def matmul(*args, **options):
    ran.append('mosaic_tpu')
    return kernel(*args, **options, interpret=True)

  kernel = mosaic_tpu.matmul
  monkeypatch.setattr(mosaic_tpu, 'matmul', matmul)
  monkeypatch.setattr(of_tpu, 'SLOWER', (lost(),))
  on(monkeypatch, 'tpu')
  case = SOME['dense']('E2M1', 'E2M1')
  layer = prepared(case.packed, 'mosaic_tpu')
  case.assert_close(case.run(layer))
  assert not ran
  case.assert_close(case.run(layer, implementation='mosaic_tpu'))
  assert ran


@pytest.mark.gpu
@pytest.mark.parametrize('name', [*OPERATIONS, 'groups under a window'])
def test_xla_runs_what_is_laid_out_for_hopper(name):
  """As codes in their own order: the layers that a kernel loses are such."""
  case = OPERATIONS[name][0] if name in OPERATIONS else conv_case(
      (1, 5, 4, 64), (3, 3, 64, 4), 'E2M1', 'E2M1', padding=1,
      weights=Block(E2M1, group=16), inputs=Block(E2M1, group=32))
  layer = prepared(case.packed, 'mosaic_gpu')
  assert layer.weight.layout != case.packed.weight.layout
  run = lambda layer: case.run(layer, implementation='xla', carrier='int8')
  expected = run(case.packed)
  np.testing.assert_allclose(
      run(layer), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
