"""Keys of a UNet's config.json (diffusers): used, harmless, or refused.

What a key does is what UNet2DModel and UNet2DConditionModel do with it. Their
files have each other's keys where a tool wrote all that it knew, so that the
lists are one.
"""

from collections.abc import Mapping
import re
from typing import Any

from msfp_jax.convert import key_check
from msfp_jax.convert import key_values as kinds

PLAIN, CONDITIONAL = CLASSES = ('UNet2DModel', 'UNet2DConditionModel')
# Keys that become fields of `UNetConfig`, and what they may be.
USED: dict[str, kinds.Kind] = {
    'sample_size': kinds.or_none(kinds.SIDES), 'in_channels': kinds.WHOLE,
    'out_channels': kinds.WHOLE,
    'block_out_channels': kinds.listed(kinds.WHOLE),
    'layers_per_block': kinds.by_level(kinds.WHOLE),
    'down_block_types': kinds.listed(kinds.TEXT),
    'up_block_types': kinds.listed(kinds.TEXT),
    'dropout': kinds.PROBABILITY, 'norm_num_groups': kinds.WHOLE,
    'norm_eps': kinds.number(0), 'freq_shift': kinds.number(),
    'num_class_embeds': kinds.or_none(kinds.WHOLE),
    'attention_head_dim': kinds.or_none(kinds.by_level(kinds.WHOLE)),
    'cross_attention_dim': kinds.or_none(kinds.by_level(kinds.WHOLE)),
    'transformer_layers_per_block': kinds.by_level(kinds.WHOLE)}
# Keys with the values that our UNet computes; several of them are fields too.
ONLY: dict[str, tuple[Any, ...]] = {
    '_class_name': CLASSES, 'act_fn': ('silu', 'swish'),
    'center_input_sample': (False,), 'flip_sin_to_cos': (True, False),
    'time_embedding_type': ('positional',), 'time_embedding_act_fn': (None,),
    'timestep_post_act': (None,), 'time_cond_proj_dim': (None,),
    'resnet_time_scale_shift': ('default', 'scale_shift'),
    'resnet_skip_time_act': (False,), 'resnet_out_scale_factor': (1,),
    'downsample_padding': (0, 1), 'downsample_type': ('conv', 'resnet', None),
    'upsample_type': ('conv', 'resnet', None),
    'conv_in_kernel': (3,), 'conv_out_kernel': (3,),
    'mid_block_type': ('UNetMidBlock2D', 'UNetMidBlock2DCrossAttn'),
    'mid_block_scale_factor': (1,), 'add_attention': (True,),
    'attention_type': ('default',), 'dual_cross_attention': (False,),
    'only_cross_attention': (False,), 'num_attention_heads': (None,),
    'reverse_transformer_layers_per_block': (None,),
    'class_embed_type': (None,), 'class_embeddings_concat': (False,),
    'addition_embed_type': (None,), 'encoder_hid_dim': (None,),
    'encoder_hid_dim_type': (None,)}
# Keys whose meaning depends on others, see `_contradictions`.
_CHECKED = frozenset({'attn_norm_num_groups', 'time_embedding_dim'})
# What an average's file says of its training (EMAModel.save_pretrained).
AVERAGES = frozenset({
    'decay', 'inv_gamma', 'min_decay', 'optimization_step', 'power',
    'update_after_step', 'use_ema_warmup'})
# Keys that change nothing: names; `use_linear_projection`, which the tensors
# show, and `upcast_attention`, since all is computed in float32; and what only
# a refused option reads (learned time, SimpleCrossAttn, added embeddings).
HARMLESS = AVERAGES | {
    '_diffusers_version', '_name_or_path', 'use_linear_projection',
    'upcast_attention', 'num_train_timesteps', 'addition_embed_type_num_heads',
    'addition_time_embed_dim', 'projection_class_embeddings_input_dim',
    'mid_block_only_cross_attention', 'cross_attention_norm'}
KEYS = USED.keys() | ONLY.keys() | _CHECKED | HARMLESS

_OLD_PREFIX = 'UNetRes'  # which diffusers takes off the names of blocks
_BLOCKS = {
    PLAIN: re.compile(r'(Attn)?(Down|Up)Block2D|Resnet(Down|Up)sampleBlock2D'),
    CONDITIONAL: re.compile(
        r'(CrossAttn)?(Down|Up)Block2D|Resnet(Down|Up)sampleBlock2D')}


