"""Finds, checks and reads Inception's published weights."""

from collections.abc import Mapping
import http.client
import os
import pathlib
import shutil
import urllib.error
import urllib.request

from absl import logging
import numpy as np

from msfp_jax.base import files
from msfp_jax.metrics import classifier_files
from msfp_jax.metrics import inception
from msfp_jax.metrics import inception_names

FILE = 'pt_inception-2015-12-05-6726825d.pth'
URL = ('https://github.com/mseitzer/pytorch-fid/releases/download/'
       f'fid_weights/{FILE}')
SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'
_EPSILON = 1e-3  # of the batch normalisation
_TIMEOUT = 30  # seconds without a byte
_ADVICE = ('get it where there is a network, check that its SHA-256 is '
           f'{SHA256}, and pass --config.eval.inception=PATH, or beside '
           '--make_stats --inception=PATH')


def cache_path() -> pathlib.Path:
  """The path of the kept download: under $XDG_CACHE_HOME, or ~/.cache."""
  root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(root) / 'msfp_jax' / FILE


def find(path: str | os.PathLike = '') -> pathlib.Path:
  """Finds the file of the weights; downloads it where it must.

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
  if path.suffix == '.pth' and path.stem.endswith(SHA256[:8]):
    _check(path, str(path))
  return path


def _download(path: pathlib.Path) -> None:
  logging.info('downloading %s (96 MB) to %s', URL, path)
  # Checked under its temporary name: what is damaged never enters the cache.
  try:
    with (files.atomic_path(path) as temporary,
          urllib.request.urlopen(URL, timeout=_TIMEOUT) as response):
      with open(temporary, 'wb') as file:
        shutil.copyfileobj(response, file)
      _check(temporary, f'what came from {URL}')
  except (urllib.error.URLError, http.client.HTTPException, TimeoutError,
          ConnectionError) as error:
    raise OSError(f'{FILE} is not in {path.parent} and cannot be downloaded '
                  f'from {URL} ({error}); {_ADVICE}') from error


def _check(path: pathlib.Path, name: str) -> None:
  found = classifier_files.digest(path)
  if found != SHA256:
    raise ValueError(f'{name} is damaged: its SHA-256 is {found}; {_ADVICE}')


def load(path: str | os.PathLike) -> dict[str, dict[str, np.ndarray]]:
  """Reads the network's parameters; nothing in the file is run.

  Args:
    path: the published state dict (.pth), NVIDIA's TorchScript archive (.pt),
      or a .safetensors of the tensors of either.

  Returns:
    What `inception.apply` takes, float32.

  Raises:
    FileNotFoundError: nothing at `path`.
    ValueError: a damaged file, or other tensors; all are listed.
  """
  tensors = inception_names.published(classifier_files.open_tensors(path))
  return fold(classifier_files.read_state(
      path, tensors, inception_names.state_shapes(),
      f'the Inception of 2015-12-05, as in {FILE}'))


def fold(state: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
  """Folds batch normalisation into each convolution's weights and bias.

  Args:
    state: as `inception_names.state_shapes` says; other names are ignored.

  Returns:
    {layer: {'kernel', 'bias'}}, float32, kernels HWIO and `[in, out]`.
  """
  params = {
      name: classifier_files.fold(state, f'{name}.conv', f'{name}.bn', _EPSILON)
      for name in inception.CONVOLUTIONS}
  return params | {'fc': classifier_files.dense(state, 'fc')}
