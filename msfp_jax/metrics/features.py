"""Feature networks for the Frechet distance, each under a name.

A distance on one network's features says nothing about a distance on
another's, so the network's name is part of the metric's: `fd_digits`,
`fd_random`. A new network is a function and its line in `_NETWORKS`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.metrics import digits_classifier

_RANDOM_WIDTHS = (8, 16, 16, 24)


class FeatureNetwork:
  """Maps images to feature vectors, in batches of one compiled size.

  Attributes:
    name: the network's; distances are comparable under one name only.
    image_shape: (H, W, C) of the images it takes.
    dim: length of a feature vector.
    num_classes: of `probabilities`; 0 for a network that does not classify.
  """

  def __init__(
      self,
      name: str,
      image_shape: tuple[int, int, int],
      apply: Callable[[dict, jax.Array], tuple[jax.Array, jax.Array | None]],
      params: dict,
      batch_size: int = 256,
  ):
    """Wraps a function.

    Args:
      name: see above.
      image_shape: (H, W, C).
      apply: (params, uint8 images `[N, H, W, C]`) -> float32 features
        `[N, D]` and logits `[N, K]` or None; images must not influence each
        other.
      params: a pytree of arrays.
      batch_size: images at a time.
    """
    self.name = name
    self.image_shape = image_shape
    self._params = jax.device_put(params)
    self._batch_size = batch_size
    images = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.uint8)
    features, logits = jax.eval_shape(apply, params, images)
    self.dim = features.shape[1]
    self.num_classes = 0 if logits is None else logits.shape[1]

    @jax.jit
    def outputs(params, images):
      features, logits = apply(params, images)
      return features, None if logits is None else jax.nn.softmax(logits)

    self._outputs = outputs

  @property
  def metric(self) -> str:
    """What a Frechet distance on these features is called."""
    return f'fd_{self.name}'

  def features(self, images: np.ndarray) -> np.ndarray:
    """uint8 images `[N, H, W, C]` -> float32 features `[N, dim]`.

    Raises:
      ValueError: images of another type or shape.
    """
    return self._run(images, 0, self.dim)

  def probabilities(self, images: np.ndarray) -> np.ndarray:
    """uint8 images `[N, H, W, C]` -> float32 `[N, num_classes]`, rows sum to 1.

    Raises:
      ValueError: images of another type or shape, or no classifier.
    """
    if not self.num_classes:
      raise ValueError(f'feature network {self.name!r} does not classify; '
                       "'digits' does")
    return self._run(images, 1, self.num_classes)

  def _run(self, images: np.ndarray, output: int, width: int) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
      wanted = ', '.join(map(str, self.image_shape))
      raise ValueError(
          f'feature network {self.name!r} takes uint8 images [N, {wanted}], '
          f'got {images.dtype} {list(images.shape)}')
    result = np.empty((len(images), width), np.float32)
    for start in range(0, len(images), self._batch_size):
      batch = images[start:start + self._batch_size]
      count = len(batch)
      missing = self._batch_size - count
      batch = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
      out = self._outputs(self._params, batch)[output]
      result[start:start + count] = jax.device_get(out)[:count]
    return result


def get(name: str, image_shape: tuple[int, int, int]) -> FeatureNetwork:
  """The feature network `name` for images of `image_shape` = (H, W, C).

  'digits': the penultimate layer (64) of `digits_classifier`, for 16 x 16 x 1
  digits; also gives class probabilities.

  'random': 128 pooled responses of convolutions with fixed random weights, for
  images of any size and number of channels. It sees colour, contrast and
  texture and has learned nothing about objects: a distance on it ranks models
  roughly, and compares only with itself at the same image shape.

  Raises:
    ValueError: unknown name, or a shape that the network cannot take.
  """
  if name not in _NETWORKS:
    raise ValueError(f'feature network {name!r}: must be one of '
                     f'{", ".join(map(repr, _NETWORKS))}')
  shape = tuple(image_shape)
  if len(shape) != 3 or min(shape) < 1:
    raise ValueError(f'feature network {name!r}: image_shape must be '
                     f'(H, W, C), got {shape}')
  return _NETWORKS[name](shape)


def _digits(image_shape: tuple[int, int, int]) -> FeatureNetwork:
  if image_shape != digits_classifier.IMAGE_SHAPE:
    raise ValueError(
        f"feature network 'digits' takes {digits_classifier.IMAGE_SHAPE} "
        f"images, got {image_shape}; for these use 'random'")
  params, _ = digits_classifier.load()
  model = digits_classifier.DigitsClassifier()
  return FeatureNetwork(
      'digits', image_shape,
      lambda params, images: model.apply({'params': params}, images), params)


def _random(image_shape: tuple[int, int, int]) -> FeatureNetwork:
  rng = np.random.RandomState(0)  # its stream is frozen, default_rng's is not
  kernels = []
  channels = image_shape[-1]
  for width in _RANDOM_WIDTHS:
    scale = np.sqrt(2 / (9 * channels))
    kernels.append(np.float32(
        scale * rng.standard_normal((3, 3, channels, width))))
    channels = width
  batch_size = max(1, min(256, 2**22 // int(np.prod(image_shape[:2]))))
  return FeatureNetwork('random', image_shape, _apply_random,
                        {'kernels': kernels}, batch_size)


def _apply_random(params: dict,
                  images: jax.Array) -> tuple[jax.Array, None]:
  """Means and deviations over the image of each layer's channels."""
  x = images.astype(jnp.float32) / 127.5 - 1.0
  pooled = []
  for kernel in params['kernels']:
    stride = 2 if min(x.shape[1:3]) >= 4 else 1
    x = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), 'SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=jax.lax.Precision.HIGHEST)
    x = jax.nn.leaky_relu(x, 0.2)
    pooled += [x.mean(axis=(1, 2)), x.std(axis=(1, 2))]
  return jnp.concatenate(pooled, axis=-1), None


_NETWORKS = {'digits': _digits, 'random': _random}
