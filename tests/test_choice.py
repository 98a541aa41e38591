"""Which implementation and carrier is taken, and what is refused and why."""

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
from msfp_jax.kernels import cpu
from msfp_jax.kernels.mosaic_tpu import ops as mosaic_tpu
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantizers import Static

KERNELS = ('mosaic_tpu', 'mosaic_gpu')
E2M1 = FPFormat.parse('E2M1')


def pick(case, layer=None):
  return choice.pick(case.packed if layer is None else layer, case.x.shape,
                   case.resolved)


def test_levels_are_simulated_and_codes_are_run():
  case = Case((5, 37), (37, 6), 'E2M1', 'UE2M2')
  assert pick(case, case.layer) == 'reference'
  if jax.default_backend() == 'cpu':
    assert pick(case) == 'xla'
  assert choice.pick_carrier(case.packed, case.x.shape, 'reference') == 'f32'


@pytest.mark.usefixtures('on_cpu')
@pytest.mark.parametrize('fastest', ['int8', 'f32'])
def test_carriers_of_cpus(monkeypatch, fastest):
  """int8 where that is fast, it holds both formats and scales leave the sum."""
  monkeypatch.setattr(cpu, 'carrier', lambda products: fastest)
  of = lambda case, layer: choice.pick_carrier(
      layer, case.x.shape, 'xla', case.resolved)
  for act, expected in (('UE2M2', fastest), ('UE4M0', 'f32')):
    case = SOME['dense']('E2M1', act)
    assert of(case, case.packed) == expected
  groups = case.packed.replace(input=Block(E2M1, group=2))
  assert of(case, groups) == 'f32'


@pytest.mark.usefixtures('on_cpu')
@pytest.mark.parametrize('case, expected', [
    (conv_case((1, 8, 8, 32), (3, 3, 32, 4), 'E2M1', 'E2M1'), 'int8'),
    (conv_case((1, 8, 8, 3), (1, 1, 3, 4), 'E2M1', 'E2M1'), 'int8'),
    # XLA's convolutions in int8 are slow for all others.
    (conv_case((1, 8, 8, 3), (3, 3, 3, 4), 'E2M1', 'E2M1'), 'f32'),
    (conv_case((1, 8, 32), (3, 32, 4), 'E2M1', 'E2M1'), 'f32'),
    (conv_case((1, 4, 4, 4, 32), (3, 3, 3, 32, 4), 'E2M1', 'E2M1'), 'f32'),
    (conv_case((1, 8, 8, 64), (3, 3, 32, 64), 'E2M1', 'E2M1', groups=2),
     'f32'),
    # 127 x 127 x 1,040 is below 2^24, and 127 x 127 x 1,041 is not.
    (Case((2, 1040), (1040, 2), 'E1M6', 'E1M6'), 'int8'),
    (Case((2, 1041), (1041, 2), 'E1M6', 'E1M6'), 'f32')],
                         ids=lambda case: case if isinstance(case, str) else
                         f'{case.x.shape}')
def test_where_cpus_are_fast_and_exact_in_int8(monkeypatch, case, expected):
  monkeypatch.setattr(cpu, 'carrier', lambda products: 'int8')
  assert choice.pick_carrier(
      case.packed, case.x.shape, 'xla', case.resolved) == expected


@pytest.mark.usefixtures('on_cpu')
@pytest.mark.parametrize('case', [
    Case((3, 7), (7, 6), 'E2M1', 'UE2M2'),
    conv_case((3, 5, 6, 3), (3, 3, 3, 4), 'E2M1', 'UE2M2', padding=1),
    Case((3, 8), (8, 6), 'E2M1', 'E2M1', weights=Block(E2M1, group=2))],
                         ids=['dense', 'conv', 'groups'])
def test_nan_is_not_lost_in_int8(case):
  """It spoils its row, or its image, and no other."""
  x = case.x.copy()
  x[(1, *[0] * (x.ndim - 1))] = np.nan
  clean, found = (np.asarray(case.apply(
      each, case.packed, implementation='xla', carrier='int8'))
                  for each in (case.x, x))
  assert np.isnan(found[1]).all()
  np.testing.assert_array_equal(found[0], clean[0])
  np.testing.assert_array_equal(found[2:], clean[2:])


