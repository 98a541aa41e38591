"""How many layers of the real UNets follow SiLU, told from their inputs."""

import collections

import jax
import pytest
import tiny
import unet_oracle

from msfp_jax import diffusion
from msfp_jax.models.unet import UNet
from msfp_jax.quant import roles as roles_lib
from msfp_jax.quant.calibrate import is_aal
from msfp_jax.quant.observe import collect

pytestmark = pytest.mark.long


def test_the_counts_of_a_real_model():
  """The count in docs/method.md, section 4, by a full-size random model."""
  config, aals, nals = tiny.CIFAR10, 68, 45
  params = unet_oracle.from_state_dict(config, unet_oracle.random_state_dict(
      unet_oracle.state_dict_shapes(config), seed=0))
  side = config.image_size
  noise = jax.random.normal(jax.random.key(0), (2, side, side, 3))
  found = collect(UNet(config), params, diffusion.ddim_plan(tiny.SCHEDULE, 2),
                  [noise], samples_per_layer=256, key=jax.random.key(1))
  kinds = {name: is_aal(seen.minimum, seen.maximum)
           for name, seen in found.items()}
  assert collections.Counter(kinds.values()) == {True: aals, False: nals}
  assert kinds == {name: roles_lib.follows_activation(name) for name in kinds}
