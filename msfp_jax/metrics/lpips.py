"""LPIPS: how unlike two images look, by a network that people's eyes weighted.

A classifier's features after five of its layers, of unit length at every pixel;
their squared differences, weighted by channel as in version 0.1 of LPIPS, then
the mean over the pixels and the sum over the layers: 0 for equal images.
Source: Zhang et al., CVPR 2018, equation 1. Papers take AlexNet (`alex`) or
VGG-16 (`vgg`), whose distances do not compare with each other.
"""

from collections.abc import Mapping
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from msfp_jax import data
from msfp_jax.base import seal
from msfp_jax.metrics import classifier_files
from msfp_jax.metrics import similarity
from msfp_jax.metrics.convolution import convolve

# Of the channels of every layer, both trunks': published with LPIPS 0.1 (see
# lpips_LICENSE.txt); {trunk}.{layer}, float32 `[C]`.
LINEAR = pathlib.Path(__file__).with_name('lpips_linear.safetensors')
_LINEAR_SHA256 = (
    'fd30720767e733e5a02b8d885ea8d12c3654c01207826373289bc74698c5a33a')
# Of images in [-1, 1]: ImageNet's colours, as LPIPS has them.
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)
_EPSILON = 1e-10  # added to lengths of feature vectors
_PIXELS = 2**18  # of images of a set that are compared at once

Params = Mapping[str, Any]


class Conv(NamedTuple):
  """A convolution and its ReLU.

  Attributes:
    index: in torchvision's `features`, by which its tensors are named.
    shape: (height, width, channels in, channels out).
    stride: in pixels.
    padding: pixels on each side.
    pools: whether a maximum pool comes before it.
    taken: whether its output is compared.
  """

  index: int
  shape: tuple[int, int, int, int]
  stride: int = 1
  padding: int = 1
  pools: bool = False
  taken: bool = False


