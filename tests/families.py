"""Small models of every family, with inputs, for importers and for parity."""

import jax
import jax.numpy as jnp
import numpy as np
import unet_oracle

from msfp_jax import convert
from msfp_jax.models.autoencoder import Autoencoder
from msfp_jax.models.autoencoder import AutoencoderConfig
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig

LDM = dict(norm_eps=1e-5, downsample_padding=(1, 1), time_order='cos_sin',
           time_freq_shift=0, dropout=0.0)
DDIM_CONFIG = UNetConfig(image_size=32, ch=32, ch_mult=(1, 2),
                         attn_resolutions=(16,), num_res_blocks=1)
CONFIGS = {
    'ddim': DDIM_CONFIG,
    'ddim_three_levels': UNetConfig(
        image_size=64, ch=32, ch_mult=(1, 1, 2), attn_resolutions=(16,)),
    'ldm_beds': UNetConfig(
        image_size=64, ch=32, ch_mult=(1, 2), attn_resolutions=(32,),
        num_res_blocks=2, head_channels=32, **LDM),
    'ldm_churches': UNetConfig(
        image_size=32, in_channels=4, out_channels=4, ch=32, ch_mult=(1, 2),
        attn_resolutions=(32, 16), num_res_blocks=1, num_heads=8,
        resample='resblock', time_injection='scale_shift', **LDM),
    'ldm_class': UNetConfig(
        image_size=64, ch=32, ch_mult=(1, 2), attn_resolutions=(32,),
        num_res_blocks=1, num_heads=1, context_dim=16, context_classes=11,
        **LDM),
    'sd1': UNetConfig(
        image_size=64, in_channels=4, out_channels=4, ch=32, ch_mult=(1, 2),
        attn_resolutions=(64,), num_res_blocks=1, num_heads=8,
        context_dim=768, **LDM),
    'sd2': UNetConfig(
        image_size=64, in_channels=4, out_channels=4, ch=64, ch_mult=(1, 2),
        attn_resolutions=(64,), num_res_blocks=1, head_channels=64,
        context_dim=1024, transformer_depth=2, **LDM),
    'unet2d': UNetConfig(
        image_size=32, ch=32, ch_mult=(1, 2), attn_resolutions=(16,),
        num_res_blocks=1, dropout=0.0),
    'unet2d_relative': UNetConfig(
        image_size=48, ch=32, ch_mult=(1, 2), attn_resolutions=(24,),
        num_res_blocks=1, norm_groups=16, head_channels=8,
        resample='resblock', time_injection='scale_shift', **LDM),
}

STAGES = {
    'vq': AutoencoderConfig(
        'vq', ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=3,
        embed_dim=3, codebook_size=16),
    'vq, attention': AutoencoderConfig(
        'vq', ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_levels=(1,),
        z_channels=4, embed_dim=4, codebook_size=8),
    'kl': AutoencoderConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=2,
                            scale=0.18215),
    'kl, shift': AutoencoderConfig(
        ch=32, ch_mult=(1, 2), z_channels=16, embed_dim=16, quant_conv=False,
        scale=0.3611, shift=0.1159),
}


def state_of(config, seed=0):
  """Draws random weights in our names, as PyTorch shapes them."""
  if isinstance(config, AutoencoderConfig):
    abstract = convert.abstract_autoencoder(Autoencoder(config))
    return unet_oracle.random_state_dict(unet_oracle.shapes_of(abstract), seed)
  return unet_oracle.random_state_dict(
      unet_oracle.state_dict_shapes(config), seed)


def inputs_of(config, seed=1, height=16, width=24):
  """Draws inputs, not square: (x NHWC, t, labels or None, context or None)."""
  rng = np.random.RandomState(seed)
  t = np.array([0, 3, 500, 999])
  x = rng.standard_normal((4, height, width, config.in_channels))
  labels = context = None
  if config.by_class:
    labels = rng.randint(config.num_classes or config.context_classes, size=4)
  if config.by_context:
    context = rng.standard_normal((4, 5, config.context_dim)).astype(np.float32)
  return x.astype(np.float32), t, labels, context


def output_of(config, state, inputs):
  """Runs our model in the highest precision."""
  params = unet_oracle.from_state_dict(config, state)
  with jax.default_matmul_precision('highest'):
    return np.asarray(jax.jit(UNet(config).apply)({'params': params}, *inputs))


def images_of(config, seed=2):
  """Draws images `[2, 16, 24, C]` in [-1, 1]."""
  rng = np.random.RandomState(seed)
  return rng.uniform(-1, 1, (2, 16, 24, config.in_channels)).astype(np.float32)


def latents_of(config, seed=3):
  rng = np.random.RandomState(seed)
  return rng.standard_normal((2, 4, 6, config.embed_dim)).astype(np.float32)


def first_stage_outputs(config, state):
  """Runs our autoencoder: (encoded images, decoded latents)."""
  model = Autoencoder(config)
  params = unet_oracle.restore(convert.abstract_autoencoder(model), state)
  with jax.default_matmul_precision('highest'):
    run = jax.jit(model.apply, static_argnames='method')
    return tuple(np.asarray(run({'params': params}, jnp.asarray(x),
                                method=method))
                 for x, method in ((images_of(config), 'encode'),
                                   (latents_of(config), 'decode')))
