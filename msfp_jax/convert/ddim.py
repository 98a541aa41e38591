"""ermongroup/ddim: ema_cifar10, CelebA's ckpt.pth and the like.

The names are ours already (docs of `models.unet`). A file is either a state
dict or the list [model, optimizer, epoch, step, EMA of the model].
"""

from collections.abc import Mapping
from typing import Any

from absl import logging

from msfp_jax.convert import naming
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.models.unet import UNetConfig

_LANDMARK = 'temb.dense.0.weight'
# The configurations of ermongroup/ddim all have attention at this side.
_ATTENTION_SIDE = 16


def detect(tensors: Mapping[str, LazyTensor]) -> bool:
  return any(name.endswith(_LANDMARK) for name in tensors)


def select(tensors: Mapping[str, LazyTensor], ema: bool
           ) -> dict[str, LazyTensor]:
  """The state dict that is wanted, of those in the file."""
  roots = sorted(name.removesuffix(_LANDMARK) for name in tensors
                 if name.endswith(_LANDMARK))
  # '0.module.' is the trained model, '4.' its moving average.
  root = roots[-1] if ema else roots[0]
  if ema and root.startswith('0.'):
    logging.info('the checkpoint has no moving average; took the weights')
  found = naming.below(tensors, root)
  if found.pop('logvar', None):
    logging.info('left out logvar, which sampling does not use')
  return found


def config(tensors: Mapping[str, LazyTensor],
           given: Mapping[str, Any] | None) -> UNetConfig:
  """From shapes, or from the `model` part of the original yaml."""
  ch = tensors['conv_in.weight'].shape[0]
  levels = naming.indices(tensors, r'down\.(\d+)\.block')
  found = {
      'in_channels': tensors['conv_in.weight'].shape[1],
      'out_channels': tensors['conv_out.weight'].shape[0],
      'ch': ch,
      'ch_mult': tuple(tensors[f'down.{i}.block.0.conv1.weight'].shape[0] // ch
                       for i in levels),
      'num_res_blocks': len(naming.indices(
          tensors, r'down\.0\.block\.(\d+)\.conv1')),
  }
  attended = naming.indices(tensors, r'down\.(\d+)\.attn')
  side = _ATTENTION_SIDE << min(attended, default=1)
  if given and 'model' in given:
    side = given.get('data', {}).get('image_size', side)
  else:
    logging.info('image side %d, as attention at %d pixels suggests; 32 groups',
                 side, _ATTENTION_SIDE)
  return UNetConfig(image_size=side, dropout=0.1, attn_resolutions=tuple(
      side >> i for i in attended), **found)


def rename(tensors: Mapping[str, LazyTensor], unused_config: UNetConfig
           ) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
  return naming.rename(tensors, lambda module: module)
