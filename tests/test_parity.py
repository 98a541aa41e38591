"""Live comparison with diffusers on random weights (`make parity`).

The imports of PyTorch stand inside the tests: without it these tests are
collected, and fail when they are asked for.
"""

import families
import numpy as np
import pytest
import unet_oracle

from msfp_jax.models.unet import UNetConfig

pytestmark = pytest.mark.parity


@pytest.mark.parametrize('config, height, width', [
    (unet_oracle.TINY, 16, 24),
    (unet_oracle.TINY_RELATIVE, 24, 16),
    (UNetConfig(image_size=16, ch=32, ch_mult=(1, 2, 2), norm_groups=8,
                num_res_blocks=1, attn_resolutions=(16, 4)), 8, 32),
    (UNetConfig(), 32, 32),
    (UNetConfig(image_size=64, ch_mult=(1, 2, 2, 2, 4)), 32, 48),
], ids=['tiny', 'relative', 'attention_at_two_levels', 'cifar10', 'celeba64'])
def test_unet_equals_diffusers(config, height, width):
  import make_golden
  state = unet_oracle.random_state_dict(
      unet_oracle.state_dict_shapes(config), seed=11)
  inputs = unet_oracle.random_inputs(config, height, width, seed=12)
  expected = make_golden.diffusers_output(config, state, *inputs)
  actual = unet_oracle.apply(config, state, *inputs)
  assert unet_oracle.rel_l2(actual, expected) < 5e-6


def test_golden_files_are_what_diffusers_computes():
  import make_golden
  for name, contents in make_golden.all_golden().items():
    with np.load(unet_oracle.GOLDEN / f'{name}.npz') as file:
      assert file.keys() == contents.keys()
      outputs = contents.keys() if name == 'families' else {'out'}
      for key in contents.keys() - outputs:
        np.testing.assert_array_equal(file[key], contents[key])
      for key in outputs:
        assert unet_oracle.rel_l2(contents[key], file[key]) < 1e-6


@pytest.mark.parametrize('config', families.CONFIGS.values(),
                         ids=families.CONFIGS)
def test_every_family_equals_diffusers(config):
  import diffusers_oracle
  state = families.state_of(config, seed=21)
  inputs = families.inputs_of(config, seed=22)
  expected = diffusers_oracle.unet_output(config, state, *inputs)
  actual = families.output_of(config, state, inputs)
  assert unet_oracle.rel_l2(actual, expected) < 5e-6


@pytest.mark.parametrize('config', families.STAGES.values(),
                         ids=families.STAGES)
def test_first_stages_equal_diffusers(config):
  import diffusers_oracle
  state = families.state_of(config, seed=23)
  expected = diffusers_oracle.first_stage_outputs(
      config, state, families.images_of(config), families.latents_of(config))
  for ours, theirs in zip(
      families.first_stage_outputs(config, state), expected, strict=True):
    assert unet_oracle.rel_l2(ours, theirs) < 5e-6
