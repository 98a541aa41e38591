"""Feature networks for distances between sets of images, each under a name.

A distance on one network's features says nothing about a distance on
another's, so the network's name is part of the metric's (see `naming`). A new
network is a function and its entry in `NETWORKS`; it declares which statistics
of a set its outputs give, and metrics ask for statistics, never for a network.
"""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.base import devices
from msfp_jax.metrics import cifar_resnet
from msfp_jax.metrics import classifier_files
from msfp_jax.metrics import digits_classifier
from msfp_jax.metrics import inception
from msfp_jax.metrics import inception_weights
from msfp_jax.metrics import naming
from msfp_jax.metrics import preprocess
from msfp_jax.metrics import squeezenet

_RANDOM_WIDTHS = (8, 16, 16, 24)
# What a network's logits may be used for; the network says which.
LOGIT_STATISTICS = ('class_score', 'probabilities')


class Outputs(NamedTuple):
  """The outputs of a network for N images, float32.

  Attributes:
    features: `[N, D]`.
    logits: `[N, K]` of a classifier (Inception's: without their bias), or
      None.
    spatial: `[N, E]`, features that know places, as sFID's, or None.
  """
  features: jax.Array
  logits: jax.Array | None = None
  spatial: jax.Array | None = None


class FeatureNetwork:
  """Maps images to feature vectors, in batches of one compiled size.

  Attributes:
    name: the network's; distances are comparable under one name only.
    image_shape: (H, W, C) of the images it takes.
    dim: length of a feature vector.
    brings: the statistics of a set that its outputs give, fields of
      `collect.Seen`: 'pool' always, 'spatial' with spatial features, and
      what it declares of LOGIT_STATISTICS.
    numbers_per_image: length of all outputs together.
    provenance: JSON-like, what statistics of these features hold for.
  """

  def __init__(
      self,
      name: str,
      image_shape: tuple[int, int, int],
      apply: Callable[[dict, jax.Array], Outputs],
      params: dict,
      batch_size: int = 256,
      uses_of_logits: Collection[str] = (),
      provenance: Mapping[str, str] | None = None,
  ):
    """Compiles a function for batches of one size.

    Args:
      name: see above.
      image_shape: (H, W, C).
      apply: (params, uint8 images `[N, H, W, C]`) -> outputs; images must
        not influence each other.
      params: a pytree of arrays.
      batch_size: images at a time.
      uses_of_logits: 'probabilities' if its classes are what the images are
        to show, so that it can judge them one by one; 'class_score' if its
        logits are to enter an inception score.
      provenance: what stands there beside the name.

    Raises:
      ValueError: a use of logits that there is not, or none to use.
    """
    self.name = name
    self.image_shape = image_shape
    self._layout = devices.layout()
    self._params = self._layout.put(
        jax.device_put(params), self._layout.whole)
    # A whole number of images on every device.
    count = self._layout.num_parts
    self._batch_size = batch_size = -(-batch_size // count) * count
    self.provenance = {'features': name, 'image_shape': list(image_shape),
                       **(provenance or {})}
    images = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.uint8)
    # What the network brings is read off its outputs, without running it.
    shapes = jax.eval_shape(apply, params, images)
    self.dim = shapes.features.shape[1]
    self.brings = _brings(name, shapes, uses_of_logits)
    self.numbers_per_image = sum(
        x.shape[1] for x in jax.tree.leaves(shapes))
    self._shapes = shapes
    self._apply = jax.jit(apply)

  @property
  def metric(self) -> str:
    """The name of a Frechet distance on these features."""
    return naming.named('fd', self.provenance)

  def outputs(self, images: np.ndarray) -> Outputs:
    """Runs the network on uint8 images `[N, H, W, C]`; outputs on the host.

    Raises:
      ValueError: images of another type or shape.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
      wanted = ', '.join(map(str, self.image_shape))
      raise ValueError(
          f'feature network {self.name!r} takes uint8 images [N, {wanted}], '
          f'got {images.dtype} {list(images.shape)}')
    # Arrays for all images are made first, as joining parts would need both.
    found = jax.tree.map(
        lambda x: np.empty((len(images), *x.shape[1:]), x.dtype), self._shapes)
    for start in range(0, len(images), self._batch_size):
      batch = images[start:start + self._batch_size]
      count = len(batch)
      missing = self._batch_size - count
      # Filled up with black images: one shape, one compilation.
      batch = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
      out = devices.fetch(self._apply(
          self._params, self._layout.put(batch, self._layout.batch)))
      for whole, part in zip(
          jax.tree.leaves(found), jax.tree.leaves(out), strict=True):
        whole[start:start + count] = part[:count]
    return found


def _brings(name: str, shapes: Outputs, uses_of_logits: Collection[str]
            ) -> frozenset[str]:
  if unknown := set(uses_of_logits) - set(LOGIT_STATISTICS):
    raise ValueError(f'feature network {name!r}: logits are used for '
                     f'{", ".join(LOGIT_STATISTICS)}, not {sorted(unknown)}')
  if uses_of_logits and shapes.logits is None:
    raise ValueError(f'feature network {name!r} gives no logits, which '
                     f'{", ".join(sorted(uses_of_logits))} would need')
  spatial = () if shapes.spatial is None else ('spatial',)
  return frozenset(('pool', *spatial, *uses_of_logits))


def check(name: str) -> str:
  """The file that a network's name has, or ''; ValueError for no such name."""
  key, _, path = name.partition(':')
  if key not in NETWORKS or bool(path) != NETWORKS[key].from_file:
    known = ', '.join(repr(f'{key}:PATH' if network.from_file else key)
                      for key, network in NETWORKS.items())
    raise ValueError(f'feature network {name!r}: must be one of {known}')
  return path


