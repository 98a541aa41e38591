"""Renames diffusers' blocks to ours, for its UNets and its autoencoders."""

from collections.abc import Sequence
import re

from msfp_jax.convert import naming

_RESNET = (
    (r'(norm1|conv1|norm2|conv2)', r'\1'), (r'time_emb_proj', 'temb_proj'),
    (r'conv_shortcut', 'nin_shortcut'))
# Plain attention, in its present and in its old names.
ATTENTION = (
    (r'(?:to_q|query)', 'q'), (r'(?:to_k|key)', 'k'), (r'(?:to_v|value)', 'v'),
    (r'(?:to_out\.0|proj_attn)', 'proj_out'), (r'group_norm', 'norm'))


def block_module(module: str, levels: int,
                 attention: Sequence[naming.Rule] = ATTENTION) -> str | None:
  """Our name of a module inside of mid_block, down_blocks or up_blocks.

  Args:
    module: such as `up_blocks.0.resnets.1.conv1`.
    levels: of the model; diffusers numbers the way up as it is executed, we by
      level.
    attention: rules for what is inside of an attention.

  Returns:
    Such as `up.3.block.1.conv1`; None where there is no rule.
  """
  if match := re.fullmatch(r'mid_block\.(resnets|attentions)\.(\d)\.(.+)',
                           module):
    kind, j, rest = match[1], int(match[2]), match[3]
    place = f'mid.{"block" if kind == "resnets" else "attn"}_{j + 1}'
  else:
    match = re.fullmatch(
        r'(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)'
        r'\.(\d+)\.(.+)', module)
    if not match:
      return None
    side, level, kind, j, rest = match.groups()
    # up_blocks.0 is the coarsest, ours up.3 of 4 levels. A ResNet that
    # resamples lies in downsamplers.0 and upsamplers.0, like a convolution.
    level = int(level) if side == 'down' else levels - 1 - int(level)
    place = f'{side}.{level}.' + {
        'resnets': f'block.{j}', 'attentions': f'attn.{j}'}.get(
            kind, kind.removesuffix('rs'))
    if kind.endswith('samplers') and rest == 'conv':
      return f'{place}.conv'
  ours = naming.rename_module(
      rest, attention if kind == 'attentions' else _RESNET)
  return None if ours is None else f'{place}.{ours}'
