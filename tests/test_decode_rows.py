"""Decoding by rows: the undivided decoder's images, in less memory."""

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unet_oracle

from msfp_jax import convert
from msfp_jax.models import decode_rows
from msfp_jax.models.autoencoder import Autoencoder
from msfp_jax.models.autoencoder import AutoencoderConfig

SMALL = dict(ch=8, norm_groups=4, num_res_blocks=0, z_channels=4)
# A block's shortcut may be a map, made of one, or of what is upsampled.
CONFIGS = {
    'two blocks': AutoencoderConfig(
        **SMALL | {'num_res_blocks': 1}, ch_mult=(1, 2), quant_conv=False,
        scale=0.3611, shift=0.1159),
    'vq': AutoencoderConfig(
        'vq', **SMALL, ch_mult=(1, 1), attn_levels=(1,), codebook_size=8)}


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize('name, rows', [('two blocks', 4), ('vq', 2)])
def test_images_are_those_of_the_undivided_decoder(name, rows):
  config = CONFIGS[name]
  model = Autoencoder(config)
  params = unet_oracle.restore(
      convert.abstract_autoencoder(model), families.state_of(config))
  # Not square, two images, and a slope from above to below, so that strips
  # have other means and variances than the whole.
  z = families.latents_of(config)[:, :, :3]
  z = jnp.asarray(np.concatenate([z, 3 - 2 * z[:, :2]], axis=1))
  expected = jax.jit(lambda params, z: model.apply(
      {'params': params}, z, method='decode'))(params, z)
  actual = jax.jit(lambda params, z: decode_rows.decode(
      model, params, z, rows))(params, z)
  assert actual.shape == expected.shape == (
      2, 6 * config.stride, 3 * config.stride, 3)
  assert unet_oracle.rel_l2(np.asarray(actual), np.asarray(expected)) < 2e-6


@pytest.mark.parametrize('height, stride, rows, expected', [
    (128, 8, 64, 16), (128, 8, 1024, 1), (128, 8, 100, 16), (128, 8, 1, 128),
    (96, 8, 64, 12), (97, 8, 64, 97), (1, 8, 4, 1)])
def test_strips_are_equal_shares_of_the_latents(
    height, stride, rows, expected):
  assert decode_rows.num_strips(height, stride, rows) == expected


@pytest.mark.slow
def test_memory_is_that_of_two_maps_whatever_the_batch():
  model = Autoencoder(AutoencoderConfig(
      **SMALL | {'ch': 32, 'num_res_blocks': 1}, ch_mult=(1, 1, 1)))

  def temporary(decode):
    compiled = jax.jit(decode).lower(
        convert.abstract_autoencoder(model),
        jax.ShapeDtypeStruct((4, 32, 8, 4), jnp.float32)).compile()
    # In maps of the finest level: 128 x 32 pixels of 32 channels.
    return compiled.memory_analysis().temp_size_in_bytes / (128 * 32 * 32 * 4)

  assert temporary(
      lambda params, z: decode_rows.decode(model, params, z, 4)) < 2.7
  assert temporary(lambda params, z: model.apply(
      {'params': params}, z, method='decode')) > 8
