"""SqueezeNet 1.1 for ImageNet: features of objects at a small cost.

A convolution and eight fires (a 1x1 convolution to few channels, then 1x1 and
3x3 ones side by side); what its last fire sees, averaged over the image, are
512 features. 0.7 million parameters. Source:
Iandola et al., arXiv 1602.07360, version 1.1 of its authors' repository.
"""

from collections.abc import Mapping
import hashlib
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.base import npz
from msfp_jax.metrics import classifier_files
from msfp_jax.metrics.convolution import convolve

# Images are resized to it. Every pool then ends with its last pixel: Caffe,
# PyTorch and Keras, which round sizes differently, agree.
SIDE = 128
# (channels of the 1x1 convolution, of each of those behind it) by fire; pools
# stand before those of POOLED.
_FIRES = {2: (16, 64), 3: (16, 64), 4: (32, 128), 5: (32, 128), 6: (48, 192),
          7: (48, 192), 8: (64, 256), 9: (64, 256)}
_POOLED = (2, 4, 6)
# torchvision counts pools and ReLUs too: fire i is features.INDEX[i].
_INDEX = {2: 3, 3: 4, 4: 6, 5: 7, 6: 9, 7: 10, 8: 11, 9: 12}

Params = Mapping[str, Any]

# How images are prepared, by who trained the weights: (factor, subtracted, and
# whether blue comes first), of values from 0 to 255.
TORCHVISION, CAFFE = 'squeezenet', 'squeezenet_caffe'
_PREPARED = {
    TORCHVISION: (1 / (255 * np.array([0.229, 0.224, 0.225])),
                  255 * np.array([0.485, 0.456, 0.406]), False),
    CAFFE: (np.ones(3), np.array([104.006, 116.669, 122.679]), True)}


def shapes() -> dict[str, tuple[int, int, int, int]]:
  """{layer: shape of its kernel, HWIO}, by Caffe's names."""
  found, channels = {'conv1': (3, 3, 3, 64)}, 64
  for i, (few, many) in _FIRES.items():
    found[f'fire{i}/squeeze1x1'] = (1, 1, channels, few)
    found[f'fire{i}/expand1x1'] = (1, 1, few, many)
    found[f'fire{i}/expand3x3'] = (3, 3, few, many)
    channels = 2 * many
  return found


def _torchvision_name(layer: str) -> str:
  if layer == 'conv1':
    return 'features.0'
  fire, part = layer.split('/')
  part = part.replace('squeeze1x1', 'squeeze')
  return f'features.{_INDEX[int(fire[4:])]}.{part}'


def load(path: str | os.PathLike) -> tuple[str, Params]:
  """Reads (TORCHVISION or CAFFE, parameters {layer: kernel and bias}).

  Args:
    path: torchvision's `squeezenet1_1-b8a52dc0.pth` (or a .safetensors of its
      tensors); or an .npz of the weights that its authors trained with Caffe,
      arrays `LAYER/w` HWIO and `LAYER/b` by Caffe's names, such as
      `fire2/squeeze1x1/w`. The classifier behind the features may be there.

  Raises:
    FileNotFoundError: nothing at `path`.
    ValueError: a damaged file, or other tensors; all are listed.
  """
  if pathlib.Path(path).suffix == '.npz':
    return CAFFE, _read_npz(path)
  names = {layer: _torchvision_name(layer) for layer in shapes()}
  tensors = {name: tensor for name, tensor
             in classifier_files.open_tensors(path).items()
             if not name.startswith('classifier.')}
  wanted = {}
  for layer, (height, width, inputs, outputs) in shapes().items():
    wanted[f'{names[layer]}.weight'] = (outputs, inputs, height, width)
    wanted[f'{names[layer]}.bias'] = (outputs,)
  state = classifier_files.read_state(
      path, tensors, wanted, "torchvision's SqueezeNet 1.1")
  return TORCHVISION, {layer: {
      'kernel': state[f'{name}.weight'].transpose(2, 3, 1, 0),
      'bias': state[f'{name}.bias']} for layer, name in names.items()}


def _read_npz(path):
  """The parameters in an .npz, likewise."""
  leaves = {'w': 'kernel', 'b': 'bias'}
  wanted = {}
  for layer, shape in shapes().items():
    wanted |= {f'{layer}/w': shape, f'{layer}/b': shape[-1:]}
  with npz.opened(path, "of Caffe's SqueezeNet 1.1") as held:
    if problems := [
        *(f'missing {name} {shape}' for name, shape in wanted.items()
          if name not in held),
        *(f'unexpected {name}' for name in held
          if name not in wanted and not name.startswith('conv10/'))]:
      raise ValueError('\n  '.join(['other arrays:', *sorted(problems)]))
    found = {name: np.asarray(held[name], np.float32) for name in wanted}
    for name, value in found.items():
      if value.shape != wanted[name] or not np.isfinite(value).all():
        raise ValueError(f'{name} is {value.shape}, not {wanted[name]}, or '
                         'not finite')
  params = {}
  for name, value in found.items():
    layer, leaf = name.rsplit('/', 1)
    params.setdefault(layer, {})[leaves[leaf]] = value
  return params


def digest(params: Params) -> str:
  """SHA-256 of the weights themselves, in whatever file they came.

  Of every layer's kernel and bias, in the order of `shapes`, as little-endian
  float32.
  """
  made = hashlib.sha256()
  for layer in shapes():
    for leaf in ('kernel', 'bias'):
      made.update(np.ascontiguousarray(params[layer][leaf], '<f4').data)
  return made.hexdigest()


def apply(name: str, params: Params, images: jax.Array) -> jax.Array:
  """Features `[N, 512]` of uint8 images `[N, H, W, C]`, grey or in colours.

  Args:
    name: TORCHVISION or CAFFE.
    params: of `load`.
    images: of any size.
  """
  factor, mean, blue_first = _PREPARED[name]
  x = jax.image.resize(
      images.astype(jnp.float32), (len(images), SIDE, SIDE, images.shape[3]),
      'bilinear')
  x = jnp.broadcast_to(x, (*x.shape[:3], 3))
  x = x[..., ::-1] if blue_first else x
  x = (x - np.float32(mean)) * np.float32(factor)
  x = jax.nn.relu(convolve(params['conv1'], x, stride=2))
  for i in _FIRES:
    if i in _POOLED:
      x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1),
                                (1, 2, 2, 1), 'VALID')
    few = jax.nn.relu(convolve(params[f'fire{i}/squeeze1x1'], x))
    x = jax.nn.relu(jnp.concatenate([
        convolve(params[f'fire{i}/expand1x1'], few),
        convolve(params[f'fire{i}/expand3x3'], few, padding=1)], axis=-1))
  return x.mean(axis=(1, 2))
