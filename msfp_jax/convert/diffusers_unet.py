"""UNets of diffusers: UNet2DModel and UNet2DConditionModel."""

from collections.abc import Mapping
from typing import Any

from absl import logging

from msfp_jax.convert import diffusers_names
from msfp_jax.convert import naming
from msfp_jax.convert import unet_keys
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig

MODEL = UNet  # of what `config` returns
_LANDMARK = 'time_embedding.linear_1.weight'

_ROOT = (
    (r'time_embedding\.linear_1', 'temb.dense.0'),
    (r'time_embedding\.linear_2', 'temb.dense.1'),
    (r'class_embedding', 'label_emb'), (r'conv_in', 'conv_in'),
    (r'conv_norm_out', 'norm_out'), (r'conv_out', 'conv_out'))


def detect(tensors: Mapping[str, LazyTensor]) -> bool:
  return _LANDMARK in tensors


def select(tensors: Mapping[str, LazyTensor], unused_ema: bool
           ) -> dict[str, LazyTensor]:
  """Returns all tensors: a folder of diffusers holds one model."""
  return dict(tensors)


def config(tensors: Mapping[str, LazyTensor],
           given: Mapping[str, Any] | None) -> UNetConfig:
  """The configuration, from config.json, or from a published model's shapes.

  Raises:
    ValueError: config.json asks for what this UNet does not have; or there is
      none, and no published model has these shapes.
  """
  if given is None:
    return UNetConfig(**_from_shapes(tensors))
  if not given.keys() & {'_class_name', 'block_out_channels'}:
    raise ValueError('the configuration is no config.json of diffusers: it has '
                     'neither _class_name nor block_out_channels')
  kind = unet_keys.kind_of(given, _context_width(tensors) is not None)
  unet_keys.check(given, kind)
  found = _DEFAULTS | _structure(given, kind)
  # A field that the file leaves out is as the tensors have it.
  if absent := _STRUCTURE - found.keys():
    shapes = _shapes(tensors)
    found |= {field: shapes[field] for field in absent}
  attended = found.pop('attended')
  sides = naming.sides(_stated_side(given, kind), 'sample_size')
  return UNetConfig(**found | _heads(given, found, kind) | {
      **sides,
      'attn_resolutions': tuple(sides['image_size'] >> i for i in attended),
      'norm_groups': given.get('norm_num_groups', 32),
      'norm_eps': given.get('norm_eps', 1e-5),
      'dropout': given.get('dropout', 0.0),
      'downsample_padding': (
          (1, 1) if given.get('downsample_padding', 1) else (0, 1)),
      'time_order': (
          'cos_sin' if given.get('flip_sin_to_cos', True) else 'sin_cos'),
      'time_freq_shift': given.get('freq_shift', 0)})


def _stated_side(given, kind):
  side = given.get('sample_size')
  if side is None:
    # The published models' sides: Stable Diffusion's and CIFAR-10's.
    side = 64 if kind == unet_keys.CONDITIONAL else 32
    logging.info('its config.json has no sample_size: took %d', side)
  return side


# What shapes tell as well, `attended` being the levels with attention.
_STRUCTURE = frozenset({
    'in_channels', 'out_channels', 'ch', 'ch_mult', 'num_res_blocks',
    'attended', 'resample', 'time_injection', 'num_classes', 'context_dim',
    'transformer_depth'})


# Fields of config.json that mean one of ours.
_FIELDS = {
    'in_channels': 'in_channels', 'out_channels': 'out_channels',
    'num_class_embeds': 'num_classes', 'layers_per_block': 'num_res_blocks',
    'transformer_layers_per_block': 'transformer_depth'}
# What diffusers takes where config.json lacks the field.
_DEFAULTS = {'time_injection': 'add', 'num_classes': None,
             'transformer_depth': 1}


def _structure(given, kind):
  """Reads those fields of _STRUCTURE that config.json states."""
  found = {ours: naming.single(given[theirs], theirs)
           for theirs, ours in _FIELDS.items() if theirs in given}
  if 'block_out_channels' in given:
    found['ch'], found['ch_mult'] = naming.multiples(
        given['block_out_channels'])
  if types := unet_keys.block_types(given, 'down'):
    found['attended'] = [i for i, name in enumerate(types) if 'Attn' in name]
    found['resample'] = ('resblock' if 'resnet' in unet_keys.resampling(
        given, 'down') else 'conv')
  if kind == unet_keys.PLAIN:
    found['context_dim'] = None
  elif 'cross_attention_dim' in given:
    found['context_dim'] = naming.single(
        given['cross_attention_dim'], 'cross_attention_dim')
  if 'resnet_time_scale_shift' in given:
    found['time_injection'] = {'default': 'add'}.get(
        given['resnet_time_scale_shift'], given['resnet_time_scale_shift'])
  return found


