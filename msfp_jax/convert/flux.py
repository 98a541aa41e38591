"""FLUX.1's transformer: diffusers' FluxTransformer2DModel, and BFL's own file.

Ours has diffusers' names and layers. What Black Forest Labs (BFL) fuse is split
when it is read, q, k and v, and in single blocks the feed-forward layer's first
half with them: a quantizer for each, and a LoRA for one of them fits. Of both
namings one matrix is split by its inputs, see `_OURS`.
"""

from collections.abc import Mapping
from typing import Any

from absl import logging

from msfp_jax.convert import flow_scheduler
from msfp_jax.convert import flux_keys
from msfp_jax.convert import naming
from msfp_jax.convert.fused import Fused
from msfp_jax.convert.fused import Product
from msfp_jax.convert.fused import renamed
from msfp_jax.convert.fused import take_apart
from msfp_jax.convert.fused import take_apart_products
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.models import flux

MODEL = flux.Flux  # of what `config` returns
# Relatives share much: with these, HunyuanVideo, FLUX.2 and Chroma are none.
_DIFFUSERS = ('single_transformer_blocks.0.norm.linear.weight',
              'context_embedder.weight')
_BFL_LANDMARK = 'double_blocks.0.img_mod.lin.weight'

_DOUBLE, _OWN = r'double_blocks\.(\d+)\.', r'transformer_blocks.\1.'
_SINGLE, _OWN_SINGLE = r'single_blocks\.(\d+)\.', (
    r'single_transformer_blocks.\1.')
_EMBED = 'time_text_embed.'


def _embedder(theirs, ours):
  return (renamed(rf'{theirs}\.in_layer', f'{_EMBED}{ours}_embedder.linear_1'),
          renamed(rf'{theirs}\.out_layer', f'{_EMBED}{ours}_embedder.linear_2'))


def _double(theirs, ours):
  return renamed(_DOUBLE + theirs, _OWN + ours)


def _three(*names):
  """Parts of a fused q, k and v."""
  return {name: (i,) for i, name in enumerate(names)}


_IMAGE_QKV = _three(
    f'{_OWN}attn.to_q', f'{_OWN}attn.to_k', f'{_OWN}attn.to_v')
_TEXT_QKV = _three(f'{_OWN}attn.add_q_proj', f'{_OWN}attn.add_k_proj',
                   f'{_OWN}attn.add_v_proj')
_SINGLE_QKV = _three(f'{_OWN_SINGLE}attn.to_q', f'{_OWN_SINGLE}attn.to_k',
                     f'{_OWN_SINGLE}attn.to_v')

# BFL's modules -> diffusers'.
_BFL: tuple[Fused, ...] = (
    renamed('img_in', 'x_embedder'), renamed('txt_in', 'context_embedder'),
    *_embedder('time_in', 'timestep'), *_embedder('vector_in', 'text'),
    *_embedder('guidance_in', 'guidance'),
    _double(r'img_mod\.lin', 'norm1.linear'),
    _double(r'txt_mod\.lin', 'norm1_context.linear'),
    Fused(_DOUBLE + r'img_attn\.qkv', _IMAGE_QKV, 3),
    Fused(_DOUBLE + r'txt_attn\.qkv', _TEXT_QKV, 3),
    _double(r'img_attn\.norm\.query_norm', 'attn.norm_q'),
    _double(r'img_attn\.norm\.key_norm', 'attn.norm_k'),
    _double(r'txt_attn\.norm\.query_norm', 'attn.norm_added_q'),
    _double(r'txt_attn\.norm\.key_norm', 'attn.norm_added_k'),
    _double(r'img_attn\.proj', 'attn.to_out.0'),
    _double(r'txt_attn\.proj', 'attn.to_add_out'),
    _double(r'img_mlp\.0', 'ff.net.0.proj'), _double(r'img_mlp\.2', 'ff.net.2'),
    _double(r'txt_mlp\.0', 'ff_context.net.0.proj'),
    _double(r'txt_mlp\.2', 'ff_context.net.2'),
    renamed(_SINGLE + r'modulation\.lin', _OWN_SINGLE + 'norm.linear'),
    # q, k, v of D rows each, then the feed-forward layer's 4 D.
    Fused(_SINGLE + 'linear1', _SINGLE_QKV | {
        f'{_OWN_SINGLE}proj_mlp': (3, 4, 5, 6)}, 7),
    renamed(_SINGLE + r'norm\.query_norm', _OWN_SINGLE + 'attn.norm_q'),
    renamed(_SINGLE + r'norm\.key_norm', _OWN_SINGLE + 'attn.norm_k'),
    renamed(_SINGLE + 'linear2', _OWN_SINGLE + 'proj_out'),
    renamed(r'final_layer\.linear', 'proj_out'),
    # Theirs is (shift, scale), diffusers' (scale, shift).
    Fused(r'final_layer\.adaLN_modulation\.1', {'norm_out.linear': (1, 0)}, 2))

# XLabs' LoRAs name what they add to; of linear1 and linear2 they know a part
# and all.
_XLABS: tuple[Fused, ...] = (
    Fused(_DOUBLE + r'processor\.qkv_lora1', _IMAGE_QKV, 3),
    Fused(_DOUBLE + r'processor\.qkv_lora2', _TEXT_QKV, 3),
    _double(r'processor\.proj_lora1', 'attn.to_out.0'),
    _double(r'processor\.proj_lora2', 'attn.to_add_out'),
    Fused(_SINGLE + r'processor\.qkv', _SINGLE_QKV, 3),
    renamed(_SINGLE + r'processor\.proj', _OWN_SINGLE + 'proj_out'))

