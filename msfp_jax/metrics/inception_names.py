"""The names of Inception's tensors, as published and as in NVIDIA's script.

NVIDIA's inception-2015-12-05.pt, which clean-fid and EDM load, is TorchScript
with the names of TensorFlow's graph and a batch normalisation without scale.
"""

from collections.abc import Mapping

import numpy as np

from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.metrics import classifier_files
from msfp_jax.metrics import inception

_LEAVES = {'weight': 'conv.weight', 'beta': 'bn.bias',
           'mean': 'bn.running_mean', 'var': 'bn.running_var'}
_SECOND_TOWER = ('branch3x3dbl', 'branch7x7dbl', 'branch7x7x3')
# Blocks that split their towers' ends in two; there a tower is no module.
_FORKED = ('Mixed_7b', 'Mixed_7c')


def state_shapes() -> dict[str, tuple[int, ...]]:
  """The published tensors, {name: shape}, without num_batches_tracked."""
  shapes = {}
  for name, (height, width, fan, out) in inception.CONVOLUTIONS.items():
    shapes[f'{name}.conv.weight'] = (out, fan, height, width)
    shapes |= classifier_files.norm_shapes(f'{name}.bn', out)
  return shapes | {
      'fc.weight': (inception.NUM_CLASSES, inception.NUM_FEATURES),
      'fc.bias': (inception.NUM_CLASSES,)}


def published(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
  """Gives a script's tensors the published names; others stay as they are."""
  if 'layers.conv.weight' not in tensors:
    return dict(tensors)
  # The script's batch normalisation has no scale: here a scale of ones.
  names = {f'output.{leaf}': f'fc.{leaf}' for leaf in ('weight', 'bias')}
  found = {}
  for name, (*_, out) in inception.CONVOLUTIONS.items():
    names |= {f'layers.{scripted(name)}.{leaf}': f'{name}.{ours}'
              for leaf, ours in _LEAVES.items()}
    found[f'{name}.bn.weight'] = LazyTensor.of(np.ones(out, np.float32))
  return found | {names.get(name, name): tensor
                  for name, tensor in tensors.items()}


def scripted(name: str) -> str:
  """A convolution's name in the script, e.g. mixed_6.tower_1.conv_3.

  Args:
    name: in `inception.CONVOLUTIONS`.
  """
  block, _, branch = name.partition('.')
  blocks = list(dict.fromkeys(
      other.partition('.')[0] for other in inception.CONVOLUTIONS))
  stem = [other for other in blocks if other in inception.CONVOLUTIONS]
  if not branch:
    return _numbered('conv', stem.index(block))
  mixed = _numbered('mixed', blocks.index(block) - len(stem))
  between = '_' if block in _FORKED else '.'
  if branch in ('branch1x1', 'branch3x3'):
    return f'{mixed}.conv'
  if branch == 'branch_pool':
    return f'{mixed}.tower_2{between}conv'
  group, _, number = branch.rpartition('_')
  second = group in _SECOND_TOWER and block != 'Mixed_6a'  # it has one tower
  if number.isdigit():
    layer = _numbered('conv', int(number) - 1)
  else:
    layer = _numbered('mixed_conv', 'ab'.index(number[-1]))
  return f'{mixed}.{_numbered("tower", int(second))}{between}{layer}'


def _numbered(name: str, index: int) -> str:
  return f'{name}_{index}' if index else name