def test_scales_inside_of_sums_run_alike_packed_or_not():
  """Sums that are not exact are made by one implementation, packed or not."""
  case = SOME['dense']('E2M1', 'E2M1')
  layer = case.layer.replace(input=Block(E2M1, group=2))
  assert pick(case, layer) == 'xla'


@pytest.mark.parametrize('implementation', KERNELS)
@pytest.mark.parametrize('act, carrier', [
    ('E2M1', 'int8'), ('UE3M1', 'int8'), ('UE4M0', 'bf16')])
def test_carriers_of_kernels(implementation, act, carrier):
  case = Case((5, 37), (37, 6), 'E2M1', act)
  assert choice.pick_carrier(
      case.packed, case.x.shape, implementation) == carrier


@pytest.mark.parametrize('implementation', KERNELS)
@pytest.mark.parametrize('kind', SOME)
def test_kernels_take_what_they_are_made_for(implementation, kind):
  """4 bits that are scaled by output are taken, as packed and as prepared."""
  case = SOME[kind]('UE2M2', 'UE3M1', act_zero=0.2, zero=-1.0)
  for layer in (case.packed, prepared(case.packed, implementation)):
    assert choice.why_not(
        implementation, layer, case.x.shape, case.resolved) is None


@pytest.mark.slow
@pytest.mark.parametrize('kind, act, act_zero', [
    ('dense', 'UE3M1', 0.2), ('conv', 'UE2M2', -0.3),
    ('conv', 'UE4M0', 0.1), ('dense', 'E2M1', None)])
def test_kernels_get_scales_and_shifts_of_their_own(
    monkeypatch, kind, act, act_zero):
  """The door hands a kernel what makes its sums the layer's result.

  The TPU's, in Pallas's interpreter.
  """
  for name in ('matmul', 'conv'):
    monkeypatch.setattr(mosaic_tpu, name, functools.partial(
        getattr(mosaic_tpu, name), interpret=True))
  case = SOME[kind]('E3M0', act, act_zero=act_zero)
  for layer in (case.packed, prepared(case.packed, 'mosaic_tpu')):
    carriers = ['bf16', 'fp8'] + ['int8'] * (act != 'UE4M0')
    for carrier in carriers:
      case.assert_close(case.run(
          layer, implementation='mosaic_tpu', carrier=carrier))


REFUSED = {
    'unquantized inputs': (SOME['dense']('E2M1', None),
                           'it multiplies quantized inputs'),
    '8 bits': (SOME['dense']('E4M3', 'E4M3'),
               'weights of 4 bits, and those of this layer are E4M3'),
    'far levels': (SOME['dense']('UE4M0', 'E2M1'), 'weights in UE4M0|x is bf'),
    'pixels under a window': (
        SOME['conv']('E2M1', 'E2M1', inputs=Block(E2M1, 'token')),
        r'not scales of \(1, 5, 6, 1\)'),
    'groups of inputs': (
        SOME['dense']('E2M1', 'E2M1', inputs=Block(E2M1, group=4)),
        r'inputs change every 4|e4m3 without zero points, not float32'),
    'groups of weights': (
        SOME['dense']('E2M1', 'E2M1', weights=Block(E2M1, group=4)),
        'these weights change every 4|no room for the digits of float'),
    'levels less 128 in groups': (
        Case((5, 128), (128, 6), 'E2M1', 'E2M1', weights=Block(
            FPFormat.parse('UE3M1'), 'group', 64, 'e4m3', zero_point=0.0)),
        'takes 128 off the levels of UE3M1'),
    'zeros of groups': (
        SOME['dense']('UE2M2', 'E2M1', weights=Block(
            FPFormat.parse('UE2M2'), group=4)),
        r'zero points of weights by output channel, not of shape \(2, 6\)'),
    'groups of channels': (
        conv_case((1, 5, 6, 4), (3, 3, 2, 4), 'E2M1', 'E2M1', groups=2),
        'without groups and dilation'),
    'dilation': (conv_case((1, 5, 6, 4), (3, 3, 4, 4), 'E2M1', 'E2M1',
                           dilation=2), 'without groups and dilation'),
    '1-D': (conv_case((1, 5, 4), (3, 4, 4), 'E2M1', 'E2M1'),
            '2-D convolutions'),
}