# diffusers' modules -> ours, where they differ: inputs [attention D, GELU 4 D].
_OURS = (Fused(
    r'(single_transformer_blocks\.\d+\.proj_out)',
    {r'\1.attn': (0,), r'\1.mlp': (1, 2, 3, 4)}, 5, axis=1),)


def detect(tensors: Mapping[str, LazyTensor]) -> bool:
  return (all(name in tensors for name in _DIFFUSERS)
          or any(name.endswith(_BFL_LANDMARK) for name in tensors))


def select(tensors: Mapping[str, LazyTensor], unused_ema: bool
           ) -> dict[str, LazyTensor]:
  """Picks the transformer's tensors, in diffusers' names."""
  landmark = next((n for n in tensors if n.endswith(_BFL_LANDMARK)), None)
  if landmark is None:
    return dict(tensors)
  # Files of a whole pipeline have a prefix, and other models beside it.
  return take_apart(
      naming.below(tensors, landmark.removesuffix(_BFL_LANDMARK)), _BFL)


def config(tensors: Mapping[str, LazyTensor],
           given: Mapping[str, Any] | None) -> flux.FluxConfig:
  """The configuration, from diffusers' config.json, or from shapes.

  Args:
    tensors: in diffusers' names.
    given: the config.json, whatever the names in the file were.

  Raises:
    ValueError: it asks for what this transformer does not have; or there is
      none, and a head is not the published models'.
  """
  found = {} if given is None else _stated(given)
  if absent := _STRUCTURE - found.keys():
    shapes = _shapes(tensors)
    found |= {field: shapes[field] for field in absent}
  if 'axes_dims' not in found:
    if given is None and found['head_dim'] != flux.FluxConfig.head_dim:
      raise ValueError(
          'there is no config.json, and shapes do not tell axes_dims_rope of '
          f'a head of {found["head_dim"]}: pass its config.json as config')
    logging.info('no axes_dims_rope: took that of the published models, %s',
                 flux.FluxConfig.axes_dims)
  return flux.FluxConfig(**found)


def flow(config: flux.FluxConfig) -> flow_scheduler.FlowModel:
  """What the model takes: sigma itself, and so many tokens of an image.

  Without a scheduler's file, its shift is dev's where guidance is taken.
  """
  height, width, _ = flux.Flux(config).sample_shape
  return flow_scheduler.FlowModel(
      time=1, image_tokens=height * width // flux.PATCH**2,
      shifted=config.guidance_embeds)


# What shapes tell as well.
_STRUCTURE = frozenset({
    'in_channels', 'out_channels', 'num_layers', 'num_single_layers',
    'num_heads', 'head_dim', 'text_dim', 'pooled_dim', 'guidance_embeds'})
# Fields of config.json that mean one of ours.
_FIELDS = {
    'num_layers': 'num_layers', 'num_single_layers': 'num_single_layers',
    'num_attention_heads': 'num_heads', 'attention_head_dim': 'head_dim',
    'joint_attention_dim': 'text_dim', 'pooled_projection_dim': 'pooled_dim',
    'guidance_embeds': 'guidance_embeds', 'axes_dims_rope': 'axes_dims'}


def _stated(given):
  """Reads the fields that a config.json states."""
  if not given.keys() & {'_class_name', 'joint_attention_dim'}:
    raise ValueError('the configuration is no config.json of diffusers: it has '
                     'neither _class_name nor joint_attention_dim')
  flux_keys.check(given)
  found = {ours: given[theirs] for theirs, ours in _FIELDS.items()
           if theirs in given}
  if 'in_channels' in given:
    found['in_channels'] = given['in_channels'] // flux.PATCH**2
    out = given.get('out_channels') or given['in_channels']
    found['out_channels'] = out // flux.PATCH**2
  elif given.get('out_channels'):
    found['out_channels'] = given['out_channels'] // flux.PATCH**2
  return found


def _shapes(tensors):
  """Reads the fields of _STRUCTURE off names and shapes."""
  size = lambda name, axis: naming.size(tensors, f'{name}.weight', axis)
  width = size('x_embedder', 0)
  head = size('transformer_blocks.0.attn.norm_q', 0)
  if width % head:
    raise ValueError(f'x_embedder.weight has {width} rows, no multiple of a '
                     f'head of {head} (transformer_blocks.0.attn.norm_q)')
  channels = {'in_channels': size('x_embedder', 1),
              'out_channels': size('proj_out', 0)}
  flux_keys.check_channels(channels)
  count = lambda name: 1 + max(naming.indices(tensors, rf'{name}\.(\d+)\.'))
  return {field: value // flux.PATCH**2 for field, value in channels.items()
          } | {
              'num_layers': count('transformer_blocks'),
              'num_single_layers': count('single_transformer_blocks'),
              'num_heads': width // head, 'head_dim': head,
              'text_dim': size('context_embedder', 1),
              'pooled_dim': size(f'{_EMBED}text_embedder.linear_1', 1),
              'guidance_embeds': (
                  f'{_EMBED}guidance_embedder.linear_1.weight' in tensors)}


def rename(tensors: Mapping[str, LazyTensor], unused_config: flux.FluxConfig
           ) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
  """Gives tensors our names, and splits what diffusers has as one."""
  return take_apart(tensors, _OURS), ()


def rename_products(products: Mapping[str, Product],
                    unused_config: flux.FluxConfig) -> dict[str, Product]:
  """Likewise what LoRAs add to modules, of either naming or XLabs'."""
  return take_apart_products(
      take_apart_products(products, _BFL + _XLABS), _OURS)
