"""Checkpoints of VQ and KL autoencoders, in CompVis' or in diffusers' names."""

from collections.abc import Mapping
import re
from typing import Any

from absl import logging

from msfp_jax.convert import diffusers_names
from msfp_jax.convert import naming
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.models import autoencoder
from msfp_jax.models.autoencoder import AutoencoderConfig

_LANDMARK = 'decoder.conv_in.weight'
_INSIDE = 'first_stage_model.'  # within a checkpoint of latent diffusion
_STABLE_DIFFUSION_SCALE = 0.18215


def detect(tensors: Mapping[str, LazyTensor]) -> bool:
  return _LANDMARK in tensors or _INSIDE + _LANDMARK in tensors


def select(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
  """Picks the autoencoder's tensors, without those of its training's loss."""
  # Alone, or below `first_stage_model.` of a whole latent diffusion model.
  inside = _INSIDE + _LANDMARK in tensors
  found = naming.below(tensors, _INSIDE) if inside else dict(tensors)
  return {name: tensor for name, tensor in found.items()
          if not name.startswith(('loss.', 'model_ema.'))}


def config(tensors: Mapping[str, LazyTensor],
           given: Mapping[str, Any] | None = None,
           scale: float | None = None) -> AutoencoderConfig:
  """The configuration, from config.json or yaml, and from shapes for the rest.

  Args:
    tensors: of the autoencoder, in either naming.
    given: diffusers' config.json or CompVis' yaml, of the whole model or of
      the first stage alone.
    scale: of the checkpoint that the autoencoder came in.
  """
  given = given or {}
  # What is stated wins over what shapes tell.
  named = is_diffusers(tensors)
  if named:
    _check_supported(given)
  found = _from_json(given) if named else _from_yaml(given)
  if _STRUCTURE - found.keys():
    found = _shapes(tensors, named) | found
  if scale is None:
    scale = given.get('scaling_factor', _compvis_scale(given))
  shift = given.get('shift_factor')
  if found['kind'] == autoencoder.VQ and given.get(
      'scaling_factor') == _STABLE_DIFFUSION_SCALE:
    logging.warning(
        'its config.json has scaling_factor=%s, which diffusers writes into '
        'every VQModel whatever it was trained with: if decoded images are '
        'wrong, take it out of the file', _STABLE_DIFFUSION_SCALE)
  if scale is None and found['kind'] == autoencoder.KL:
    scale, shift = _published_scale(found['z_channels'], found['quant_conv'])
  return AutoencoderConfig(
      norm_groups=given.get('norm_num_groups', 32),
      scale=1.0 if scale is None else float(scale),
      shift=float(shift or 0.0), **found)


# Keys of config.json, with the values that our autoencoder computes; of what
# stands in a list, each.
_SUPPORTED = {
    '_class_name': ('AutoencoderKL', 'VQModel'),
    'act_fn': ('silu', 'swish'), 'norm_type': ('group',),
    'mid_block_add_attention': (True,), 'lookup_from_codebook': (False,),
    'latents_mean': (None,), 'latents_std': (None,),
    'down_block_types': ('DownEncoderBlock2D', 'AttnDownEncoderBlock2D'),
    'up_block_types': ('UpDecoderBlock2D', 'AttnUpDecoderBlock2D')}
# Keys that are read, and those that change nothing of what is computed.
_READ = frozenset({
    'in_channels', 'out_channels', 'block_out_channels', 'layers_per_block',
    'latent_channels', 'norm_num_groups', 'scaling_factor', 'shift_factor',
    'use_quant_conv', 'use_post_quant_conv', 'num_vq_embeddings',
    'vq_embed_dim'})
_HARMLESS = frozenset({
    '_diffusers_version', '_name_or_path', 'sample_size', 'force_upcast'})
KEYS = _SUPPORTED.keys() | _READ | _HARMLESS


def _check_supported(given):
  """Raises ValueError, by key, for what our autoencoder does not have."""
  listed = lambda value: value if isinstance(value, list) else [value]
  odd = [f'{key}={given[key]!r} (only {list(allowed)})'
         for key, allowed in _SUPPORTED.items() if key in given
         and any(value not in allowed for value in listed(given[key]))]
  odd += [f'{key}={given[key]!r} (unknown)' for key in given.keys() - KEYS]
  if given.get('use_quant_conv', True) != given.get(
      'use_post_quant_conv', given.get('use_quant_conv', True)):
    odd.append('use_quant_conv and use_post_quant_conv that differ')
  # Ours has attention at the same levels on both ways.
  down, up = (['Attn' in str(name) for name in listed(given.get(key, []))]
              for key in ('down_block_types', 'up_block_types'))
  if down and up and down != up[::-1]:
    odd.append('attention at other levels up than down')
  if odd:
    raise ValueError('this autoencoder has no: ' + '; '.join(sorted(odd)))


# What shapes tell as well.
_STRUCTURE = frozenset({
    'kind', 'in_channels', 'out_channels', 'ch', 'ch_mult', 'num_res_blocks',
    'attn_levels', 'z_channels', 'embed_dim', 'codebook_size', 'quant_conv'})


def _shapes(tensors, named):
  """Reads the fields of _STRUCTURE off the names and shapes of the tensors."""
  level = r'encoder\.down_blocks' if named else r'encoder\.down'
  block = r'resnets' if named else r'block'
  ch = tensors['encoder.conv_in.weight'].shape[0]
  first = ('encoder.down_blocks.{}.resnets.0.conv1.weight' if named
           else 'encoder.down.{}.block.0.conv1.weight')
  levels = naming.indices(tensors, rf'{level}\.(\d+)\.{block}')
  # A KL encoder gives mean and log variance: twice the latent's channels.
  latent = tensors['encoder.conv_out.weight'].shape[0]
  codebook = tensors.get('quantize.embedding.weight')
  # Its inputs are the latents; without one, the encoder's result is.
  post = tensors.get('post_quant_conv.weight')
  return {
      'kind': autoencoder.KL if codebook is None else autoencoder.VQ,
      'in_channels': tensors['encoder.conv_in.weight'].shape[1],
      'out_channels': tensors['decoder.conv_out.weight'].shape[0],
      'ch': ch,
      'ch_mult': tuple(tensors[first.format(i)].shape[0] // ch for i in levels),
      'num_res_blocks': len(naming.indices(
          tensors, rf'{level}\.0\.{block}\.(\d+)\.conv1')),
      'attn_levels': tuple(naming.indices(
          tensors, rf'{level}\.(\d+)\.att')),
      'z_channels': tensors[_LANDMARK].shape[1],
      'embed_dim': (latent // (2 if codebook is None else 1) if post is None
                    else post.shape[1]),
      'codebook_size': 0 if codebook is None else codebook.shape[0],
      'quant_conv': post is not None,
  }


def _from_json(given):
  """Reads those fields of _STRUCTURE that diffusers' config.json states."""
  found = {ours: given[theirs] for ours, theirs in (
      ('in_channels', 'in_channels'), ('out_channels', 'out_channels'),
      ('num_res_blocks', 'layers_per_block'), ('z_channels', 'latent_channels'),
      ('quant_conv', 'use_quant_conv')) if theirs in given}
  if 'block_out_channels' in given:
    out = given['block_out_channels']
    found |= {'ch': out[0], 'ch_mult': tuple(c // out[0] for c in out)}
  if 'down_block_types' in given:
    found['attn_levels'] = tuple(
        i for i, name in enumerate(given['down_block_types']) if 'Attn' in name)
  if given.get('num_vq_embeddings') and given.get('_class_name') == 'VQModel':
    found |= {'kind': autoencoder.VQ,
              'codebook_size': given['num_vq_embeddings']}
  return found


def _from_yaml(given):
  """Reads those fields of _STRUCTURE that a CompVis yaml states."""
  try:
    params = given['model']['params']
  except (KeyError, TypeError):
    return {}
  # An autoencoder's own yaml, or that of a latent diffusion model around it.
  inside = params.get('first_stage_config', {}).get('params', {})
  params = params if 'ddconfig' in params else inside
  shape = params.get('ddconfig')
  if shape is None:
    return {}
  found = {ours: shape[theirs] for ours, theirs in (
      ('in_channels', 'in_channels'), ('out_channels', 'out_ch'), ('ch', 'ch'),
      ('num_res_blocks', 'num_res_blocks'), ('z_channels', 'z_channels'))
           if theirs in shape}
  if 'ch_mult' in shape:
    found['ch_mult'] = tuple(shape['ch_mult'])
    if {'resolution', 'attn_resolutions'} <= shape.keys():
      found['attn_levels'] = tuple(
          i for i in range(len(shape['ch_mult']))
          if shape['resolution'] >> i in shape['attn_resolutions'])
  if 'embed_dim' in params:
    found['embed_dim'] = params['embed_dim']
  if 'n_embed' in params:
    found |= {'kind': autoencoder.VQ, 'codebook_size': params['n_embed']}
  return found


def _published_scale(z: int, quant_conv: bool) -> tuple[float, float]:
  """The published scale and shift of Stable Diffusion's latents, or of FLUX's.

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
  """The scale of the latents, model.params.scale_factor of a CompVis yaml."""
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
  # Our names are CompVis', except for the codebook's.
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
  ours = diffusers_names.block_module(rest, levels)
  return None if ours is None else f'{part}.{ours}'
