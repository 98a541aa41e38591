"""UNets of CompVis, latent diffusion and Stable Diffusion (openaimodel.py).

A Lightning file holds the trained UNet (`model.diffusion_model.*`), its moving
average under names without dots (`model_ema.*`), the first stage and the
condition's embedder.
"""

from collections.abc import Mapping
import re
from typing import Any

from absl import logging

from msfp_jax.convert import naming
from msfp_jax.convert import source
from msfp_jax.convert import unet_yaml_keys
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig

MODEL = UNet  # of what `config` returns
_LANDMARK = 'input_blocks.0.0.weight'
_RAW = 'model.diffusion_model.'
_EMA = 'model_ema.'
# cin256-v2's embedder of the class, kept with the UNet.
_CLASS_EMBEDDER = 'cond_stage_model.embedding.weight'

# openaimodel numbers its blocks in one row, ours count by level; here with two
# residual blocks a level (n: index in input_blocks and output_blocks):
#
#   input_blocks   0        1  2    3           4  5    6           7 ...
#   ours           conv_in  down.0  downsample  down.1  downsample  down.2
#
#   output_blocks  0  1  2                 3  4  5  ...
#   ours           up.LAST (2: upsample)   up.LAST - 1
#
# Inside of a block a Sequential numbers what is there: .0 is the residual
# block, .1 attention where the level has it, and an up-sampling comes behind
# these.
_RESBLOCK = (
    (r'in_layers\.0', 'norm1'), (r'in_layers\.2', 'conv1'),
    (r'emb_layers\.1', 'temb_proj'), (r'out_layers\.0', 'norm2'),
    (r'out_layers\.3', 'conv2'), (r'skip_connection', 'nin_shortcut'))
_ATTENTION = ((r'([qkv])', r'\1'), *naming.TRANSFORMER)
_ROOT = (
    (r'time_embed\.0', 'temb.dense.0'), (r'time_embed\.2', 'temb.dense.1'),
    (r'label_emb', 'label_emb'), (r'context_emb', 'context_emb'),
    (r'input_blocks\.0\.0', 'conv_in'),
    (r'out\.0', 'norm_out'), (r'out\.2', 'conv_out'))


def detect(tensors: Mapping[str, LazyTensor]) -> bool:
  return any(name.endswith(_LANDMARK) for name in tensors)


def select(tensors: Mapping[str, LazyTensor], ema: bool
           ) -> dict[str, LazyTensor]:
  """Picks the UNet's tensors; a class embedder becomes `context_emb.weight`."""
  root = next(name.removesuffix(_LANDMARK) for name in tensors
              if name.endswith(_LANDMARK))
  found = naming.below(tensors, root)
  # Pruned files keep the average's counters and drop the average.
  averaged = {
      name: tensor for name, tensor in naming.below(
          tensors, root.removesuffix(_RAW) + _EMA).items()
      if _flat(name).startswith('diffusion_model')}
  if averaged and ema:
    found = _averaged(found, averaged)
  elif ema:
    logging.info('the checkpoint has no moving average; took the weights')
  embedder = root.removesuffix(_RAW) + _CLASS_EMBEDDER
  if embedder in tensors:
    found['context_emb.weight'] = tensors[embedder]
  return found


def _averaged(raw, averaged):
  """Gives the moving averages the names of the weights that they belong to."""
  # LitEma drops the dots, which cannot be put back; so they are dropped here
  # too.
  dotless = {_flat(f'diffusion_model.{name}'): name for name in raw}
  flat = {}
  unknown = []
  for name, tensor in averaged.items():
    if _flat(name) not in dotless or _flat(name) in flat:
      unknown.append(name)
    flat[_flat(name)] = tensor
  absent = [name for key, name in dotless.items() if key not in flat]
  if unknown or absent:
    raise ValueError(
        'the moving average does not fit the weights: it has '
        f'{sorted(unknown)} beside them, and lacks {sorted(absent)}; '
        'ema=False takes the weights')
  return {name: flat[key] for key, name in dotless.items()}


def _flat(name):
  """A name without dots, and without what wrappers add to it."""
  # Without its dots `model_ema.diffusion_model._orig_mod.out` is one word, so
  # that the parts cannot be told by them.
  name = name.replace('.', '')
  for part in source.WRAPPERS:
    name = name.replace(part, '')
  return name


def config(tensors: Mapping[str, LazyTensor],
           given: Mapping[str, Any] | None) -> UNetConfig:
  """The configuration, from the yaml, or from a published model's shapes.

  Raises:
    ValueError: the yaml asks for what this UNet does not have; or there is
      none, and no published model has these shapes.
  """
  fields = _from_yaml(given) if given else {}
  if absent := _STRUCTURE - fields.keys():
    shapes = _shapes(tensors)
    fields |= {field: shapes[field] for field in absent}
  if 'image_size' not in fields:
    fields |= _published(fields)
  side, attended = fields['image_size'], fields.pop('attended')
  return UNetConfig(
      norm_eps=1e-5, downsample_padding=(1, 1),
      time_order='cos_sin', time_freq_shift=0,
      attn_resolutions=tuple(side >> i for i in attended),
      context_classes=naming.size_if_any(tensors, 'context_emb.weight', 0),
      **{'dropout': 0.0} | fields)


