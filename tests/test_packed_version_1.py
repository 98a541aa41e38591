"""Files of version 1 load, and compute what they did."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from packed_files import assert_equal
import pytest
import safetensors
import safetensors.numpy
import tiny
import toy
import unet_oracle

from msfp_jax import diffusion
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig
from msfp_jax.packed import file as packed_file
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import spec as spec_lib

pytestmark = pytest.mark.optimized

# Files that version 1 wrote, as of commit efd5608, and what it computed.
GOLDEN = pathlib.Path(__file__).parent / 'golden'
SMALL = UNetConfig(
    image_size=8, in_channels=1, out_channels=1, ch=8, ch_mult=(1,),
    num_res_blocks=0, attn_resolutions=(), norm_groups=4, dropout=0.0)


@functools.cache
def version_1():
  with np.load(GOLDEN / 'version_1.npz') as arrays:
    return dict(arrays)


def assert_weight(layer, expected):
  """The same levels, by the codes; NumPy's values of the published table."""
  weight = layer.weight
  values = weight.fmt.values()[np.asarray(weight.codes())] * weight.scale
  if weight.zero_point is not None:
    values = values + weight.zero_point
  np.testing.assert_allclose(
      values, np.broadcast_to(expected, values.shape), rtol=1e-6, atol=1e-7)


def test_a_file_of_version_1_samples_as_its_simulation_did():
  """E2M1, INT in 8 bits, and a layer in full precision."""
  packed = packed_file.load(GOLDEN / 'packed_1.safetensors')
  assert packed.model == UNet(SMALL)
  assert packed.layers['conv_out'].weight is None
  for name in ('mid.block_1.conv1', 'temb.dense.0'):
    assert_weight(packed.layers[name], version_1()[f'weight {name}'])
  expected = version_1()['samples']
  np.testing.assert_allclose(
      packed.sample(tiny.noise(0, batch=2)), expected, rtol=1e-5,
      atol=1e-5 * np.abs(expected).max())


def test_banks_and_3_bits_of_version_1():
  """A byte for two codes of 3 bits, as files had them then."""
  packed = packed_file.load(
      GOLDEN / 'packed_1_banks.safetensors', model=toy.Toy())
  for name in ('conv_in', 'conv_out'):
    assert_weight(packed.layers[name], version_1()[f'banks weight {name}'])
  np.testing.assert_array_equal(packed.choices['conv_in'], [0, 1])
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *toy.SHAPE)),
                  jnp.float32)
  np.testing.assert_allclose(
      packed.sample(x, key=jax.random.key(1)), version_1()['banks samples'],
      rtol=1e-5, atol=1e-5)


def test_a_file_of_version_1_saved_again_is_of_version_2(tmp_path):
  packed = packed_file.load(
      GOLDEN / 'packed_1_banks.safetensors', model=toy.Toy())
  packed_file.save(tmp_path / 'again', packed)
  with safetensors.safe_open(tmp_path / 'again', 'np') as opened:
    assert opened.metadata()['format'] == 'msfp-jax/packed/2'
    assert opened.get_tensor('conv_out.codes').shape == (14,)  # 36 x 3 bits
  assert_equal(packed_file.load(tmp_path / 'again', model=toy.Toy()), packed)


def test_a_spec_of_version_1_packs_to_what_version_1_packed():
  """Codes, scales and all; and it simulates as it did."""
  params = unet_oracle.from_state_dict(SMALL, unet_oracle.random_state_dict(
      unet_oracle.state_dict_shapes(SMALL), seed=0))
  spec = spec_lib.QuantSpec.load(GOLDEN / 'spec_1.json')
  plan = diffusion.ddim_plan(tiny.SCHEDULE, 2)
  packed = packed_lib.pack(UNet(SMALL), params, spec, plan)
  written = packed_file.load(GOLDEN / 'packed_1.safetensors')
  for name, layer in written.layers.items():
    tiny.assert_trees_equal(packed.layers[name], layer)
  expected = version_1()['samples']
  np.testing.assert_allclose(
      packed_lib.simulate(UNet(SMALL), params, spec, plan).sample(
          tiny.noise(0, batch=2)), expected, rtol=1e-5,
      atol=1e-5 * np.abs(expected).max())