@dataclasses.dataclass(frozen=True)
class Trunk:
  """A classifier without its dense layers.

  Attributes:
    title: for people.
    file: torchvision's name of its weights; the digits are the first of its
      SHA-256.
    pool: pixels that a maximum pool sees each way, without padding; its stride
      is 2.
    least: pixels an image must have each way.
    layers: in order.
  """

  title: str
  file: str
  pool: int
  least: int
  layers: tuple[Conv, ...]

  @property
  def state_shapes(self) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of its convolutions, as PyTorch stores them."""
    shapes = {}
    for layer in self.layers:
      height, width, channels, out = layer.shape
      shapes |= {f'features.{layer.index}.weight': (
          out, channels, height, width), f'features.{layer.index}.bias': (out,)}
    return shapes


def _vgg() -> tuple[Conv, ...]:
  """Blocks of 3x3 convolutions; the last of each is taken, then pooled."""
  layers, index, channels = [], 0, 3
  for block, (count, width) in enumerate(
      ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))):
    for i in range(count):
      layers.append(Conv(index, (3, 3, channels, width),
                         pools=bool(block) and i == 0, taken=i == count - 1))
      channels = width
      index += 2  # its ReLU has an index too,
    index += 1  # and so has the pool
  return tuple(layers)


TRUNKS = {
    # Krizhevsky 2014, as torchvision has it.
    'alex': Trunk('AlexNet', 'alexnet-owt-7be5be79.pth', pool=3, least=31,
                  layers=(
                      Conv(0, (11, 11, 3, 64), 4, 2, taken=True),
                      Conv(3, (5, 5, 64, 192), 1, 2, pools=True, taken=True),
                      Conv(6, (3, 3, 192, 384), pools=True, taken=True),
                      Conv(8, (3, 3, 384, 256), taken=True),
                      Conv(10, (3, 3, 256, 256), taken=True))),
    # Simonyan and Zisserman 2015, configuration D.
    'vgg': Trunk('VGG-16', 'vgg16-397923af.pth', pool=2, least=16,
                 layers=_vgg()),
}


@dataclasses.dataclass(frozen=True)
class Lpips:
  """A trunk with its weights.

  Attributes:
    name: of TRUNKS.
    params: see `params_of`.
    provenance: JSON-like, what distances hold for.
  """

  name: str
  params: Params
  provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def check(self, image_shape: tuple[int, int, int]) -> None:
    """Raises ValueError for images (H, W, C) that it cannot compare."""
    least = TRUNKS[self.name].least
    if min(image_shape[:2]) < least or image_shape[2] not in (1, 3):
      raise ValueError(
          f'LPIPS with {self.name!r} compares images of at least {least} x '
          f'{least} pixels, grey or in colours, got {tuple(image_shape)}')

  def distance(self, a: data.Images, b: data.Images) -> float:
    """The mean over the images: 0 for equal ones.

    Args:
      a, b: uint8 `[N, H, W, C]` of one shape; image i of `a` is compared with
        image i of `b`, so make both from the same noise. Grey ones count as
        coloured ones of equal channels.

    Raises:
      ValueError: other shapes or types, or images that are too small.
    """
    found = []
    # What is read at once may be more than a network has room for.
    for x, y in similarity.pairs('lpips', a, b):
      self.check(x.shape[1:])
      size = max(1, _PIXELS // (x.shape[1] * x.shape[2]))
      found += [np.asarray(distances(self.name, self.params, x[i:i + size],
                                     y[i:i + size]), np.float64)
                for i in range(0, len(x), size)]
    return float(np.mean(np.concatenate(found)))


def check(text: str) -> str:
  """The path in 'TRUNK:PATH', '' for ''; ValueError for another text."""
  name, _, path = text.partition(':')
  if text and (name not in TRUNKS or not path):
    raise ValueError(
        f'LPIPS {text!r}: must be ' + ' or '.join(
            f"'{known}:PATH', PATH being torchvision's {trunk.file}"
            for known, trunk in TRUNKS.items()))
  return path


def load(text: str) -> Lpips:
  """Reads the weights that 'TRUNK:PATH' names; nothing in the file is run.

  Args:
    text: a key of TRUNKS, and torchvision's file of that classifier's weights
      or a .safetensors of its tensors.

  Raises:
    FileNotFoundError: nothing at the path.
    ValueError: no such trunk, a damaged file, or other tensors; all are listed.
  """
  path, name = pathlib.Path(check(text)).expanduser(), text.partition(':')[0]
  trunk = TRUNKS[name]
  tensors = {tensor: value for tensor, value
             in classifier_files.open_tensors(path).items()
             if not tensor.startswith('classifier.')}
  digest = classifier_files.digest(path)
  begins = pathlib.Path(trunk.file).stem.rpartition('-')[2]
  if path.name == trunk.file and not digest.startswith(begins):
    raise ValueError(f'{path} is damaged: its SHA-256 is {digest}, which does '
                     'not begin as its name says')
  state = classifier_files.read_state(
      path, tensors, trunk.state_shapes, f'{name}, as in {trunk.file}')
  # On the device once, and not with every batch.
  return Lpips(name, jax.device_put(params_of(name, state)),
               {'lpips': name, 'lpips_sha256': digest})


def params_of(name: str, state: Mapping[str, np.ndarray]) -> Params:
  """What `distances` takes, float32.

  Args:
    name: of TRUNKS.
    state: as its `state_shapes` says.

  Returns:
    {'layers': [{'kernel': HWIO, 'bias': `[C]`}], 'linear': [`[C]`]}.
  """
  seal.check_file(LINEAR, _LINEAR_SHA256, seal.INSTALL_AGAIN)
  linear = load_file(LINEAR)
  layers = TRUNKS[name].layers
  return {
      'layers': [{
          'kernel': state[f'features.{layer.index}.weight'].transpose(
              2, 3, 1, 0),
          'bias': state[f'features.{layer.index}.bias']} for layer in layers],
      'linear': [linear[f'{name}.{i}']
                 for i in range(sum(layer.taken for layer in layers))]}


@functools.partial(jax.jit, static_argnums=0)
def distances(name: str, params: Params, a: jax.Array, b: jax.Array
              ) -> jax.Array:
  """LPIPS of every pair of uint8 images `[N, H, W, C]`, float32 `[N]`."""
  pairs = zip(_features(name, params, a), _features(name, params, b),
              params['linear'], strict=True)
  return sum(
      jnp.matmul(jnp.square(x - y), weight, precision='highest').mean((1, 2))
      for x, y, weight in pairs)


def _features(name, params, images):
  """The layers that are taken, every pixel's channels of unit length."""
  trunk = TRUNKS[name]
  x = data.to_float(images)
  x = (jnp.broadcast_to(x, (*x.shape[:3], 3)) - _SHIFT) / _SCALE
  found = []
  for layer, leaves in zip(trunk.layers, params['layers'], strict=True):
    if layer.pools:
      x = jax.lax.reduce_window(
          x, -jnp.inf, jax.lax.max, (1, trunk.pool, trunk.pool, 1),
          (1, 2, 2, 1), 'VALID')
    x = jax.nn.relu(convolve(leaves, x, layer.stride, layer.padding))
    if layer.taken:
      length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
      found.append(x / (length + _EPSILON))
  return found
