"""Every family computes what diffusers does, from golden files."""

import families
import marks
import numpy as np
import pytest
import unet_oracle


@pytest.fixture(scope='module')
def golden():
  with np.load(unet_oracle.GOLDEN / 'families.npz') as file:
    return dict(file)


# Of UNets and of first stages one is a quick test.
QUICK = ('sd1', 'kl')


@pytest.mark.parametrize('name', marks.quick(QUICK, families.CONFIGS))
def test_unets_equal_golden(golden, name):
  config = families.CONFIGS[name]
  actual = families.output_of(
      config, families.state_of(config), families.inputs_of(config))
  assert unet_oracle.rel_l2(actual, golden[name]) < 5e-6


@pytest.mark.parametrize('name', marks.quick(QUICK, families.STAGES))
def test_first_stages_equal_golden(golden, name):
  config = families.STAGES[name]
  encoded, decoded = families.first_stage_outputs(
      config, families.state_of(config))
  assert unet_oracle.rel_l2(encoded, golden[f'{name} encoded']) < 5e-6
  assert unet_oracle.rel_l2(decoded, golden[f'{name} decoded']) < 5e-6
