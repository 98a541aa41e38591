"""Checkpoints of ermongroup/ddim: ema_cifar10, CelebA's ckpt.pth and the like.

The names are ours already (docs of `models.unet`). A file is either a state
dict or the list [model, optimizer, epoch, step, EMA of the model].
"""

from collections.abc import Mapping
from typing import Any

from absl import logging

from msfp_jax.convert import naming
from msfp_jax.convert import unet_yaml_keys
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig

MODEL = UNet  # of what `config` returns
_LANDMARK = 'temb.dense.0.weight'
# The configurations of ermongroup/ddim all have attention at this side.
_ATTENTION_SIDE = 16


def detect(tensors: Mapping[str, LazyTensor]) -> bool:
  return any(name.endswith(_LANDMARK) for name in tensors)


def select(tensors: Mapping[str, LazyTensor], ema: bool
           ) -> dict[str, LazyTensor]:
  """Picks the wanted state dict of those in the file."""
  roots = sorted(name.removesuffix(_LANDMARK) for name in tensors
                 if name.endswith(_LANDMARK))
  # '0.' is the trained model, '4.' its moving average.
  if len(roots) > 1 and roots != ['0.', '4.']:
    raise ValueError(f'it holds several models, below {roots}: save the one '
                     'that is wanted alone')
  root = roots[-1] if ema else roots[0]
  if ema and root.startswith('0.'):
    logging.info('the checkpoint has no moving average; took the weights')
  found = naming.below(tensors, root)
  if found.pop('logvar', None):
    logging.info('left out logvar, which sampling does not use')
  return found


def config(tensors: Mapping[str, LazyTensor],
           given: Mapping[str, Any] | None) -> UNetConfig:
  """The configuration, from the original yaml, or from shapes without one."""
  if given:
    found = _from_yaml(given)
    if absent := _STRUCTURE - found.keys():
      shapes = _shapes(tensors)
      found |= {field: shapes[field] for field in absent}
    return UNetConfig(**found)
  found = _shapes(tensors)
  # Shapes do not tell the image's side; where attention stands does.
  attended = naming.indices(tensors, r'down\.(\d+)\.attn')
  side = _ATTENTION_SIDE << min(attended, default=1)
  logging.info('image side %d, as attention at %d pixels suggests; 32 groups',
               side, _ATTENTION_SIDE)
  return UNetConfig(image_size=side, dropout=0.1, attn_resolutions=tuple(
      side >> i for i in attended), **found)


_STRUCTURE = frozenset({
    'in_channels', 'out_channels', 'ch', 'ch_mult', 'num_res_blocks'})


def _shapes(tensors):
  """Reads the fields of _STRUCTURE off the names and shapes of the tensors."""
  ch = naming.size(tensors, 'conv_in.weight', 0)
  levels = naming.indices(tensors, r'down\.(\d+)\.block')
  return {
      'in_channels': naming.size(tensors, 'conv_in.weight', 1),
      'out_channels': naming.size(tensors, 'conv_out.weight', 0),
      'ch': ch,
      'ch_mult': tuple(
          naming.size(tensors, f'down.{i}.block.0.conv1.weight', 0) // ch
          for i in levels),
      'num_res_blocks': len(naming.indices(
          tensors, r'down\.0\.block\.(\d+)\.conv1')),
  }


# Fields of `model` in the original yaml that mean one of ours.
_FIELDS = {'in_channels': 'in_channels', 'out_ch': 'out_channels', 'ch': 'ch',
           'ch_mult': 'ch_mult', 'num_res_blocks': 'num_res_blocks',
           'attn_resolutions': 'attn_resolutions', 'dropout': 'dropout'}


def _from_yaml(given):
  try:
    model, side = given['model'], given['data']['image_size']
    unet_yaml_keys.check_ermongroup(given)
    sides = naming.sides(side, 'data.image_size')
    return sides | {
        ours: model[field] for field, ours in _FIELDS.items()
        if field in model}
  except (KeyError, TypeError, AttributeError):
    raise ValueError('the configuration has no model and data.image_size, as '
                     'those of ermongroup/ddim do') from None


def rename(tensors: Mapping[str, LazyTensor], unused_config: UNetConfig
           ) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
  return naming.rename(tensors, lambda module: module)
