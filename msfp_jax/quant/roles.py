"""Roles of layers, and which roles keep more bits than the rest (data)."""

from collections.abc import Mapping
import re

# Role of each layer of the UNet, by the first pattern its whole name matches.
ROLES = {
    'conv_in': r'conv_in',
    'conv_out': r'conv_out',
    'temb': r'temb\.dense\.\d+',
    'temb_proj': r'.*\.temb_proj',
    'shortcut': r'.*\.nin_shortcut',
    'downsample': r'down\.\d+\.downsample\.conv',
    'upsample': r'up\.\d+\.upsample\.conv',
    'attention': r'.*\.attn[._]\d+\.(.+\.)?(q|k|v|proj_in|proj_out)',
    'feed_forward': r'.*\.ff\.(proj|out)',
    'conv': r'.*\.conv[12]',
}
# Layers of the UNet whose input follows SiLU: the paper's AALs, by structure.
SILU_INPUTS = r'temb\.dense\.1|.*\.temb_proj|.*\.conv[12]|conv_out'

# Role -> bits of weights and inputs, whatever the rest has.
EXCEPTIONS = {
    'ends-8': {'conv_in': 8, 'conv_out': 8, 'temb': 8},
    'skip-8': {'conv_in': 8, 'conv_out': 8, 'temb': 8, 'shortcut': 8,
               'downsample': 8, 'upsample': 8},
}
# What lists of exceptions were called before.
FORMER_NAMES = {'all-4': 'ends-8'}


def role_of(layer: str, roles: Mapping[str, str] | None = None) -> str:
  """The role of a layer.

  Raises:
    ValueError: no rule covers the layer.
  """
  for role, pattern in (ROLES if roles is None else roles).items():
    if re.fullmatch(pattern, layer):
      return role
  raise ValueError(f'no rule covers layer {layer!r}: add its role to '
                   'quant.roles.ROLES, or pass roles={role: pattern}')


def follows_silu(layer: str) -> bool:
  """Whether a layer of the UNet is an AAL by structure."""
  return re.fullmatch(SILU_INPUTS, layer) is not None


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