def _heads(given, found, kind):
  """Reads the attention heads: one number, or one width, for all levels."""
  # A field whose meaning depends on the class: of UNet2DModel it is the width
  # of a head, of UNet2DConditionModel the number of heads, by diffusers' own
  # error, which it keeps for compatibility.
  stated = given.get('attention_head_dim', 8)
  if kind == unet_keys.PLAIN:
    return {} if stated is None else {
        'head_channels': naming.single(stated, 'attention_head_dim')}
  # There the field means the number of heads, one for all or by level.
  if not isinstance(stated, list):
    return {'num_heads': naming.single(stated, 'attention_head_dim')}
  channels = [found['ch'] * mult for mult in found['ch_mult']]
  if len(stated) != len(channels):
    raise ValueError(f'attention_head_dim={stated}: expected one for each of '
                     f'{len(channels)} levels')
  # Stable Diffusion 2 has 5, 10, 20, 20 heads: one width, 64.
  widths = {divmod(c, n) for c, n in zip(channels, stated, strict=True)}
  if len(set(stated)) == 1:
    return {'num_heads': stated[0]}
  width, rest = min(widths)
  if len(widths) == 1 and not rest:
    return {'head_channels': width}
  raise ValueError(f'attention_head_dim={stated}: neither one number of heads '
                   'for all levels nor one width of a head')


def _shapes(tensors):
  """Reads the fields of _STRUCTURE off the names and shapes of the tensors."""
  levels = naming.indices(tensors, r'down_blocks\.(\d+)\.')
  out = [naming.size(tensors, f'down_blocks.{i}.resnets.0.conv1.weight', 0)
         for i in levels]
  ch = out[0]
  projection = naming.size(
      tensors, 'down_blocks.0.resnets.0.time_emb_proj.weight', 0)
  return {
      'in_channels': naming.size(tensors, 'conv_in.weight', 1),
      'out_channels': naming.size(tensors, 'conv_out.weight', 0),
      'ch': ch, 'ch_mult': tuple(c // ch for c in out),
      'num_res_blocks': len(naming.indices(
          tensors, r'down_blocks\.0\.resnets\.(\d+)\.conv1')),
      'attended': naming.indices(
          tensors, r'down_blocks\.(\d+)\.attentions'),
      'resample': ('resblock' if 'down_blocks.0.downsamplers.0.conv1.weight'
                   in tensors else 'conv'),
      'time_injection': 'scale_shift' if projection == 2 * ch else 'add',
      'num_classes': naming.size_if_any(
          tensors, 'class_embedding.weight', 0),
      'context_dim': _context_width(tensors),
      'transformer_depth': 1 + max(naming.indices(
          tensors, r'mid_block\.attentions\.0\.transformer_blocks\.(\d+)'),
          default=0),
  }


def _context_width(tensors):
  """The width of the context that the tensors attend to; None without."""
  return next((naming.size(tensors, name, 1) for name in tensors
               if name.endswith('attn2.to_k.weight')), None)


# What shapes do not tell, of published models by width of the context,
# channels and multipliers: google/ddpm-cifar10-32, Stable Diffusion 1 and 2.
_STABLE_DIFFUSION = {
    'image_size': 64, 'norm_eps': 1e-5, 'downsample_padding': (1, 1),
    'time_order': 'cos_sin', 'time_freq_shift': 0}
_PUBLISHED = {
    (None, 128, (1, 2, 2, 2)): {
        'image_size': 32, 'norm_eps': 1e-6, 'downsample_padding': (0, 1),
        'time_order': 'sin_cos', 'time_freq_shift': 1},
    (768, 320, (1, 2, 4, 4)): _STABLE_DIFFUSION | {'num_heads': 8},
    (1024, 320, (1, 2, 4, 4)): _STABLE_DIFFUSION | {'head_channels': 64},
}


def _from_shapes(tensors):
  found = _shapes(tensors)
  attended = found.pop('attended')
  key = (found['context_dim'], found['ch'], found['ch_mult'])
  if key not in _PUBLISHED:
    raise ValueError(
        'there is no config.json, and no published model has context '
        f'{key[0]}, channels {key[1]} and multipliers {key[2]}: pass its '
        'config.json as config')
  rest = _PUBLISHED[key]
  logging.info('no config.json: took what shapes do not tell as published: %s',
               rest)
  return found | rest | {'dropout': 0.0, 'attn_resolutions': tuple(
      rest['image_size'] >> i for i in attended)}


def rename(tensors: Mapping[str, LazyTensor], config: UNetConfig
           ) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
  return naming.rename(tensors, lambda module: module_name(module, config))


def module_name(module: str, config: UNetConfig) -> str | None:
  """Our name of a module; None where there is no rule."""
  # Attentions of one name are transformers where the model has a context.
  levels = len(config.ch_mult)
  attention = (diffusers_names.ATTENTION if config.context_dim is None
               else naming.TRANSFORMER)
  return (naming.rename_module(module, _ROOT)
          or diffusers_names.block_module(module, levels, attention))