def kind_of(given: Mapping[str, Any], attends: bool) -> str:
  """The class that a config.json describes.

  Args:
    given: the config.json.
    attends: whether the tensors attend to a context; asked where no
      `_class_name` is stated.
  """
  return given.get('_class_name') or (CONDITIONAL if attends else PLAIN)


def block_types(given: Mapping[str, Any], side: str) -> list[str]:
  """`down_block_types` or `up_block_types` in present names; [] without."""
  return [str(name).removeprefix(_OLD_PREFIX)
          for name in given.get(f'{side}_block_types') or ()]


def resampling(given: Mapping[str, Any], side: str) -> set[str]:
  """How a side's levels resample: 'conv', 'resnet', or both.

  Blocks with attention ask `downsample_type` and `upsample_type`; for all
  others their own type tells, whatever these say. The last level of a side
  does not resample.
  """
  asked = str(given.get(f'{side}sample_type') or 'conv')
  return {'resnet' if name.startswith('Resnet')
          else asked if name.startswith('Attn') else 'conv'
          for name in block_types(given, side)[:-1]}


def check(given: Mapping[str, Any], kind: str) -> None:
  """Looks at the config.json of a UNet of class `kind`.

  Raises:
    ValueError: by key, for what our UNet does not have.
  """
  if kind not in CLASSES:
    raise ValueError(f'_class_name={kind!r}: no UNet that is known here, only '
                     f'{list(CLASSES)} are')
  # How keys go together can be told only of values that they may have.
  key_check.refuse('this UNet', key_check.wrong(given, USED))
  key_check.refuse('this UNet', key_check.odd(
      given, ONLY, KEYS, ('only_cross_attention',))
      + _odd_blocks(given, kind) + _contradictions(given, kind))


def _odd_blocks(given, kind):
  """Levels that are not ours: of other blocks, or other ones up than down."""
  down, up = block_types(given, 'down'), block_types(given, 'up')
  texts = [f'block type {name!r}' for name in (*down, *up)
           if not _BLOCKS[kind].fullmatch(name)]
  attended = [['Attn' in name for name in names] for names in (down, up[::-1])]
  if down and up and attended[0] != attended[1]:
    texts.append('attention at other levels up than down')
  levels = {key: len(given[key]) for key in (
      'block_out_channels', 'down_block_types', 'up_block_types')
            if isinstance(given.get(key), list)}
  if len(set(levels.values())) > 1:
    texts.append(f'levels of these numbers: {levels}')
  both = resampling(given, 'down') | resampling(given, 'up')
  if len(both) > 1:
    texts.append('resampling by convolutions at some levels and by residual '
                 'blocks at others')
  return texts


def _contradictions(given, kind):
  """Keys that are ours by the values of others."""
  texts = []
  groups = given.get('norm_num_groups', 32)
  shift = given.get('resnet_time_scale_shift') == 'scale_shift'
  norm = given.get('attn_norm_num_groups')
  if norm not in (None, groups):
    texts.append(f'attn_norm_num_groups={norm!r} (must be {groups})')
  if norm is None and shift and kind == PLAIN:
    texts.append("attn_norm_num_groups=None with resnet_time_scale_shift="
                 "'scale_shift': attention without a norm")
  width = given.get('time_embedding_dim')
  first = given.get('block_out_channels', [0])[0]
  if width not in (None, 4 * first):
    texts.append(f'time_embedding_dim={width!r} (must be four times the first '
                 'of block_out_channels)')
  if first // 2 == given.get('freq_shift', 0) != 0:
    texts.append(f'freq_shift={given["freq_shift"]!r} (half the first of '
                 'block_out_channels: frequencies divided by zero)')
  if kind == CONDITIONAL:
    if given.get('mid_block_type') == 'UNetMidBlock2D':
      texts.append("mid_block_type='UNetMidBlock2D' (of this class without "
                   'attention)')
    texts += [f'{key}=None' for key in ('attention_head_dim',
                                        'cross_attention_dim')
              if given.get(key, 0) is None]
  return texts
