"""Renames our state dicts to those of other code bases.

Renames backwards, and was written apart from `msfp_jax.convert`, which it
helps to check.
"""

import re

import numpy as np

LDM_RESNET = {'norm1': 'in_layers.0', 'conv1': 'in_layers.2',
              'temb_proj': 'emb_layers.1', 'norm2': 'out_layers.0',
              'conv2': 'out_layers.3', 'nin_shortcut': 'skip_connection'}
DIFFUSERS_RESNET = {'temb_proj': 'time_emb_proj',
                    'nin_shortcut': 'conv_shortcut'}
DIFFUSERS_ATTENTION = {'norm': 'group_norm', 'q': 'to_q', 'k': 'to_k',
                       'v': 'to_v', 'proj_out': 'to_out.0'}
OLD_ATTENTION = {'norm': 'group_norm', 'q': 'query', 'k': 'key', 'v': 'value',
                 'proj_out': 'proj_attn'}


def _split(name):
  return name.rsplit('.', 1)


def _transformer(rest):
  """Renames a spatial transformer's tensors, alike in both code bases."""
  rest = re.sub(r'^transformer\.', 'transformer_blocks.', rest)
  rest = re.sub(r'(attn[12])\.([qkv])$', r'\1.to_\2', rest)
  rest = re.sub(r'(attn[12])\.proj_out$', r'\1.to_out.0', rest)
  return rest.replace('ff.proj', 'ff.net.0.proj').replace('ff.out', 'ff.net.2')


def _swap(table, name):
  return table.get(name, name)


def ldm(state, config):
  """Renames a UNet's tensors as CompVis does, without any prefix."""
  per_level, levels = config.num_res_blocks + 1, len(config.ch_mult)
  found = {}
  for name, value in _fused(state, config).items():
    module, leaf = _split(name)
    if m := re.fullmatch(r'down\.(\d+)\.(block|attn)\.(\d+)\.(.+)', module):
      level, kind, j, rest = int(m[1]), m[2], int(m[3]), m[4]
      place = f'input_blocks.{1 + level * per_level + j}'
    elif m := re.fullmatch(r'up\.(\d+)\.(block|attn)\.(\d+)\.(.+)', module):
      level, kind, j, rest = int(m[1]), m[2], int(m[3]), m[4]
      place = f'output_blocks.{(levels - 1 - level) * per_level + j}'
    elif m := re.fullmatch(r'mid\.(block|attn)_(\d)\.(.+)', module):
      kind, rest = m[1], m[3]
      number = {('block', '1'): 0, ('attn', '1'): 1, ('block', '2'): 2}[
          m[1], m[2]]
      place = f'middle_block.{number}'
    elif m := re.fullmatch(r'down\.(\d+)\.downsample\.(.+)', module):
      place, kind = f'input_blocks.{(int(m[1]) + 1) * per_level}.0', None
      rest = 'op' if m[2] == 'conv' else LDM_RESNET[m[2]]
    elif m := re.fullmatch(r'up\.(\d+)\.upsample\.(.+)', module):
      level, kind = int(m[1]), None
      attended = config.image_size >> level in config.attn_resolutions
      n = (levels - level) * per_level - 1
      place = f'output_blocks.{n}.{2 if attended else 1}'
      rest = 'conv' if m[2] == 'conv' else LDM_RESNET[m[2]]
    else:
      kind, place = None, {
          'conv_in': 'input_blocks.0.0', 'temb.dense.0': 'time_embed.0',
          'temb.dense.1': 'time_embed.2', 'norm_out': 'out.0',
          'conv_out': 'out.2', 'label_emb': 'label_emb',
          'context_emb': 'context_emb'}[module]
      rest = ''
    if kind:
      if not place.startswith('middle'):
        place += '.0' if kind == 'block' else '.1'
      rest = LDM_RESNET[rest] if kind == 'block' else _transformer(rest)
    found['.'.join(filter(None, (place, rest, leaf)))] = value
  return found