# What shapes tell as well, `attended` being the levels with attention.
_STRUCTURE = frozenset({
    'in_channels', 'out_channels', 'ch', 'ch_mult', 'num_res_blocks',
    'attended', 'resample', 'time_injection', 'context_dim', 'num_classes',
    'transformer_depth'})


def _shapes(tensors):
  """Reads the fields of _STRUCTURE off the names and shapes of the tensors."""
  ch = naming.size(tensors, 'time_embed.0.weight', 1)
  blocks = naming.indices(tensors, r'input_blocks\.(\d+)\.')
  # As many blocks up as down, and an up-sampling on each level but the finest.
  levels = 1 + sum(_is_upsample(tensors, n) for n in blocks)
  res = len(blocks) // levels - 1
  # An up-sampling is a plain convolution, or else a residual block.
  resblock = not any(re.fullmatch(r'output_blocks\.\d+\.\d\.conv\.weight', name)
                     for name in tensors)
  first = [f'input_blocks.{1 + i * (res + 1)}' for i in range(levels)]
  out = [naming.size(tensors, f'{block}.0.out_layers.3.weight', 0)
         for block in first]
  # Of the time to a scale and a shift for each channel, or to a sum alone.
  projection = naming.size(tensors, 'input_blocks.1.0.emb_layers.1.weight', 0)
  return {
      'in_channels': naming.size(tensors, 'input_blocks.0.0.weight', 1),
      'out_channels': naming.size(tensors, 'out.2.weight', 0),
      'ch': ch, 'ch_mult': tuple(c // ch for c in out), 'num_res_blocks': res,
      'attended': [i for i, block in enumerate(first)
                   if f'{block}.1.norm.weight' in tensors],
      'resample': 'resblock' if levels > 1 and resblock else 'conv',
      'time_injection': 'scale_shift' if projection == 2 * out[0] else 'add',
      'context_dim': next(
          (naming.size(tensors, name, 1) for name in tensors
           if name.endswith('attn2.to_k.weight')), None),
      'num_classes': naming.size_if_any(tensors, 'label_emb.weight', 0),
      'transformer_depth': 1 + max(naming.indices(
          tensors, r'middle_block\.1\.transformer_blocks\.(\d+)'), default=0),
  }


def _is_upsample(tensors, n):
  """Whether output block n ends with an up-sampling, of either kind."""
  # [12]: behind the residual block, or behind its attention.
  return any(re.match(rf'output_blocks\.{n}\.([12]\.conv|[12]\.in_layers)\.',
                      name) for name in tensors)


_FACTORS = [2**i for i in range(16)]
# Fields of unet_config that mean one of ours.
_FIELDS = {
    'in_channels': 'in_channels', 'out_channels': 'out_channels',
    'model_channels': 'ch', 'num_res_blocks': 'num_res_blocks',
    'context_dim': 'context_dim', 'num_classes': 'num_classes',
    'transformer_depth': 'transformer_depth'}


def _from_yaml(config):
  """Reads the fields of a CompVis yaml; refuses those of other models."""
  try:
    outer = config['model']['params']
    params = outer['unet_config']['params']
    # In unet_config Stable Diffusion's own yaml has "32 # unused".
    side = outer.get('image_size') or params['image_size']
    unet_yaml_keys.check_compvis(config['model'])
  except (KeyError, TypeError, AttributeError):
    raise ValueError('the configuration has no model.params.unet_config.params '
                     'with image_size, as those of CompVis do') from None
  found = {ours: naming.single(params[field], field)
           for field, ours in _FIELDS.items() if field in params}
  if 'dropout' in params:
    found['dropout'] = params['dropout']
  if 'channel_mult' in params:
    found['ch_mult'] = tuple(params['channel_mult'])
  if 'attention_resolutions' in params:
    # There they are factors of down-sampling.
    factors = params['attention_resolutions']
    if odd := [f for f in factors if f not in _FACTORS]:
      raise ValueError(f'attention_resolutions={factors}: {odd} are no powers '
                       'of two')
    found['attended'] = sorted(_FACTORS.index(f) for f in factors)
  if 'resblock_updown' in params:
    found['resample'] = 'resblock' if params['resblock_updown'] else 'conv'
  if 'use_scale_shift_norm' in params:
    found['time_injection'] = (
        'scale_shift' if params['use_scale_shift_norm'] else 'add')
  return found | naming.sides(side, 'image_size') | _heads(params)


def _heads(params):
  heads, width = (
      -1 if params.get(field) is None else naming.single(params[field], field)
      for field in ('num_heads', 'num_head_channels'))
  if width != -1:
    return {'head_channels': width}
  if heads == -1:
    raise ValueError('the configuration has neither num_heads nor '
                     'num_head_channels')
  return {'num_heads': heads}


# Side and heads of the published models, by (width of the context, up- and
# down-sampling, multipliers): shapes do not tell them.
_PUBLISHED = {
    (None, 'conv', (1, 2, 3, 4)): {'image_size': 64, 'head_channels': 32},
    (None, 'resblock', (1, 2, 2, 4, 4)): {'image_size': 32, 'num_heads': 8},
    (512, 'conv', (1, 2, 3, 5)): {'image_size': 64, 'num_heads': 1},
    (512, 'conv', (1, 2, 4)): {'image_size': 32, 'head_channels': 32},
    (768, 'conv', (1, 2, 4, 4)): {'image_size': 64, 'num_heads': 8},
    (1024, 'conv', (1, 2, 4, 4)): {'image_size': 64, 'head_channels': 64},
}


def _published(fields):
  """Looks up side and heads of the published model of this shape."""
  key = (fields['context_dim'], fields['resample'], fields['ch_mult'])
  if key not in _PUBLISHED:
    raise ValueError(
        'shapes do not tell the attention heads, and no published model has '
        f'context {key[0]}, resampling {key[1]!r} and multipliers {key[2]}: '
        'pass its yaml as config')
  logging.info('heads and side as those of the published model: %s',
               _PUBLISHED[key])
  return _PUBLISHED[key]


def rename(tensors: Mapping[str, LazyTensor], config: UNetConfig
           ) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
  """Gives tensors our names, and splits fused projections by head."""
  return naming.rename(_split_qkv(tensors, config),
                       lambda module: module_name(module, config))


def module_name(module: str, config: UNetConfig) -> str | None:
  """Our name of a module; None where there is no rule."""
  if (ours := naming.rename_module(module, _ROOT)) is not None:
    return ours
  if match := re.fullmatch(r'middle_block\.([012])\.(.+)', module):
    place, rules = {
        '0': ('mid.block_1', _RESBLOCK), '1': ('mid.attn_1', _ATTENTION),
        '2': ('mid.block_2', _RESBLOCK)}[match[1]]
    return _inside(place, match[2], rules)
  match = re.fullmatch(r'(input|output)_blocks\.(\d+)\.(\d)\.(.+)', module)
  if not match:
    return None
  side, n, k, rest = match[1], int(match[2]), int(match[3]), match[4]
  per_level = config.num_res_blocks + 1
  is_block = naming.rename_module(rest, _RESBLOCK) is not None
  if side == 'input':
    level, j = divmod(n - 1, per_level)  # block 0 was conv_in
    if j == config.num_res_blocks:
      if rest == 'op':
        return f'down.{level}.downsample.conv'
      return _inside(f'down.{level}.downsample', rest, _RESBLOCK)
    place = f'down.{level}'
  else:
    level, j = divmod(n, per_level)
    level = len(config.ch_mult) - 1 - level  # the coarsest comes first
    place = f'up.{level}'
    if rest == 'conv':
      return f'{place}.upsample.conv'
    if k and is_block:
      return _inside(f'{place}.upsample', rest, _RESBLOCK)
  if is_block:
    return _inside(f'{place}.block.{j}', rest, _RESBLOCK)
  return _inside(f'{place}.attn.{j}', rest, _ATTENTION)


def _inside(place, rest, rules):
  ours = naming.rename_module(rest, rules)
  return None if ours is None else f'{place}.{ours}'


def _split_qkv(tensors, config):
  """Splits fused projections: rows are [head][q, k, v][width of a head]."""
  found = {}
  # Rows of 2 heads of width d: q0 k0 v0 q1 k1 v1, each d rows. Split when read.
  for name, tensor in tensors.items():
    match = re.fullmatch(r'(.+)\.qkv\.(weight|bias)', name)
    channels, rest = divmod(tensor.shape[0] if tensor.shape else 0, 3)
    if not match or rest:
      found[name] = tensor
      continue
    for i, part in enumerate('qkv'):
      found[f'{match[1]}.{part}.{match[2]}'] = LazyTensor(
          (channels, *tensor.shape[1:]), tensor.dtype,
          _part_reader(tensor, config, i), tensor.refused)
  return found


def _part_reader(tensor, config, part):
  def read():
    heads = config.heads(tensor.shape[0] // 3)
    rows = tensor.read().reshape(heads, 3, -1, *tensor.shape[1:])
    return rows[:, part].reshape(-1, *tensor.shape[1:])
  return read
