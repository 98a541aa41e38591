"""Runs diffusers' models of every family with our weights, as an oracle.

Needs PyTorch and diffusers. A model is built from the config.json and loaded
strictly from the names that `foreign` writes, which checks both.
"""

import diffusers
from diffusers.models.attention_processor import Attention
import flux_oracle
import foreign
import numpy as np
import torch


def _tensor(array):
  return torch.from_numpy(np.ascontiguousarray(array))


def _load(model, state):
  expected = {n: v.shape for n, v in model.state_dict().items()}
  assert expected.keys() == state.keys(), sorted(expected.keys() ^ state.keys())
  model.load_state_dict({n: _tensor(v).reshape(expected[n])
                         for n, v in state.items()})
  return model.eval()


def unet(config, state):
  """Builds a UNet2DModel or UNet2DConditionModel with our weights."""
  state = dict(state)
  state.pop('context_emb.weight', None)
  fields = foreign.diffusers_config(config)
  kind = getattr(diffusers, fields['_class_name'])
  model = _load(kind.from_config(fields), foreign.diffusers(state, config))
  if config.context_dim is None and config.num_heads:
    # UNet2DModel can only fix the width of a head.
    for module in model.modules():
      if isinstance(module, Attention):
        module.heads = config.num_heads
        width = module.inner_dim // config.num_heads
        module.scale = width**-0.5
  return model


@torch.no_grad()
def unet_output(config, state, x, t, labels, context):
  """Runs a UNet of diffusers; images are NHWC, in and out."""
  model = unet(config, state)
  image, t = _tensor(x).permute(0, 3, 1, 2), _tensor(t)
  if config.context_classes:
    context = state['context_emb.weight'][labels][:, None]
  if config.context_dim is not None:
    out = model(image, t, encoder_hidden_states=_tensor(context))
  elif labels is None:
    out = model(image, t)
  else:
    out = model(image, t, _tensor(labels))
  return out.sample.permute(0, 2, 3, 1).contiguous().numpy()


def first_stage(config, state):
  """Builds an AutoencoderKL or VQModel with our weights."""
  levels = range(len(config.ch_mult))
  kind = lambda side, part: [
      f'Attn{side}{part}Block2D' if i in config.attn_levels
      else f'{side}{part}Block2D' for i in levels]
  fields = dict(
      in_channels=config.in_channels, out_channels=config.out_channels,
      down_block_types=kind('Down', 'Encoder'),
      up_block_types=kind('Up', 'Decoder')[::-1],
      block_out_channels=[config.ch * m for m in config.ch_mult],
      layers_per_block=config.num_res_blocks, act_fn='silu',
      latent_channels=config.z_channels, norm_num_groups=config.norm_groups)
  if config.kind == 'vq':
    model = diffusers.VQModel(
        num_vq_embeddings=config.codebook_size,
        vq_embed_dim=config.embed_dim, **fields)
  else:
    model = diffusers.AutoencoderKL(
        use_quant_conv=config.quant_conv,
        use_post_quant_conv=config.quant_conv, **fields)
  return _load(model, foreign.diffusers_first_stage(state, config))


@torch.no_grad()
def first_stage_outputs(config, state, images, latents):
  """Returns (encoded, decoded), scaled and shifted as by a pipeline."""
  model = first_stage(config, state)
  nchw = lambda a: _tensor(a).permute(0, 3, 1, 2)
  nhwc = lambda a: a.permute(0, 2, 3, 1).contiguous().numpy()
  encoded = model.encode(nchw(images))
  encoded = (encoded.latents if config.kind == 'vq'
             else encoded.latent_dist.mean)
  decoded = model.decode(nchw(latents / config.scale + config.shift)).sample
  return (nhwc(encoded) - config.shift) * config.scale, nhwc(decoded)


def flux(config, device='cpu'):
  """Builds a FluxTransformer2DModel; on 'meta' it has no weights."""
  fields = {key: value for key, value in flux_oracle.config_json(config).items()
            if not key.startswith('_')}
  with torch.device(device):
    return diffusers.FluxTransformer2DModel(**fields).eval()


def flux_output(config, state, *inputs):
  """Runs it with our weights in diffusers' names."""
  return run_flux(_load(flux(config), state), *inputs)


@torch.no_grad()
def run_flux(model, x, t, text, pooled, guidance=None):
  """Runs it, latents and positions packed as FluxPipeline does (NHWC here)."""
  b, h, w, c = x.shape
  packed = _tensor(x).permute(0, 3, 1, 2).view(
      b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(
          b, h * w // 4, 4 * c)
  ids = torch.zeros(h // 2, w // 2, 3)
  ids[..., 1] += torch.arange(h // 2)[:, None]
  ids[..., 2] += torch.arange(w // 2)[None, :]
  out = model(
      hidden_states=packed, timestep=_tensor(t),
      encoder_hidden_states=_tensor(text), pooled_projections=_tensor(pooled),
      guidance=None if guidance is None else _tensor(guidance),
      txt_ids=torch.zeros(text.shape[1], 3), img_ids=ids.reshape(-1, 3)).sample
  return out.view(b, h // 2, w // 2, -1, 2, 2).permute(
      0, 1, 4, 2, 5, 3).reshape(b, h, w, -1).numpy()
