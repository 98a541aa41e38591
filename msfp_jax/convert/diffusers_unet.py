"""diffusers: UNet2DModel and UNet2DConditionModel (Stable Diffusion 1, 2)."""

from collections.abc import Mapping
import re
from typing import Any

from absl import logging

from msfp_jax.convert import naming
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.models.unet import UNetConfig

_LANDMARK = 'time_embedding.linear_1.weight'

_RESNET = (
    (r'(norm1|conv1|norm2|conv2)', r'\1'), (r'time_emb_proj', 'temb_proj'),
    (r'conv_shortcut', 'nin_shortcut'))
# Attention of UNet2DModel, in its present and in its old names.
_ATTENTION = (
    (r'(?:to_q|query)', 'q'), (r'(?:to_k|key)', 'k'), (r'(?:to_v|value)', 'v'),
    (r'(?:to_out\.0|proj_attn)', 'proj_out'), (r'group_norm', 'norm'))
_TRANSFORMER = (
    (r'(norm|proj_in|proj_out)', r'\1'),
    (r'transformer_blocks\.(\d+)\.(attn[12])\.to_([qkv])',
     r'transformer.\1.\2.\3'),
    (r'transformer_blocks\.(\d+)\.(attn[12])\.to_out\.0',
     r'transformer.\1.\2.proj_out'),
    (r'transformer_blocks\.(\d+)\.(norm[123])', r'transformer.\1.\2'),
    (r'transformer_blocks\.(\d+)\.ff\.net\.0\.proj', r'transformer.\1.ff.proj'),
    (r'transformer_blocks\.(\d+)\.ff\.net\.2', r'transformer.\1.ff.out'))
_ROOT = (
    (r'time_embedding\.linear_1', 'temb.dense.0'),
    (r'time_embedding\.linear_2', 'temb.dense.1'),
    (r'class_embedding', 'label_emb'), (r'conv_in', 'conv_in'),
    (r'conv_norm_out', 'norm_out'), (r'conv_out', 'conv_out'))

# Fields of config.json: the values that our UNet computes. Others are refused.
_SUPPORTED = {
    'act_fn': ('silu', 'swish'), 'time_embedding_type': ('positional',),
    'center_input_sample': (False,), 'mid_block_scale_factor': (1, 1.0),
    'dual_cross_attention': (False,), 'only_cross_attention': (False,),
    'class_embed_type': (None,), 'addition_embed_type': (None,),
    'encoder_hid_dim': (None,), 'encoder_hid_dim_type': (None,),
    'time_cond_proj_dim': (None,), 'timestep_post_act': (None,),
    'time_embedding_act_fn': (None,), 'class_embeddings_concat': (False,),
    'conv_in_kernel': (3,), 'conv_out_kernel': (3,),
    'mid_block_only_cross_attention': (None, False),
    'cross_attention_norm': (None,), 'attention_type': ('default',),
    'reverse_transformer_layers_per_block': (None,),
    'resnet_skip_time_act': (False,), 'resnet_out_scale_factor': (1, 1.0),
    'add_attention': (True,), 'time_embedding_dim': (None,),
    'mid_block_type': ('UNetMidBlock2D', 'UNetMidBlock2DCrossAttn'),
}
_BLOCK = re.compile(r'(Attn|CrossAttn|Resnet)?(Down|Up)(sample)?Block2D')


def detect(tensors: Mapping[str, LazyTensor]) -> bool:
  return _LANDMARK in tensors


def select(tensors: Mapping[str, LazyTensor], unused_ema: bool
           ) -> dict[str, LazyTensor]:
  """All; a folder of diffusers holds one model."""
  return dict(tensors)