def get(name: str, image_shape: tuple[int, int, int], *, weights: str = '',
        preprocessing: str = 'tf') -> FeatureNetwork:
  """The feature network `name` for images of `image_shape` = (H, W, C).

  Args:
    name: a key of NETWORKS, or 'key:PATH' of one that is read from a file.
    image_shape: (H, W, C).
    weights: file of Inception's weights, see `inception_weights.find`.
    preprocessing: of Inception's input, see `preprocess.to_inception`.

  Raises:
    ValueError: unknown name, a shape that the network cannot take, or other
      weights than expected.
    OSError: Inception's weights are not there and cannot be downloaded.
  """
  path, key = os.path.expanduser(check(name)), name.partition(':')[0]
  shape = tuple(image_shape)
  if len(shape) != 3 or min(shape) < 1:
    raise ValueError(f'feature network {name!r}: image_shape must be '
                     f'(H, W, C), got {shape}')
  return NETWORKS[key].make(shape, path or weights, preprocessing)


def _digits(image_shape: tuple[int, int, int], *unused: str) -> FeatureNetwork:
  if image_shape != digits_classifier.IMAGE_SHAPE:
    raise ValueError(
        f"feature network 'digits' takes {digits_classifier.IMAGE_SHAPE} "
        f"images, got {image_shape}; for these use 'random'")
  params, _ = digits_classifier.load()
  model = digits_classifier.DigitsClassifier()
  return FeatureNetwork(
      'digits', image_shape, lambda params, images: Outputs(
          *model.apply({'params': params}, images)), params,
      uses_of_logits=['probabilities'])


def _cifar_resnet(image_shape: tuple[int, int, int], path: str,
                  *unused: str) -> FeatureNetwork:
  if image_shape != cifar_resnet.IMAGE_SHAPE:
    raise ValueError(
        f"feature network 'cifar_resnet' takes {cifar_resnet.IMAGE_SHAPE} "
        f"images, got {image_shape}; for these use 'inception' or 'random'")
  depth, params = cifar_resnet.load(path)
  return FeatureNetwork(
      f'resnet{depth}', image_shape,
      lambda params, images: Outputs(*cifar_resnet.apply(params, images)),
      params, uses_of_logits=['class_score', 'probabilities'],
      provenance={'weights_sha256': classifier_files.digest(path)})


def _resnet56(image_shape: tuple[int, int, int], *unused: str
              ) -> FeatureNetwork:
  return _cifar_resnet(image_shape, str(cifar_resnet.WEIGHTS))