def _fused(state, config):
  """Fuses q, k, v of plain attention: for each head its q, then k, then v."""
  if config.context_dim is not None:
    return state
  found = {}
  for name, value in state.items():
    m = re.fullmatch(r'(.*attn[._]\d+)\.([qkv])\.(weight|bias)', name)
    if not m:
      if re.fullmatch(r'.*attn[._]\d+\.proj_out\.weight', name):
        value = value.reshape(*value.shape[:2], 1)
      found[name] = value
    elif m[2] == 'q':
      parts = [state[f'{m[1]}.{p}.{m[3]}'] for p in 'qkv']
      heads = config.heads(len(value))
      width = len(value) // heads
      rows = [part[h * width:(h + 1) * width]
              for h in range(heads) for part in parts]
      fused = np.concatenate(rows)
      found[f'{m[1]}.qkv.{m[3]}'] = (
          fused.reshape(*fused.shape[:2], 1) if m[3] == 'weight' else fused)
  return found


def ldm_checkpoint(state, config, averaged=None):
  """Makes `{'state_dict': ...}` as training does, with a moving average."""
  names = ldm(state, config)
  embedder = names.pop('context_emb.weight', None)
  found = {f'model.diffusion_model.{n}': v for n, v in names.items()}
  if averaged is not None:
    for name, value in ldm(averaged, config).items():
      if name != 'context_emb.weight':
        found['model_ema.diffusion_model' + name.replace('.', '')] = value
    found['model_ema.decay'] = np.array(0.9999, np.float32)
    found['model_ema.num_updates'] = np.array(7, np.int32)
  if embedder is not None:
    found['cond_stage_model.embedding.weight'] = embedder
  found['betas'] = np.linspace(0.0015, 0.0195, 1000).astype(np.float32)
  return {'state_dict': found, 'global_step': 3}


def compvis_yaml(config):
  """The configuration that CompVis keeps beside a checkpoint, as a dict."""
  return {'model': {'params': {
      'image_size': config.image_size, 'unet_config': {'params': {
          'image_size': 32,  # unused
          **({'num_head_channels': config.head_channels}
             if config.head_channels else {'num_heads': config.num_heads})}}}}}


def diffusers(state, config, attention=None):
  """Renames a UNet's tensors as UNet2DModel or UNet2DConditionModel does."""
  attention = attention or DIFFUSERS_ATTENTION
  levels = len(config.ch_mult)
  plain = config.context_dim is None
  found = {}
  for name, value in state.items():
    module, leaf = _split(name)
    number = lambda side, level: int(level) if side == 'down' else (
        levels - 1 - int(level))
    if m := re.fullmatch(r'(down|up)\.(\d+)\.(block|attn)\.(\d+)\.(.+)',
                         module):
      kind, j, rest = m[3], m[4], m[5]
      place = f'{m[1]}_blocks.{number(m[1], m[2])}'
    elif m := re.fullmatch(r'mid\.(block|attn)_(\d)\.(.+)', module):
      kind, j, rest, place = m[1], int(m[2]) - 1, m[3], 'mid_block'
    elif m := re.fullmatch(r'(down|up)\.(\d+)\.(downsample|upsample)\.(.+)',
                           module):
      kind, rest = None, _swap(DIFFUSERS_RESNET, m[4])
      place = f'{m[1]}_blocks.{number(m[1], m[2])}.{m[3]}rs.0'
    else:
      kind, rest, place = None, '', {
          'temb.dense.0': 'time_embedding.linear_1',
          'temb.dense.1': 'time_embedding.linear_2',
          'norm_out': 'conv_norm_out',
          'label_emb': 'class_embedding'}.get(module, module)
    if kind == 'block':
      place, rest = f'{place}.resnets.{j}', _swap(DIFFUSERS_RESNET, rest)
    elif kind == 'attn':
      place = f'{place}.attentions.{j}'
      rest = attention[rest] if plain else _transformer(rest)
      if plain and value.ndim == 4:
        value = value[:, :, 0, 0]
    found['.'.join(filter(None, (place, rest, leaf)))] = value
  return found


