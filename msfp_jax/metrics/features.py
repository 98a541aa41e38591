"""Feature networks for distances between sets of images, each under a name.

A distance on one network's features says nothing about a distance on
another's, so the network's name is part of the metric's: `fd_digits`,
`fd_random`; Inception's have the names that everyone uses, `fid` and `kid`. A
new network is a function and its line in `_NETWORKS`.
"""

from collections.abc import Callable, Mapping
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
from msfp_jax.metrics import preprocess

_RANDOM_WIDTHS = (8, 16, 16, 24)
# What Inception's metrics are called, by what others' names begin with.
_INCEPTION_METRICS = {
    'fd': 'fid', 'fd_spatial': 'sfid', 'kd': 'kid', 'is': 'is',
    'precision': 'precision', 'recall': 'recall'}


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
    num_classes: of `probabilities`; 0 for a network that does not classify.
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
      metrics: Mapping[str, str] | None = None,
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
      metrics: kind of metric -> its name, where that is not
        '<kind>_<name of the network>'.
      provenance: what stands there beside the name.
    """
    self.name = name
    self.image_shape = image_shape
    self._params = devices.on_all(jax.device_put(params))
    # A whole number of images on every device.
    count = jax.device_count()
    self._batch_size = batch_size = -(-batch_size // count) * count
    self._metrics = metrics or {}
    self.provenance = {'features': name, 'image_shape': list(image_shape),
                       **(provenance or {})}
    images = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.uint8)
    shapes = jax.eval_shape(apply, params, images)
    self.dim = shapes.features.shape[1]
    self.num_classes = 0 if shapes.logits is None else shapes.logits.shape[1]
    self.numbers_per_image = sum(
        x.shape[1] for x in jax.tree.leaves(shapes))
    self._shapes = shapes
    self._apply = jax.jit(apply)

  @property
  def metric(self) -> str:
    """The name of a Frechet distance on these features."""
    return self.named('fd')

  def named(self, kind: str) -> str:
    """The name of a metric on these features.

    Args:
      kind: 'fd' for the Frechet distance, 'fd_spatial' for that of the spatial
        features, 'kd' for the kernel distance, 'is' for the inception score,
        'precision' or 'recall'.
    """
    return self._metrics.get(kind, f'{kind}_{self.name}')

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
      # Filled up with black images: one shape, one compilation.
      missing = self._batch_size - count
      batch = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
      out = jax.device_get(self._apply(
          self._params, jax.device_put(batch, devices.batch_sharding())))
      for whole, part in zip(
          jax.tree.leaves(found), jax.tree.leaves(out), strict=True):
        whole[start:start + count] = part[:count]
    return found

  def features(self, images: np.ndarray) -> np.ndarray:
    """The features of uint8 images `[N, H, W, C]`, float32 `[N, dim]`.

    Raises:
      ValueError: images of another type or shape.
    """
    return self.outputs(images).features

  def probabilities(self, images: np.ndarray) -> np.ndarray:
    """The class probabilities of uint8 images, float32 `[N, num_classes]`.

    Raises:
      ValueError: images of another type or shape, or no classifier.
    """
    if not self.num_classes:
      raise ValueError(f'feature network {self.name!r} does not classify; '
                       "'digits' does")
    return np.asarray(jax.nn.softmax(self.outputs(images).logits))


def get(name: str, image_shape: tuple[int, int, int], *, weights: str = '',
        preprocessing: str = 'tf') -> FeatureNetwork:
  """The feature network `name` for images of `image_shape` = (H, W, C).

  'digits': the penultimate layer (64) of `digits_classifier`, for 16 x 16 x 1
  digits; also gives class probabilities.

  'random': 128 pooled responses of convolutions with fixed random weights, for
  images of any size and number of channels. It sees colour, contrast and
  texture and has learned nothing about objects: a distance on it ranks models
  roughly, and compares only with itself at the same image shape.

  'inception': FID's network, for images of any size, grey or in colours. It
  alone takes the other arguments.

  'cifar_resnet:PATH': the 64 pooled features of a ResNet for CIFAR-10 in that
  file, see `cifar_resnet.load`; metrics are named after its depth.

  Args:
    name: one of these.
    image_shape: (H, W, C).
    weights: file of Inception's weights, see `inception_weights.find`.
    preprocessing: of Inception's input, see `preprocess.to_inception`.

  Raises:
    ValueError: unknown name, a shape that the network cannot take, or other
      weights than expected.
    OSError: Inception's weights are not there and cannot be downloaded.
  """
  kind, _, path = name.partition(':')
  if kind not in _NETWORKS or bool(path) != (kind == 'cifar_resnet'):
    raise ValueError(
        f"feature network {name!r}: must be one of 'cifar_resnet:PATH', "
        "'digits', 'inception', 'random'")
  shape = tuple(image_shape)
  if len(shape) != 3 or min(shape) < 1:
    raise ValueError(f'feature network {name!r}: image_shape must be '
                     f'(H, W, C), got {shape}')
  return _NETWORKS[kind](shape, path or weights, preprocessing)


def _digits(image_shape: tuple[int, int, int], *unused: str) -> FeatureNetwork:
  if image_shape != digits_classifier.IMAGE_SHAPE:
    raise ValueError(
        f"feature network 'digits' takes {digits_classifier.IMAGE_SHAPE} "
        f"images, got {image_shape}; for these use 'random'")
  params, _ = digits_classifier.load()
  model = digits_classifier.DigitsClassifier()
  return FeatureNetwork(
      'digits', image_shape, lambda params, images: Outputs(
          *model.apply({'params': params}, images)), params)


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
      params, provenance={'weights_sha256': classifier_files.digest(path)})


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
  suffix = '' if preprocessing == 'tf' else f'_{preprocessing}'
  return FeatureNetwork(
      'inception', image_shape, apply, inception_weights.load(path),
      batch_size=16 if jax.default_backend() == 'cpu' else 256,
      metrics={kind: name + suffix
               for kind, name in _INCEPTION_METRICS.items()},
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
    pooled += [x.mean(axis=(1, 2)), x.std(axis=(1, 2))]
  return Outputs(jnp.concatenate(pooled, axis=-1))


_NETWORKS = {'cifar_resnet': _cifar_resnet, 'digits': _digits,
             'inception': _inception, 'random': _random}
