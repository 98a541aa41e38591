"""Which implementation and carrier is taken, and what is refused and why."""

import jax
from kernel_cases import Case
from kernel_cases import conv_case
from kernel_cases import SOME
import pytest

from msfp_jax.kernels import dispatch


def test_values_are_simulated_and_codes_are_run():
  case = Case((5, 37), (37, 6), 'E2M1', 'UE2M2')
  assert dispatch.pick(case.x.shape, case.layer) == 'reference'
  if jax.default_backend() == 'cpu':
    assert dispatch.pick(case.x.shape, case.packed) == 'xla'
    assert dispatch.pick_carrier(case.packed, 'xla') == 'f32'
  assert dispatch.pick_carrier(case.packed, 'reference') == 'f32'


@pytest.mark.parametrize('implementation', ['mosaic_tpu', 'mosaic_gpu'])
@pytest.mark.parametrize('act, carrier', [
    ('E2M1', 'int8'), ('UE3M1', 'int8'), ('UE4M0', 'bf16')])
def test_carriers_of_kernels(implementation, act, carrier):
  case = Case((5, 37), (37, 6), 'E2M1', act)
  assert dispatch.pick_carrier(case.packed, implementation) == carrier


REFUSED = {
    'zero point': (SOME['conv']('UE1M3', 'E2M1', zero=-1.0),
                   'its weights have no zero point'),
    'unquantized inputs': (SOME['dense']('E2M1', None),
                           'it multiplies quantized inputs'),
    '8 bits': (SOME['dense']('E4M3', 'E4M3'),
               'weights of 4 bits, and those of this layer are E4M3'),
    'unsigned': (SOME['dense']('UE2M2', 'E2M1'), 'weights in UE2M2'),
    'groups': (conv_case((1, 5, 6, 4), (3, 3, 2, 4), 'E2M1', 'E2M1', groups=2),
               'without groups and dilation'),
    'dilation': (conv_case((1, 5, 6, 4), (3, 3, 4, 4), 'E2M1', 'E2M1',
                           dilation=2), 'without groups and dilation'),
    '1-D': (conv_case((1, 5, 4), (3, 4, 4), 'E2M1', 'E2M1'),
            '2-D convolutions'),
}


@pytest.mark.parametrize('implementation', ['mosaic_tpu', 'mosaic_gpu'])
@pytest.mark.parametrize('name', REFUSED)
def test_kernels_say_what_they_do_not_take(name, implementation):
  case, reason = REFUSED[name]
  with pytest.raises(
      ValueError, match=f"implementation '{implementation}': .*{reason}"):
    case.run(implementation=implementation)


def test_kernels_do_not_take_values():
  case = SOME['dense']('E2M1', 'E2M1')
  with pytest.raises(ValueError, match='E2M1, stored as values'):
    case.run(case.layer, implementation='mosaic_tpu')


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
