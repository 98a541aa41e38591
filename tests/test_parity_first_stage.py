"""FLUX's first stage, small, from diffusers' own files, against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax import convert
from msfp_jax.models import decode_rows

pytestmark = pytest.mark.parity
SCALE, SHIFT = 0.3611, 0.1159


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """(folder as a pipeline's, diffusers' model) with 16 channels of latents."""
  import diffusers
  import torch
  torch.manual_seed(0)
  # What FLUX.1's vae/config.json has, with fewer channels.
  model = diffusers.AutoencoderKL(
      block_out_channels=[32, 64, 64, 64], down_block_types=[
          'DownEncoderBlock2D'] * 4, up_block_types=['UpDecoderBlock2D'] * 4,
      latent_channels=16, layers_per_block=2, mid_block_add_attention=True,
      norm_num_groups=32, sample_size=1024, scaling_factor=SCALE,
      shift_factor=SHIFT, use_post_quant_conv=False, use_quant_conv=False)
  with torch.no_grad():  # else norms are neutral, and biases small
    for parameter in model.parameters():
      if parameter.ndim == 1:
        parameter.add_(0.3 * torch.randn_like(parameter))
  folder = tmp_path_factory.mktemp('pipeline')
  model.save_pretrained(folder / 'vae')
  return str(folder), model.eval()


@pytest.mark.parametrize('rows', [0, 64, 8])
def test_a_decoded_image_is_that_of_a_pipeline(saved, rows):
  import torch
  folder, theirs = saved
  model, params = convert.load_first_stage(folder)
  assert (model.config.scale, model.config.shift) == (SCALE, SHIFT)
  assert not model.config.quant_conv and model.config.embed_dim == 16
  # Latents as FLUX's transformer leaves them, 16 x 8 of 128 x 64 pixels.
  z = np.random.default_rng(0).standard_normal((2, 16, 8, 16)).astype(
      np.float32)
  with torch.no_grad():
    latents = torch.from_numpy(z).permute(0, 3, 1, 2) / SCALE + SHIFT
    expected = theirs.decode(latents).sample.permute(0, 2, 3, 1).numpy()
  with jax.default_matmul_precision('highest'):
    actual = jax.jit(
        lambda params, z: decode_rows.decode(model, params, z, rows) if rows
        else model.apply({'params': params}, z, method='decode'))(
            params, jnp.asarray(z))
  assert expected.shape == (2, 128, 64, 3) and np.abs(expected).max() > 0.5
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


def test_an_encoded_image_is_that_of_a_pipeline(saved):
  import torch
  folder, theirs = saved
  model, params = convert.load_first_stage(folder)
  x = np.random.default_rng(1).uniform(-1, 1, (2, 32, 64, 3)).astype(np.float32)
  with torch.no_grad():
    mean = theirs.encode(torch.from_numpy(x).permute(
        0, 3, 1, 2)).latent_dist.mean
    expected = ((mean - SHIFT) * SCALE).permute(0, 2, 3, 1).numpy()
  with jax.default_matmul_precision('highest'):
    actual = model.apply({'params': params}, jnp.asarray(x), method='encode')
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
