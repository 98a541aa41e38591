"""Inception's published weights: found, checked, folded."""

from collections.abc import Mapping
import hashlib
import os
import pathlib
import shutil
import urllib.error
import urllib.request

from absl import logging
import numpy as np

from msfp_jax import files
from msfp_jax.convert import source as source_lib
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.metrics import inception

FILE = 'pt_inception-2015-12-05-6726825d.pth'
URL = ('https://github.com/mseitzer/pytorch-fid/releases/download/'
       f'fid_weights/{FILE}')
SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'
_EPSILON = 1e-3  # of the batch normalisation
_TIMEOUT = 30  # seconds without a byte
_ADVICE = ('get it where there is a network, check that its SHA-256 is '
           f'{SHA256}, and pass --config.eval.inception=PATH')


def cache_path() -> pathlib.Path:
  """Where the download is kept: under $XDG_CACHE_HOME, or ~/.cache."""
  root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(root) / 'msfp_jax' / FILE


def find(path: str | os.PathLike = '') -> pathlib.Path:
  """The file of the weights, downloaded where it must be.

  Args:
    path: a file; empty: the one in the cache, which is filled from URL the
      first time.

  Raises:
    FileNotFoundError: nothing at `path`.
    ValueError: the file is not the published one, though its name says so.
    OSError: the download failed; the message says what to get by hand.
  """
  if path:
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
      raise FileNotFoundError(
          f'no Inception weights at {path}; they are at {URL}')
  else:
    path = cache_path()
    if not path.is_file():
      _download(path)
  # Both publishers end the name by the digest's first 8 digits.
  if path.stem.endswith(SHA256[:8]):
    _check(path)
  return path


def _download(path: pathlib.Path) -> None:
  logging.info('downloading %s (96 MB) to %s', URL, path)
  try:
    with (files.atomic_path(path) as temporary,
          urllib.request.urlopen(URL, timeout=_TIMEOUT) as response):
      with open(temporary, 'wb') as file:
        shutil.copyfileobj(response, file)
      _check(temporary)
  except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
    raise OSError(f'{FILE} is not in {path.parent} and cannot be downloaded '
                  f'from {URL} ({error}); {_ADVICE}') from error


def _check(path: pathlib.Path) -> None:
  found = digest(path)
  if found != SHA256:
    raise ValueError(f'{path} is damaged: its SHA-256 is {found}; delete it, '
                     + _ADVICE)


def digest(path: str | os.PathLike) -> str:
  """SHA-256 of a file, in hexadecimal digits."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def load(path: str | os.PathLike) -> dict[str, dict[str, np.ndarray]]:
  """Reads the network's parameters; nothing in the file is run.

  Args:
    path: the published state dict (.pth), a TorchScript archive (.pt) of a
      network with the same layer names, or a .safetensors of the same tensors.

  Returns:
    What `inception.apply` takes, float32.

  Raises:
    FileNotFoundError: nothing at `path`.
    ValueError: a damaged file, or other tensors; all are listed.
  """
  tensors = {
      name: tensor for name, tensor in
      source_lib.open_source(path).tensors.items()
      if not name.endswith('.num_batches_tracked')}
  wanted = state_shapes()
  problems = [f'missing {name} {shape}' for name, shape in wanted.items()
              if name not in tensors]
  for name, tensor in tensors.items():
    if name not in wanted:
      problems.append(f'unexpected {name} {tensor.shape}')
    elif tensor.shape != wanted[name]:
      problems.append(f'{name} is {tensor.shape}, not {wanted[name]}')
  if problems:
    raise ValueError(f'{path} holds other weights than the Inception of '
                     f'2015-12-05; expected is {FILE}:\n  '
                     + '\n  '.join(sorted(problems)))
  return fold({name: _read(path, name, tensor)
               for name, tensor in tensors.items()})


def _read(path, name: str, tensor: LazyTensor) -> np.ndarray:
  value = np.asarray(tensor.read(), np.float32)
  if not np.isfinite(value).all():
    raise ValueError(f'{path}: {name} holds NaN or infinity')
  return value


def state_shapes() -> dict[str, tuple[int, ...]]:
  """{name: shape} of the published tensors, without num_batches_tracked."""
  shapes = {}
  for name, (height, width, fan, out) in inception.CONVOLUTIONS.items():
    shapes[f'{name}.conv.weight'] = (out, fan, height, width)
    for leaf in ('weight', 'bias', 'running_mean', 'running_var'):
      shapes[f'{name}.bn.{leaf}'] = (out,)
  return shapes | {
      'fc.weight': (inception.NUM_CLASSES, inception.NUM_FEATURES),
      'fc.bias': (inception.NUM_CLASSES,)}


def fold(state: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
  """Batch normalisation into each convolution's weights and bias.

  Args:
    state: as `state_shapes` says; other names are ignored.

  Returns:
    {layer: {'kernel', 'bias'}}, float32, kernels HWIO and `[in, out]`.
  """
  params = {}
  for name in inception.CONVOLUTIONS:
    scale, bias, mean, variance = (
        np.asarray(state[f'{name}.bn.{leaf}'], np.float64)
        for leaf in ('weight', 'bias', 'running_mean', 'running_var'))
    scale = scale / np.sqrt(variance + _EPSILON)
    kernel = state[f'{name}.conv.weight'].transpose(2, 3, 1, 0) * scale
    params[name] = {'kernel': kernel.astype(np.float32),
                    'bias': (bias - mean * scale).astype(np.float32)}
  return params | {
      'fc': {'kernel': np.asarray(state['fc.weight'], np.float32).T,
             'bias': np.asarray(state['fc.bias'], np.float32)}}