def diffusers_config(config):
  """The config.json that describes a UNetConfig."""
  attended = [config.image_size >> i in config.attn_resolutions
              for i in range(len(config.ch_mult))]
  conditional = config.context_dim is not None
  kind = 'CrossAttn' if conditional else 'Attn'
  resblock = config.resample == 'resblock'
  plain = 'Resnet{}sampleBlock2D' if resblock else '{}Block2D'
  names = lambda side: [f'{kind}{side}Block2D' if a else plain.format(side)
                        for a in attended]
  found = {
      '_class_name': 'UNet2DConditionModel' if conditional else 'UNet2DModel',
      'sample_size': config.image_size, 'in_channels': config.in_channels,
      'out_channels': config.out_channels,
      'layers_per_block': config.num_res_blocks,
      'block_out_channels': [config.ch * m for m in config.ch_mult],
      'down_block_types': names('Down'), 'up_block_types': names('Up')[::-1],
      'norm_num_groups': config.norm_groups, 'norm_eps': config.norm_eps,
      'downsample_padding': config.downsample_padding[0],
      'flip_sin_to_cos': config.time_order == 'cos_sin',
      'freq_shift': config.time_freq_shift, 'act_fn': 'silu',
      'attention_head_dim': config.head_channels, 'dropout': config.dropout,
      'num_class_embeds': config.num_classes}
  if conditional:
    widths = [config.heads(config.ch * m) for m in config.ch_mult]
    found |= {'cross_attention_dim': config.context_dim,
              'transformer_layers_per_block': config.transformer_depth,
              'attention_head_dim': widths if len(set(widths)) > 1
              else widths[0]}
  else:
    found |= {'downsample_type': 'resnet' if resblock else 'conv',
              'upsample_type': 'resnet' if resblock else 'conv',
              'resnet_time_scale_shift': 'scale_shift'
              if config.time_injection == 'scale_shift' else 'default',
              'attn_norm_num_groups': config.norm_groups}
  return found


def diffusers_first_stage(state, config):
  """Renames an autoencoder's tensors as AutoencoderKL and VQModel do."""
  levels = len(config.ch_mult)
  found = {}
  for name, value in state.items():
    module, leaf = _split(name)
    m = re.fullmatch(r'(encoder|decoder)\.(.+)', module)
    if not m:
      module = {'quantize': 'quantize.embedding'}.get(module, module)
      found[f'{module}.{leaf}'] = value
      continue
    part, rest = m.groups()
    if m := re.fullmatch(r'(down|up)\.(\d+)\.(block|attn)\.(\d+)\.(.+)', rest):
      level = int(m[2]) if m[1] == 'down' else levels - 1 - int(m[2])
      place, kind, j, rest = f'{m[1]}_blocks.{level}', m[3], m[4], m[5]
    elif m := re.fullmatch(r'mid\.(block|attn)_(\d)\.(.+)', rest):
      place, kind, j, rest = 'mid_block', m[1], int(m[2]) - 1, m[3]
    elif m := re.fullmatch(r'(down|up)\.(\d+)\.(downsample|upsample)\.conv',
                           rest):
      level = int(m[2]) if m[1] == 'down' else levels - 1 - int(m[2])
      place, kind, rest = f'{m[1]}_blocks.{level}.{m[3]}rs.0', None, 'conv'
    else:
      place = {'norm_out': 'conv_norm_out'}.get(rest, rest)
      kind, rest = None, ''
    if kind == 'block':
      place, rest = f'{place}.resnets.{j}', _swap(DIFFUSERS_RESNET, rest)
    elif kind == 'attn':
      place, rest = f'{place}.attentions.{j}', DIFFUSERS_ATTENTION[rest]
      value = value[:, :, 0, 0] if value.ndim == 4 else value
    found['.'.join(filter(None, (part, place, rest, leaf)))] = value
  return found


def compvis_first_stage(state, unused_config):
  """Renames an autoencoder's tensors as CompVis: only the codebook's differ."""
  return {name.replace('quantize.', 'quantize.embedding.'): value
          for name, value in state.items()}
