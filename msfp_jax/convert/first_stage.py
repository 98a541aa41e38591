"""Checkpoints of VQ and KL autoencoders, in CompVis' or in diffusers' names."""

from collections.abc import Mapping
import math
import re
from typing import Any

from absl import logging

from msfp_jax.convert import diffusers_names
from msfp_jax.convert import first_stage_keys as keys
from msfp_jax.convert import naming
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.models import autoencoder
from msfp_jax.models.autoencoder import AutoencoderConfig

_LANDMARK = 'decoder.conv_in.weight'
_INSIDE = 'first_stage_model.'  # within a checkpoint of latent diffusion
_STABLE_DIFFUSION_SCALE = 0.18215
_AVERAGE = 'model_ema.'


def detect(tensors: Mapping[str, LazyTensor]) -> bool:
  return _LANDMARK in tensors or _INSIDE + _LANDMARK in tensors


def select(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
  """Picks the autoencoder's tensors, without those of its training's loss."""
  # Alone, or below `first_stage_model.` of a whole latent diffusion model.
  inside = _INSIDE + _LANDMARK in tensors
  found = naming.below(tensors, _INSIDE) if inside else dict(tensors)
  # CompVis' trainings of an autoencoder may keep an average too (`use_ema`).
  # They validate with it, but latent diffusion encodes its training's images,
  # and decodes, with the weights: so must what stands behind its models.
  if any(name.startswith(_AVERAGE) for name in found):
    logging.info('left out the moving average of the first stage: latent '
                 'diffusion is trained on latents of its weights')
  return {name: tensor for name, tensor in found.items()
          if not name.startswith(('loss.', _AVERAGE))}


def config(tensors: Mapping[str, LazyTensor],
           given: Mapping[str, Any] | None = None,
           held: float | None = None, scale: float | None = None,
           shift: float | None = None) -> AutoencoderConfig:
  """The configuration, from config.json or yaml, and from shapes for the rest.

  Args:
    tensors: of the autoencoder, in either naming.
    given: diffusers' config.json or CompVis' yaml, of the whole model or of
      the first stage alone.
    held: the scale of the latents that the checkpoint around it holds.
    scale: of the latents, whatever the files say; None: as they say.
    shift: likewise.

  Raises:
    ValueError: it asks for what our autoencoder does not have; or nothing tells
      the scale of the latents.
  """
  given = given or {}
  # What is stated wins over what shapes tell.
  named = is_diffusers(tensors)
  if named:
    keys.check_json(given)
  found = _from_json(given) if named else _from_yaml(given)
  if _STRUCTURE - found.keys():
    found = _shapes(tensors, named) | found
  stated = _stated_scale(given, found, held)
  chosen = tuple(theirs if typed is None else typed for typed, theirs in zip(
      (scale, shift), stated or (None, 0.0), strict=True))
  if chosen[0] is None:
    raise ValueError(
        'nothing tells the scale of its latents, and no published model has '
        'its shapes: pass its config.json (scaling_factor) or the yaml of the '
        'whole model as config, or the number, config.first_stage_scale '
        '(load_first_stage: scale); diffusers takes 0.18215 where a '
        'config.json has none')
  if stated and chosen != stated:
    logging.info('latents have scale %s, shift %s, as asked for; the files say '
                 '%s, %s', *chosen, *stated)
  return AutoencoderConfig(
      norm_groups=given.get('norm_num_groups', 32), scale=float(chosen[0]),
      shift=float(chosen[1]), **found)


# What shapes tell as well.
_STRUCTURE = frozenset({
    'kind', 'in_channels', 'out_channels', 'ch', 'ch_mult', 'num_res_blocks',
    'attn_levels', 'z_channels', 'embed_dim', 'codebook_size', 'quant_conv'})


def _shapes(tensors, named):
  """Reads the fields of _STRUCTURE off the names and shapes of the tensors."""
  level = r'encoder\.down_blocks' if named else r'encoder\.down'
  block = r'resnets' if named else r'block'
  ch = naming.size(tensors, 'encoder.conv_in.weight', 0)
  first = ('encoder.down_blocks.{}.resnets.0.conv1.weight' if named
           else 'encoder.down.{}.block.0.conv1.weight')
  levels = naming.indices(tensors, rf'{level}\.(\d+)\.{block}')
  # A KL encoder gives mean and log variance: twice the latent's channels.
  latent = naming.size(tensors, 'encoder.conv_out.weight', 0)
  codebook = naming.size_if_any(tensors, 'quantize.embedding.weight', 0)
  # Its inputs are the latents; without one, the encoder's result is.
  post = naming.size_if_any(tensors, 'post_quant_conv.weight', 1)
  return {
      'kind': autoencoder.KL if codebook is None else autoencoder.VQ,
      'in_channels': naming.size(tensors, 'encoder.conv_in.weight', 1),
      'out_channels': naming.size(tensors, 'decoder.conv_out.weight', 0),
      'ch': ch,
      'ch_mult': tuple(
          naming.size(tensors, first.format(i), 0) // ch for i in levels),
      'num_res_blocks': len(naming.indices(
          tensors, rf'{level}\.0\.{block}\.(\d+)\.conv1')),
      'attn_levels': tuple(naming.indices(
          tensors, rf'{level}\.(\d+)\.att')),
      'z_channels': naming.size(tensors, _LANDMARK, 1),
      'embed_dim': (latent // (2 if codebook is None else 1) if post is None
                    else post),
      'codebook_size': codebook or 0,
      'quant_conv': post is not None,
  }


def _from_json(given):
  """Reads those fields of _STRUCTURE that diffusers' config.json states."""
  found = {ours: given[theirs] for ours, theirs in (
      ('in_channels', 'in_channels'), ('out_channels', 'out_channels'),
      ('num_res_blocks', 'layers_per_block'), ('z_channels', 'latent_channels'),
      ('quant_conv', 'use_quant_conv')) if theirs in given}
  if 'block_out_channels' in given:
    found['ch'], found['ch_mult'] = naming.multiples(
        given['block_out_channels'])
  if 'down_block_types' in given:
    found['attn_levels'] = tuple(
        i for i, name in enumerate(given['down_block_types']) if 'Attn' in name)
  if given.get('_class_name') == 'VQModel':
    found['kind'] = autoencoder.VQ
    if 'num_vq_embeddings' in given:
      found['codebook_size'] = given['num_vq_embeddings']
    if given.get('vq_embed_dim') is not None:
      found['embed_dim'] = given['vq_embed_dim']
  return found


# Fields of ddconfig that mean one of ours.
_DDCONFIG = {'in_channels': 'in_channels', 'out_ch': 'out_channels', 'ch': 'ch',
             'num_res_blocks': 'num_res_blocks', 'z_channels': 'z_channels'}


def _from_yaml(given):
  """Reads those fields of _STRUCTURE that a CompVis yaml states.

  Raises:
    ValueError: it states what our autoencoder does not have.
  """
  # An autoencoder's own yaml, or that of a latent diffusion model around it.
  model = given.get('model', {})
  inside = 'ddconfig' not in _model_params(given)
  if inside:
    model = _model_params(given).get('first_stage_config') or {}
    keys.check_section(model)
  params = model.get('params') or {}
  if 'ddconfig' not in params:
    return {}
  keys.check_yaml(model, inside)
  shape = params['ddconfig']
  found = {ours: naming.single(shape[theirs], f'ddconfig.{theirs}')
           for theirs, ours in _DDCONFIG.items() if theirs in shape}
  if 'ch_mult' in shape:
    found['ch_mult'] = tuple(shape['ch_mult'])
    if {'resolution', 'attn_resolutions'} <= shape.keys():
      side = naming.single(shape['resolution'], 'ddconfig.resolution')
      found['attn_levels'] = tuple(
          i for i in range(len(shape['ch_mult']))
          if side >> i in shape['attn_resolutions'])
  if 'embed_dim' in params:
    found['embed_dim'] = naming.single(params['embed_dim'], 'embed_dim')
  if 'n_embed' in params:
    found |= {'kind': autoencoder.VQ, 'codebook_size': params['n_embed']}
  return found


def held_scale(tensors: Mapping[str, LazyTensor]) -> float | None:
  """The scale of the latents that a whole model's checkpoint holds, or None.

  Raises:
    ValueError: it is no single number.
  """
  tensor = tensors.get('scale_factor')
  if tensor is None:
    return None
  if tensor.refused:
    raise ValueError(f'scale_factor {tensor.refused}')
  if math.prod(tensor.shape) != 1:
    raise ValueError(f'scale_factor has shape {tensor.shape}: must be a number')
  return float(tensor.read().item())


def _stated_scale(given, found, held):
  """Scale and shift of the latents as the files say them; None: they do not."""
  if held is not None:
    return held, 0.0
  if given.get('scaling_factor') is not None:
    factor = given['scaling_factor']
    if found['kind'] == autoencoder.VQ and factor == _STABLE_DIFFUSION_SCALE:
      logging.warning(
          'its config.json has scaling_factor=%s, which diffusers writes into '
          'every VQModel whatever it was trained with: if decoded images are '
          'wrong, set config.first_stage_scale (1.0, if it is published as '
          'VQ-f4 or VQ-f8)', factor)
    return factor, given.get('shift_factor') or 0.0
  outer = _model_params(given)
  # Measured on the first batch of training, and kept in the checkpoint alone.
  if outer.get('scale_by_std'):
    return None
  if 'scale_factor' in outer:
    return outer['scale_factor'], 0.0
  # What CompVis takes where the yaml of a whole model has none; VQ stages are
  # published so.
  if 'first_stage_config' in outer or found['kind'] == autoencoder.VQ:
    return 1.0, 0.0
  return _published_scale(found)


# Scale and shift of the published KL first stages, which their own files may
# lack: so do old config.json, and CompVis keeps it in the whole model's yaml.
_PUBLISHED = {
    'in_channels': 3, 'out_channels': 3, 'ch': 128, 'ch_mult': (1, 2, 4, 4),
    'num_res_blocks': 2, 'attn_levels': ()}
_PUBLISHED_SCALES = {  # by channels and quant_conv
    (4, True): (_STABLE_DIFFUSION_SCALE, 0.0, 'Stable Diffusion 1 and 2', (
        "SDXL's, of the same shapes, is 0.13025")),
    (16, False): (0.3611, 0.1159, 'FLUX', (
        "Stable Diffusion 3's, of the same shapes, is 1.5305, shift 0.0609"))}


def _published_scale(found):
  """Scale and shift of the published model of these shapes; None: none has."""
  key = found['z_channels'], found['quant_conv']
  if (key not in _PUBLISHED_SCALES or found['embed_dim'] != key[0]
      or any(found[field] != value for field, value in _PUBLISHED.items())):
    return None
  scale, shift, name, other = _PUBLISHED_SCALES[key]
  logging.warning('nothing tells the scale of the latents: took that of %s, '
                  '%s, shift %s. %s: set config.first_stage_scale and '
                  'first_stage_shift if yours differs', name, scale, shift,
                  other)
  return scale, shift


def _model_params(given):
  """model.params of a CompVis yaml; empty where there is none."""
  try:
    return dict(given['model']['params'])
  except (KeyError, TypeError, ValueError):
    return {}


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