def _squeezenet(image_shape: tuple[int, int, int], path: str,
                *unused: str) -> FeatureNetwork:
  if image_shape[-1] not in (1, 3):
    raise ValueError("feature network 'squeezenet' takes images with 1 or 3 "
                     f'channels, got {image_shape}')
  name, params = squeezenet.load(path)
  return FeatureNetwork(
      name, image_shape, lambda params, images: Outputs(
          squeezenet.apply(name, params, images)), params, batch_size=64,
      # Of the weights: there is no one file of Caffe's.
      provenance={'weights_sha256': squeezenet.digest(params)})


def _inception(image_shape: tuple[int, int, int], weights: str,
               preprocessing: str) -> FeatureNetwork:
  if image_shape[-1] not in (1, 3):
    raise ValueError("feature network 'inception' takes images with 1 or 3 "
                     f'channels, got {image_shape}')
  preprocess.check(preprocessing)

  def apply(params, images):
    found = inception.apply(
        params, preprocess.to_inception(images, preprocessing))
    return Outputs(found.pool, found.logits_unbiased, found.spatial)

  path = inception_weights.find(weights)
  return FeatureNetwork(
      'inception', image_shape, apply, inception_weights.load(path),
      # 299 x 299 pixels each, whatever the images were.
      batch_size=16 if jax.default_backend() == 'cpu' else 256,
      uses_of_logits=['class_score'],
      provenance={'preprocessing': preprocessing,
                  'weights_sha256': classifier_files.digest(path)})


def _random(image_shape: tuple[int, int, int], *unused: str) -> FeatureNetwork:
  rng = np.random.RandomState(0)  # its stream is frozen, default_rng's is not
  kernels = []
  channels = image_shape[-1]
  for width in _RANDOM_WIDTHS:
    scale = np.sqrt(2 / (9 * channels))
    kernels.append(np.float32(
        scale * rng.standard_normal((3, 3, channels, width))))
    channels = width
  # About 4 million pixels at once: large images come in smaller batches.
  batch_size = max(1, min(256, 2**22 // int(np.prod(image_shape[:2]))))
  return FeatureNetwork('random', image_shape, _apply_random,
                        {'kernels': kernels}, batch_size)


def _apply_random(params: dict, images: jax.Array) -> Outputs:
  """Means and deviations of each layer's channels over the image."""
  x = images.astype(jnp.float32) / 127.5 - 1.0
  pooled = []
  for kernel in params['kernels']:
    # Halved while there is something to halve, so that any size will do.
    stride = 2 if min(x.shape[1:3]) >= 4 else 1
    x = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), 'SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=jax.lax.Precision.HIGHEST)
    x = jax.nn.leaky_relu(x, 0.2)
    # Deviations as well: a mean does not tell stripes from grey.
    pooled += [x.mean(axis=(1, 2)), x.std(axis=(1, 2))]
  return Outputs(jnp.concatenate(pooled, axis=-1))


@dataclasses.dataclass(frozen=True)
class Network:
  """An entry of NETWORKS.

  Attributes:
    make: (image shape, path of weights, preprocessing) -> the network.
    meaning: what its features are, for people who choose one.
    from_file: whether the path of its weights stands in its name.
  """

  make: Callable[[tuple[int, int, int], str, str], FeatureNetwork]
  meaning: str
  from_file: bool = False


# Makers, not networks: an entry costs nothing until it is asked for.
NETWORKS = {
    'cifar_resnet': Network(
        _cifar_resnet, 'the 64 pooled features of a ResNet for CIFAR-10 in '
        'that file; its depth stands in the names, as in `fd_resnet20`',
        from_file=True),
    'resnet56': Network(
        _resnet56, 'the same of the ResNet-56 that ships with the package'),
    'digits': Network(
        _digits, '64 features of a small classifier of 16 x 16 digits that '
        'ships with the package'),
    'inception': Network(
        _inception, "FID's own network, for images of any size, grey or in "
        'colours; the metrics then have the names that everyone uses'),
    'random': Network(
        _random, '128 pooled responses of convolutions with fixed random '
        'weights, for images of any size and number of channels: they see '
        'colour, contrast and texture, know nothing of objects, and rank '
        'models roughly'),
    'squeezenet': Network(
        _squeezenet, 'the 512 pooled features of SqueezeNet 1.1 for ImageNet '
        "in that file, torchvision's or (then `squeezenet_caffe`) an .npz of "
        "its authors' weights, for images of any size", from_file=True),
}
