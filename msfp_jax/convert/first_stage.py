"""VQ and KL autoencoders, in CompVis' names and in diffusers'."""

from collections.abc import Mapping
import re
from typing import Any

from absl import logging

from msfp_jax.convert import naming
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.models import autoencoder
from msfp_jax.models.autoencoder import AutoencoderConfig

_LANDMARK = 'decoder.conv_in.weight'
_INSIDE = 'first_stage_model.'  # within a checkpoint of latent diffusion
_STABLE_DIFFUSION_SCALE = 0.18215

_RESNET = (
    (r'(norm1|conv1|norm2|conv2)', r'\1'), (r'conv_shortcut', 'nin_shortcut'))
_ATTENTION = (
    (r'(?:to_q|query)', 'q'), (r'(?:to_k|key)', 'k'), (r'(?:to_v|value)', 'v'),
    (r'(?:to_out\.0|proj_attn)', 'proj_out'), (r'group_norm', 'norm'))


def detect(tensors: Mapping[str, LazyTensor]) -> bool:
  return _LANDMARK in tensors or _INSIDE + _LANDMARK in tensors


def select(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
  """The autoencoder's tensors; those of its training's loss are left out."""
  inside = _INSIDE + _LANDMARK in tensors
  found = naming.below(tensors, _INSIDE) if inside else dict(tensors)
  return {name: tensor for name, tensor in found.items()
          if not name.startswith(('loss.', 'model_ema.'))}


def config(tensors: Mapping[str, LazyTensor],
           given: Mapping[str, Any] | None = None,
           scale: float | None = None) -> AutoencoderConfig:
  """From shapes; scale and shift of the latents from config.json.

  Args:
    tensors: of the autoencoder, in either naming.
    given: diffusers' config.json or CompVis' yaml.
    scale: of the checkpoint that the autoencoder came in.
  """
  named = is_diffusers(tensors)
  down = (r'encoder\.down_blocks\.(\d+)\.resnets' if named
          else r'encoder\.down\.(\d+)\.block')
  levels = naming.indices(tensors, down)
  first = ('encoder.down_blocks.{}.resnets.0.conv1.weight' if named
           else 'encoder.down.{}.block.0.conv1.weight')
  ch = tensors['encoder.conv_in.weight'].shape[0]
  z = tensors[_LANDMARK].shape[1]
  latent = tensors['encoder.conv_out.weight'].shape[0]
  codebook = tensors.get('quantize.embedding.weight')
  post = tensors.get('post_quant_conv.weight')
  given = given or {}
  if scale is None:
    scale = given.get('scaling_factor')
  if scale is None:
    scale = _compvis_scale(given)
  shift = given.get('shift_factor')
  if scale is None and codebook is None:
    scale, shift = _published_scale(z, post is not None)
  return AutoencoderConfig(
      kind=autoencoder.VQ if codebook is not None else autoencoder.KL,
      in_channels=tensors['encoder.conv_in.weight'].shape[1],
      out_channels=tensors['decoder.conv_out.weight'].shape[0],
      ch=ch,
      ch_mult=tuple(tensors[first.format(i)].shape[0] // ch for i in levels),
      num_res_blocks=len(naming.indices(
          tensors, r'encoder\.down_blocks\.0\.resnets\.(\d+)\.conv1' if named
          else r'encoder\.down\.0\.block\.(\d+)\.conv1')),
      attn_levels=tuple(naming.indices(
          tensors, r'encoder\.down_blocks\.(\d+)\.attentions' if named
          else r'encoder\.down\.(\d+)\.attn')),
      z_channels=z,
      embed_dim=latent // (1 if codebook is not None else 2)
      if post is None else post.shape[1],
      codebook_size=0 if codebook is None else codebook.shape[0],
      norm_groups=given.get('norm_num_groups', 32),
      quant_conv=post is not None,
      scale=1.0 if scale is None else float(scale),
      shift=float(shift or 0.0))


def _published_scale(z: int, quant_conv: bool) -> tuple[float, float]:
  """Scale and shift of Stable Diffusion's KL autoencoder, or of FLUX's.

  Neither is in its files: old config.json lack it, and CompVis keeps it in
  the yaml of the whole model.
  """
  scale, shift = ((0.3611, 0.1159) if z == 16 and not quant_conv
                  else (_STABLE_DIFFUSION_SCALE, 0.0))
  logging.warning('nothing tells the scale of the latents: took %s, shift %s, '
                  'as published; pass the yaml as config if yours differs',
                  scale, shift)
  return scale, shift


def _compvis_scale(given):
  """model.params.scale_factor of a CompVis yaml, or None."""
  try:
    return given['model']['params'].get('scale_factor')
  except (KeyError, TypeError, AttributeError):
    return None


def is_diffusers(tensors: Mapping[str, LazyTensor]) -> bool:
  return any(name.startswith('encoder.down_blocks.') for name in tensors)


def rename(tensors: Mapping[str, LazyTensor], config: AutoencoderConfig
           ) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
  if not is_diffusers(tensors):
    return naming.rename(tensors, _compvis_module)
  levels = len(config.ch_mult)
  return naming.rename(
      tensors, lambda module: _diffusers_module(module, levels))


def _compvis_module(module):
  return 'quantize' if module == 'quantize.embedding' else module


def _diffusers_module(module, levels):
  if module in ('quant_conv', 'post_quant_conv'):
    return module
  if module == 'quantize.embedding':
    return 'quantize'
  match = re.fullmatch(r'(encoder|decoder)\.(.+)', module)
  if not match:
    return None
  part, rest = match.groups()
  if rest in ('conv_in', 'conv_out'):
    return module
  if rest == 'conv_norm_out':
    return f'{part}.norm_out'
  if match := re.fullmatch(r'mid_block\.(resnets|attentions)\.(\d)\.(.+)',
                           rest):
    kind, j, leaf = match[1], int(match[2]), match[3]
    place, rules = (('mid.block', _RESNET) if kind == 'resnets'
                    else ('mid.attn', _ATTENTION))
    ours = naming.rename_module(leaf, rules)
    return None if ours is None else f'{part}.{place}_{j + 1}.{ours}'
  match = re.fullmatch(
      r'(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)'
      r'\.(\d+)\.(.+)', rest)
  if not match:
    return None
  side, level, kind, j, leaf = match.groups()
  level = int(level) if side == 'down' else levels - 1 - int(level)
  if kind.endswith('samplers'):
    place = kind.removesuffix('rs')
    return f'{part}.{side}.{level}.{place}.conv' if leaf == 'conv' else None
  name, rules = (('block', _RESNET) if kind == 'resnets'
                 else ('attn', _ATTENTION))
  ours = naming.rename_module(leaf, rules)
  return None if ours is None else f'{part}.{side}.{level}.{name}.{j}.{ours}'
