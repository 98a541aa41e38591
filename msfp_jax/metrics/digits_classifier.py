"""A small classifier of 16 x 16 digits, shipped with its weights.

It gives scikit-learn's digits, the data set that needs no download, features
to take a Frechet distance on and class probabilities to check samples by.
`python -m msfp_jax.metrics.train_digits_classifier` makes the weights.
"""

import os
import pathlib

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from msfp_jax.base import files
from msfp_jax.base import seal

IMAGE_SHAPE = (16, 16, 1)
NUM_CLASSES = 10
NUM_FEATURES = 64
FORMAT_VERSION = '1'
WEIGHTS = pathlib.Path(__file__).with_name('digits_classifier.safetensors')
# Of that file; to be changed with it.
_SHA256 = '7f48e04413b8d7301cb84ab968a654912407c44c001538c52064e0bd7bb25b53'


class DigitsClassifier(nn.Module):
  """Three convolutions and two dense layers, 47,000 parameters."""

  @nn.compact
  def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Classifies digits.

    Args:
      images: uint8 `[N, 16, 16, 1]`, white on black.

    Returns:
      float32 features `[N, 64]` (the penultimate layer) and logits `[N, 10]`.
    """
    # Full precision: a distance must not depend on the device that it is
    # measured on, and TPU and GPU round the inputs of a matmul by default.
    exact = {'precision': jax.lax.Precision.HIGHEST}
    x = images.astype(jnp.float32) / 127.5 - 1.0
    x = nn.relu(nn.Conv(16, (3, 3), name='conv1', **exact)(x))
    x = nn.relu(nn.Conv(32, (3, 3), (2, 2), name='conv2', **exact)(x))
    x = nn.relu(nn.Conv(32, (3, 3), (2, 2), name='conv3', **exact)(x))
    x = x.reshape(len(x), -1)
    features = nn.relu(nn.Dense(NUM_FEATURES, name='features', **exact)(x))
    return features, nn.Dense(NUM_CLASSES, name='logits', **exact)(features)


def init(key: jax.Array) -> dict:
  """Fresh float32 parameters, a nested dict."""
  image = jnp.zeros((1, *IMAGE_SHAPE), jnp.uint8)
  return DigitsClassifier().init(key, image)['params']


def save(path: str | os.PathLike, params: dict,
         metadata: dict[str, str]) -> None:
  """Writes the parameters as float16 safetensors, all or nothing.

  Args:
    path: the file; one already there is replaced.
    params: as `init` returns them.
    metadata: goes into the header beside the format version.
  """
  tensors = {
      name: np.asarray(value, np.float16) for name, value in
      flax.traverse_util.flatten_dict(params, sep='/').items()}
  with files.atomic_path(path) as temporary:
    # Not save_file, which makes the file unreadable to other users.
    temporary.write_bytes(safetensors.numpy.save(
        tensors, {'format_version': FORMAT_VERSION, **metadata}))


def load(path: str | os.PathLike = WEIGHTS) -> tuple[dict, dict[str, str]]:
  """Loads the parameters (float32) and the header's metadata.

  Raises:
    FileNotFoundError: nothing at `path`.
    ValueError: a damaged file, another format version, or other tensors.
  """
  again = ('make it anew by '
           'python -m msfp_jax.metrics.train_digits_classifier')
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(f'no classifier weights at {path}; {again}')
  if path == WEIGHTS:
    seal.check_file(path, _SHA256, seal.INSTALL_AGAIN)
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      metadata = file.metadata() or {}
      tensors = {
          name: file.get_tensor(name).astype(np.float32)
          for name in file.keys()}  # noqa: SIM118 - no mapping
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(f'{path} is damaged ({error}); {again}') from error
  version = metadata.get('format_version')
  if version != FORMAT_VERSION:
    raise ValueError(f'{path} has format version {version!r}, this code reads '
                     f'{FORMAT_VERSION!r}; {again}')
  expected = flax.traverse_util.flatten_dict(
      jax.eval_shape(init, jax.random.key(0)), sep='/')
  shapes = {name: value.shape for name, value in tensors.items()}
  wanted = {name: value.shape for name, value in expected.items()}
  if shapes != wanted:
    raise ValueError(f'{path} holds {shapes}, needed are {wanted}; {again}')
  return flax.traverse_util.unflatten_dict(tensors, sep='/'), metadata