def config(tensors: Mapping[str, LazyTensor],
           given: Mapping[str, Any] | None) -> UNetConfig:
  """From config.json, or from shapes where there is none.

  Raises:
    ValueError: config.json asks for what this UNet does not have.
  """
  found = _from_shapes(tensors)
  if given is None:
    return UNetConfig(**found)
  _check_supported(given)
  conditional = given.get('cross_attention_dim') is not None and any(
      'transformer_blocks' in name for name in tensors)
  width = given.get('attention_head_dim', 8)
  heads = {}
  if conditional or 'Condition' in given.get('_class_name', ''):
    # There the field means the number of heads, one for all or by level.
    widths = _per_level(given.get('num_attention_heads') or width, found)
    channels = [found['ch'] * mult for mult in found['ch_mult']]
    per_head = {c // n for c, n in zip(channels, widths, strict=True)}
    if len(set(widths)) == 1:
      heads = {'num_heads': widths[0]}
    elif len(per_head) == 1:
      heads = {'head_channels': per_head.pop()}
    else:
      raise ValueError(f'attention_head_dim={width}: neither one number of '
                       'heads for all levels nor one width of a head')
  elif width is not None:
    heads = {'head_channels': width}
  side = given.get('sample_size') or found['image_size']
  if not isinstance(side, int):
    side = max(side)
  levels = [found['image_size'] // s for s in found['attn_resolutions']]
  resample = (given.get('downsample_type') or given.get('upsample_type')
              or 'conv')
  return UNetConfig(**found | {
      'num_heads': None, 'head_channels': None, **heads,
      'image_size': side,
      'attn_resolutions': tuple(side // ratio for ratio in levels),
      'norm_groups': given.get('norm_num_groups', 32),
      'norm_eps': given.get('norm_eps', 1e-5),
      'dropout': given.get('dropout', 0.0),
      'downsample_padding': (
          (1, 1) if given.get('downsample_padding', 1) else (0, 1)),
      'resample': 'resblock' if resample == 'resnet' else found['resample'],
      'time_order': (
          'cos_sin' if given.get('flip_sin_to_cos', True) else 'sin_cos'),
      'time_freq_shift': given.get('freq_shift', 0)})


def _check_supported(given):
  odd = [f'{field}={given[field]!r} (only {list(allowed)})'
         for field, allowed in _SUPPORTED.items()
         if field in given and given[field] not in allowed]
  odd += [f'block type {name!r}' for name in
          (*given.get('down_block_types', ()), *given.get('up_block_types', ()))
          if not _BLOCK.fullmatch(name)]
  norm = given.get('attn_norm_num_groups')
  if norm not in (None, given.get('norm_num_groups', 32)):
    odd.append(f'attn_norm_num_groups={norm}')
  if odd:
    raise ValueError('this UNet has no: ' + '; '.join(odd))


def _per_level(value, found):
  """A number for all levels, or a list of one for each."""
  count = len(found['ch_mult'])
  return list(value) if isinstance(value, list | tuple) else [value] * count


def _from_shapes(tensors):
  """What shapes tell; what they do not, as google/ddpm-cifar10-32 has it."""
  levels = naming.indices(tensors, r'down_blocks\.(\d+)\.')
  out = [tensors[f'down_blocks.{i}.resnets.0.conv1.weight'].shape[0]
         for i in levels]
  ch = out[0]
  attended = naming.indices(tensors, r'down_blocks\.(\d+)\.attentions')
  context = next((tensor.shape[1] for name, tensor in tensors.items()
                  if name.endswith('attn2.to_k.weight')), None)
  projection = tensors['down_blocks.0.resnets.0.time_emb_proj.weight'].shape[0]
  labels = tensors.get('class_embedding.weight')
  resblock = 'down_blocks.0.downsamplers.0.conv1.weight' in tensors
  ddpm = context is None
  heads = {}
  if not ddpm:
    heads = ({'head_channels': 64} if context == 1024 else {'num_heads': 8})
  side = 32 if ddpm else 64
  logging.info('shapes do not tell all: assumed side %d, %s', side,
               heads or 'one head')
  return {
      'image_size': side,
      'in_channels': tensors['conv_in.weight'].shape[1],
      'out_channels': tensors['conv_out.weight'].shape[0],
      'ch': ch, 'ch_mult': tuple(c // ch for c in out),
      'num_res_blocks': len(naming.indices(
          tensors, r'down_blocks\.0\.resnets\.(\d+)\.conv1')),
      'attn_resolutions': tuple(side >> i for i in attended),
      'dropout': 0.0,
      'norm_eps': 1e-6 if ddpm else 1e-5,
      'downsample_padding': (0, 1) if ddpm else (1, 1),
      'resample': 'resblock' if resblock else 'conv',
      'time_injection': 'scale_shift' if projection == 2 * ch else 'add',
      'time_order': 'sin_cos' if ddpm else 'cos_sin',
      'time_freq_shift': 1 if ddpm else 0,
      'num_classes': None if labels is None else labels.shape[0],
      'context_dim': context,
      'transformer_depth': 1 + max(naming.indices(
          tensors, r'mid_block\.attentions\.0\.transformer_blocks\.(\d+)'),
          default=0),
      **heads}


def rename(tensors: Mapping[str, LazyTensor], config: UNetConfig
           ) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
  levels = len(config.ch_mult)
  attention = _ATTENTION if config.context_dim is None else _TRANSFORMER
  return naming.rename(
      tensors, lambda module: _module(module, levels, attention))


def _module(module, levels, attention):
  if (ours := naming.rename_module(module, _ROOT)) is not None:
    return ours
  if match := re.fullmatch(r'mid_block\.(resnets|attentions)\.(\d)\.(.+)',
                           module):
    kind, j, rest = match[1], int(match[2]), match[3]
    place, rules = (('mid.block', _RESNET) if kind == 'resnets'
                    else ('mid.attn', attention))
    ours = naming.rename_module(rest, rules)
    return None if ours is None else f'{place}_{j + 1}.{ours}'
  match = re.fullmatch(
      r'(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)'
      r'\.(\d+)\.(.+)', module)
  if not match:
    return None
  side, level, kind, j, rest = match.groups()
  # diffusers numbers the way up as it is executed, we by level.
  level = int(level) if side == 'down' else levels - 1 - int(level)
  place = f'{side}.{level}'
  if kind == 'attentions':
    ours = naming.rename_module(rest, attention)
    return None if ours is None else f'{place}.attn.{j}.{ours}'
  if kind == 'resnets':
    ours = naming.rename_module(rest, _RESNET)
    return None if ours is None else f'{place}.block.{j}.{ours}'
  place = f'{place}.{kind.removesuffix("rs")}'
  if rest == 'conv':
    return f'{place}.conv'
  ours = naming.rename_module(rest, _RESNET)
  return None if ours is None else f'{place}.{ours}'