@pytest.mark.parametrize('implementation', KERNELS)
@pytest.mark.parametrize('name', REFUSED)
def test_kernels_say_what_they_do_not_take(name, implementation):
  case, reason = REFUSED[name]
  with pytest.raises(
      ValueError, match=f"implementation '{implementation}': .*({reason})"):
    case.run(implementation=implementation)


def test_kernels_do_not_take_levels():
  case = SOME['dense']('E2M1', 'E2M1')
  with pytest.raises(ValueError, match='E2M1, stored as levels'):
    case.run(case.layer, implementation='mosaic_tpu')


@pytest.mark.parametrize('implementation', KERNELS)
def test_banks_that_are_laid_out_keep_their_own_scales(implementation):
  kernels = np.float32(np.random.default_rng(0).normal(size=(2, 7, 6)))
  banks = Block(E2M1, 'channel').quantize_banks(
      kernels * np.float32([[[1]], [[3]]])).packed()
  laid_out = choice.lay_out(banks, implementation)
  for i in range(2):
    np.testing.assert_array_equal(
        laid_out.bank(i).dequantize(), banks.bank(i).dequantize())


def test_each_chip_refuses_the_others_layout():
  case = SOME['dense']('E2M1', 'E2M1')
  laid_out = prepared(case.packed, 'mosaic_gpu')
  with pytest.raises(ValueError, match='the weights are laid out for hopper'):
    case.run(laid_out, implementation='mosaic_tpu')


def test_steps_come_before_products():
  """A quantizer that differs by step is refused until a step is chosen."""
  case = SOME['dense']('E2M1', 'E2M1')
  layer = case.layer.replace(
      input=Static(E2M1, jnp.float32([0.1, 0.2]), by_step=True))
  with pytest.raises(ValueError, match=r'take at\(step\) first'):
    case.run(layer)


@pytest.mark.parametrize('implementation', [None, 'xla', 'reference'])
def test_carriers_that_do_not_hold_a_format(implementation):
  case = SOME['conv']('E2M1', 'UE4M0')
  with pytest.raises(ValueError, match='int8 does not hold weights in E2M1 and '
                     'inputs in UE4M0; choose another carrier, such as bf16'):
    case.run(implementation=implementation, carrier='int8')
  case = SOME['dense']('E2M1', None)
  with pytest.raises(ValueError, match='bf16 does not hold .* full precision'):
    case.run(implementation=implementation, carrier='bf16')


def test_unknown_names():
  case = SOME['dense']('E2M1', 'E2M1')
  with pytest.raises(ValueError, match="implementation 'nonsense': must be"):
    case.run(implementation='nonsense')
  with pytest.raises(ValueError, match="carrier 'nonsense': must be one of"):
    case.run(carrier='nonsense')


def test_tpus_read_halves_in_whole_groups():
  """Groups of 16 of 48 inputs end inside of a half."""
  nvfp4 = Block(E2M1, 'group', 16, 'e4m3')
  case = Case((5, 48), (48, 6), 'E2M1', 'E2M1', weights=nvfp4)
  with pytest.raises(ValueError, match='two halves of the inputs, 24 each'):
    case.run(implementation='mosaic_tpu')
  case = Case((5, 64), (64, 6), 'E2M1', 'E2M1', weights=nvfp4)
  assert choice.pick_carrier(case.packed, (5, 64), 'mosaic_tpu') == 'bf16'
  with pytest.raises(ValueError, match='multiplied in bfloat16; carry'):
    case.run(implementation='mosaic_tpu', carrier='int8')
