"""Roles of layers, and which roles keep more bits than the rest (data).

A family of models is an entry of `FAMILIES`: patterns of its layers' names.
"""

from collections.abc import Mapping
import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Family:
  """What is known of the layers of a family of models, by their whole names.

  Attributes:
    roles: {role: pattern}; a layer has the first role that matches. Families
      may share the names of roles, but no name of a layer.
    activated: pattern of the layers whose input comes out of SiLU or GELU: the
      paper's AALs, by structure.
    exceptions: {list: {role: bits of weights and inputs, whatever the rest
      has}}; every family has the same lists.
  """

  roles: Mapping[str, str]
  activated: str
  exceptions: Mapping[str, Mapping[str, int]]


_UNET_ENDS = {'conv_in': 8, 'conv_out': 8, 'temb': 8}
_UNET = Family(
    roles={
        'conv_in': r'conv_in',
        'conv_out': r'conv_out',
        'temb': r'temb\.dense\.\d+',
        'temb_proj': r'.*\.temb_proj',
        'shortcut': r'.*\.nin_shortcut',
        'downsample': r'down\.\d+\.downsample\.conv',
        'upsample': r'up\.\d+\.upsample\.conv',
        'attention': r'.*\.attn[._]\d+\.(.+\.)?(q|k|v|proj_in|proj_out)',
        'feed_forward': r'.*\.ff\.(proj|out)',
        'conv': r'.*\.conv[12]'},
    activated=r'temb\.dense\.1|.*\.temb_proj|.*\.conv[12]|conv_out',
    exceptions={
        'ends-8': _UNET_ENDS,
        'skip-8': _UNET_ENDS | {
            'shortcut': 8, 'downsample': 8, 'upsample': 8}})

# Of FLUX.1's 11.9 billion weights adaLN's are 3.2: 1.6 GB more at 8 bits than
# at 4. They run once an image and not once a token, and what they make scales
# and gates all that every block does; there the time and the text come in.
_FLUX_ENDS = {'x_embedder': 8, 'context_embedder': 8, 'temb': 8,
              'modulation': 8, 'norm_out': 8, 'proj_out': 8}
_BLOCK, _SINGLE = (r'transformer_blocks\.\d+\.',
                   r'single_transformer_blocks\.\d+\.')
_FLUX = Family(
    roles={
        'x_embedder': r'x_embedder',
        'context_embedder': r'context_embedder',
        'temb': r'time_text_embed\.\w+\.linear_[12]',
        'modulation': rf'({_BLOCK}norm1(_context)?|{_SINGLE}norm)\.linear',
        'attention': (rf'({_BLOCK}|{_SINGLE})attn\.'
                      r'(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|'
                      rf'{_SINGLE}proj_out\.attn'),
        'feed_forward': (rf'{_BLOCK}ff(_context)?\.net\.(0\.proj|2)|'
                         rf'{_SINGLE}proj_(mlp|out\.mlp)'),
        'norm_out': r'norm_out\.linear',
        'proj_out': r'proj_out'},
    activated=(r'time_text_embed\.\w+\.linear_2|(.*\.)?norm\w*\.linear|'
               r'.*\.ff(_context)?\.net\.2|.*\.proj_out\.mlp'),
    # Nothing leads around its blocks but the residual sums, which no layer is
    # in.
    exceptions={'ends-8': _FLUX_ENDS, 'skip-8': _FLUX_ENDS})

FAMILIES = {'unet': _UNET, 'flux': _FLUX}
# Of all families together. A list has all their roles: a model's own are those
# that its layers have.
ROLES = frozenset(role for family in FAMILIES.values() for role in family.roles)
EXCEPTIONS = {
    name: {role: bits for family in FAMILIES.values()
           for role, bits in family.exceptions[name].items()}
    for name in _UNET.exceptions}
# What lists of exceptions were called before.
FORMER_NAMES = {'all-4': 'ends-8'}


def role_of(layer: str, roles: Mapping[str, str] | None = None) -> str:
  """The role of a layer.

  Args:
    layer: its whole name.
    roles: {role: pattern}; those of all families by default.

  Raises:
    ValueError: no rule covers the layer.
  """
  tables = ([family.roles for family in FAMILIES.values()] if roles is None
            else [roles])
  for table in tables:
    for role, pattern in table.items():
      if re.fullmatch(pattern, layer):
        return role
  raise ValueError(f'no rule covers layer {layer!r}: add its role to '
                   'quant.roles.FAMILIES, or pass roles={role: pattern}')


def follows_activation(layer: str) -> bool:
  """Whether a layer of a known family is an AAL by structure."""
  return any(re.fullmatch(family.activated, layer)
             for family in FAMILIES.values())


def exceptions_of(name: str | Mapping[str, int],
                  roles: Mapping[str, str] | None = None) -> Mapping[str, int]:
  """{role: bits} of a name in EXCEPTIONS, present or former, or of a dict.

  Raises:
    ValueError: there is no such list, or a role that `roles` does not have.
  """
  if isinstance(name, str):
    name = FORMER_NAMES.get(name, name)
    if name not in EXCEPTIONS:
      former = ', '.join(f'{new} was {old}' for old, new
                         in FORMER_NAMES.items())
      raise ValueError(f'exceptions {name!r}: must be a dict or one of '
                       f'{sorted(EXCEPTIONS)} ({former})')
    name = EXCEPTIONS[name]
  known = ROLES if roles is None else roles
  if unknown := set(name) - set(known):
    raise ValueError(f'exceptions for roles {sorted(unknown)}, which are not '
                     f'among {sorted(known)}')
  return name
