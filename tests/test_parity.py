"""Live comparison with diffusers on random weights (`make parity`).

The imports of PyTorch stand inside the tests: without it these tests are
collected, and fail when they are asked for.
"""

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
      for key in contents.keys() - {'out'}:
        np.testing.assert_array_equal(file[key], contents[key])
      assert unet_oracle.rel_l2(contents['out'], file['out']) < 1e-6
