"""Keys of FLUX's config.json (diffusers): used, harmless, or refused.

What a key does is what FluxTransformer2DModel does with it.
"""

from collections.abc import Mapping
from typing import Any

from msfp_jax.convert import key_check
from msfp_jax.convert import key_values as kinds

# Keys that become fields of `FluxConfig`, and what they may be.
USED: dict[str, kinds.Kind] = {
    'in_channels': kinds.WHOLE, 'out_channels': kinds.or_none(kinds.WHOLE),
    'num_layers': kinds.WHOLE, 'num_single_layers': kinds.WHOLE,
    'attention_head_dim': kinds.WHOLE, 'num_attention_heads': kinds.WHOLE,
    'joint_attention_dim': kinds.WHOLE, 'pooled_projection_dim': kinds.WHOLE,
    'guidance_embeds': kinds.FLAG,
    'axes_dims_rope': kinds.listed(kinds.WHOLE, least=3)}
# Keys with the values that our transformer computes. Latents come to it as
# tokens of 2 x 2 places, of which it makes no larger ones.
ONLY: dict[str, tuple[Any, ...]] = {
    '_class_name': ('FluxTransformer2DModel',), 'patch_size': (1,)}
HARMLESS = frozenset({'_diffusers_version', '_name_or_path'})
KEYS = USED.keys() | ONLY.keys() | HARMLESS

_WHAT = 'this transformer'
_PLACES = 4  # of the latents, in a token
# diffusers' own, where config.json leaves one of them out.
_DEFAULTS = {'attention_head_dim': 128, 'axes_dims_rope': [16, 56, 56]}


def check(given: Mapping[str, Any]) -> None:
  """Looks at the config.json of a transformer.

  Raises:
    ValueError: by key, for what ours does not have.
  """
  # How keys go together can be told only of values that they may have.
  key_check.refuse(_WHAT, key_check.wrong(given, USED))
  key_check.refuse(_WHAT, key_check.odd(given, ONLY, KEYS)
                   + _odd_channels(given) + _odd_axes(given))


def check_channels(given: Mapping[str, int]) -> None:
  """Looks at `in_channels` and `out_channels` of a token.

  Raises:
    ValueError: not of 2 x 2 places.
  """
  key_check.refuse(_WHAT, _odd_channels(given))


def _odd_channels(given):
  return [f'{key}={given[key]!r} (must be a multiple of {_PLACES}: tokens are '
          '2 x 2 places)' for key in ('in_channels', 'out_channels')
          if given.get(key) and given[key] % _PLACES]


def _odd_axes(given):
  """Axes that do not fill a head."""
  # Without a key that says otherwise, what the other has need not fit it.
  if not given.keys() & _DEFAULTS.keys():
    return []
  found = _DEFAULTS | given
  head, axes = found['attention_head_dim'], found['axes_dims_rope']
  if len(axes) == 3 and sum(axes) == head and not any(n % 2 for n in axes):
    return []
  return [f'axes_dims_rope={axes!r} with attention_head_dim={head!r} (must be '
          'three even numbers that add up to it)']
