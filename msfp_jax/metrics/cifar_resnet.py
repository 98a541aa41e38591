"""The ResNets of CIFAR-10, as an example of a feature network of one's own.

Depth 6 n + 2: a convolution, three times n blocks with 16, 32 and 64 channels,
and shortcuts without parameters. Source: He et al., CVPR 2016, section 4.2. The
weights are those of akamaster/pytorch_resnet_cifar10 and of what follows its
names; its ResNet-56 ships with the package (cifar_resnet56_LICENSE.txt).
"""

from collections.abc import Mapping
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.base import seal
from msfp_jax.metrics import classifier_files
from msfp_jax.metrics.convolution import convolve

# ResNet-56, which has 93.39 % of CIFAR-10's test images right.
WEIGHTS = pathlib.Path(__file__).with_name('cifar_resnet56.safetensors')
# Of that file; to be changed with it.
_SHA256 = '7a95a3b57a32b2fc18469ba552bd0db6382d53905544e932cadb5693f71ab153'
IMAGE_SHAPE = (32, 32, 3)
NUM_CLASSES = 10
_WIDTHS = (16, 32, 64)
_EPSILON = 1e-5  # of the batch normalisation
# Of ImageNet's colours, in 0..1; it was trained so.
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)

Params = Mapping[str, Any]


def load(path: str | os.PathLike) -> tuple[int, Params]:
  """Loads (depth, parameters) of a state dict, alone or in a checkpoint.

  Raises:
    FileNotFoundError: nothing at `path`.
    ValueError: a damaged file, or other tensors; all are listed.
  """
  if os.fspath(path) == os.fspath(WEIGHTS):
    seal.check_file(path, _SHA256, seal.INSTALL_AGAIN)
  tensors = {name.removeprefix('module.'): tensor for name, tensor in
             classifier_files.open_tensors(path).items()}
  # The depth is not stored: 'layer1.0.', 'layer1.1.', ... tell it.
  blocks = len({name.split('.')[1] for name in tensors
                if name.startswith('layer1.')}) or 1
  depth = 6 * blocks + 2
  state = classifier_files.read_state(
      path, tensors, state_shapes(blocks), f"CIFAR-10's ResNet-{depth}")
  fold = lambda conv, norm: classifier_files.fold(state, conv, norm, _EPSILON)
  params = {'stem': fold('conv1', 'bn1'), 'blocks': [
      [fold(f'{name}.conv{i}', f'{name}.bn{i}') for i in (1, 2)]
      for name in _block_names(blocks)]}
  return depth, params | {'linear': classifier_files.dense(state, 'linear')}


def _block_names(blocks: int) -> list[str]:
  return [f'layer{level + 1}.{i}' for level in range(len(_WIDTHS))
          for i in range(blocks)]


def state_shapes(blocks: int) -> dict[str, tuple[int, ...]]:
  """The tensors of a network of `blocks` blocks a level, {name: shape}."""
  shapes = {'conv1.weight': (_WIDTHS[0], 3, 3, 3),
            **classifier_files.norm_shapes('bn1', _WIDTHS[0])}
  channels = _WIDTHS[0]
  for index, name in enumerate(_block_names(blocks)):
    width = _WIDTHS[index // blocks]
    for i in (1, 2):
      shapes[f'{name}.conv{i}.weight'] = (width, channels, 3, 3)
      shapes |= classifier_files.norm_shapes(f'{name}.bn{i}', width)
      channels = width
  return shapes | {'linear.weight': (NUM_CLASSES, channels),
                   'linear.bias': (NUM_CLASSES,)}


def apply(params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Runs the network on uint8 `[N, 32, 32, 3]`; features and logits."""
  x = (images.astype(jnp.float32) / 255 - _MEAN) / _STD
  x = jax.nn.relu(convolve(params['stem'], x, padding=1))
  for first, second in params['blocks']:
    # Option A of the paper: where channels double, the shortcut takes every
    # other pixel and is padded with channels of zeros.
    added = first['kernel'].shape[-1] - x.shape[-1]
    stride = 2 if added else 1
    y = jax.nn.relu(convolve(first, x, stride, padding=1))
    y = convolve(second, y, padding=1)
    sides = (added // 2, added - added // 2)
    shortcut = jnp.pad(
        x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), sides))
    x = jax.nn.relu(y + shortcut)
  features = x.mean(axis=(1, 2))
  logits = jnp.matmul(
      features, params['linear']['kernel'], precision='highest')
  return features, logits + params['linear']['bias']
