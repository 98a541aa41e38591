"""Reading published classifiers: which tensors must be there, and folding."""

from collections.abc import Mapping
import hashlib
import os

import numpy as np

from msfp_jax.convert import source as source_lib
from msfp_jax.convert.tensors import LazyTensor

State = Mapping[str, np.ndarray]


def digest(path: str | os.PathLike) -> str:
  """SHA-256 of a file, in hexadecimal digits."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def open_tensors(path: str | os.PathLike) -> dict[str, LazyTensor]:
  """Opens a file as {name: tensor}; nothing in it is run, nothing read yet.

  The counters of batch normalisation are left out.

  Raises:
    FileNotFoundError: nothing at `path`.
    ValueError: a damaged file, or one of no known kind.
  """
  return {name: tensor for name, tensor in
          source_lib.open_source(path).tensors.items()
          if not name.endswith('.num_batches_tracked')}


def read_state(path: str | os.PathLike, tensors: Mapping[str, LazyTensor],
               shapes: Mapping[str, tuple[int, ...]], expected: str
               ) -> dict[str, np.ndarray]:
  """Reads the tensors as float32.

  Args:
    path: of the file, for messages.
    tensors: in it.
    shapes: what must be in it, and nothing else.
    expected: the network, for messages.

  Raises:
    ValueError: other tensors or shapes, all of which are listed, or values
      that are not finite.
  """
  # All of them at once: a wrong file is recognized by its list, a damaged one
  # too.
  problems = [f'missing {name} {shape}' for name, shape in shapes.items()
              if name not in tensors]
  for name, tensor in tensors.items():
    if name not in shapes:
      problems.append(f'unexpected {name} {tensor.shape}')
    elif tensor.shape != shapes[name]:
      problems.append(f'{name} is {tensor.shape}, not {shapes[name]}')
  if problems:
    raise ValueError(f'{path} does not hold the weights of {expected}:\n  '
                     + '\n  '.join(sorted(problems)))
  state = {name: np.asarray(tensor.read(), np.float32)
           for name, tensor in tensors.items()}
  if bad := [name for name in state if not np.isfinite(state[name]).all()]:
    raise ValueError(f'{path}: NaN or infinity in {", ".join(sorted(bad))}')
  return state


def norm_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
  """{tensor: shape} of the batch normalisation `name`."""
  return {f'{name}.{leaf}': (channels,)
          for leaf in ('weight', 'bias', 'running_mean', 'running_var')}


def fold(state: State, conv: str, norm: str, epsilon: float
         ) -> dict[str, np.ndarray]:
  """Folds a batch normalisation into the convolution before it.

  Args:
    state: {name: tensor}, PyTorch's names and layouts.
    conv: name of the convolution.
    norm: name of the normalisation.
    epsilon: of the normalisation.

  Returns:
    float32 'kernel' HWIO and 'bias' `[O]`.
  """
  # (conv(x) - mean) / sqrt(variance + epsilon) * scale + bias is a convolution
  # with other weights and a bias.
  scale, bias, mean, variance = (
      np.asarray(state[name], np.float64) for name in norm_shapes(norm, 0))
  scale = scale / np.sqrt(variance + epsilon)
  kernel = state[f'{conv}.weight'].transpose(2, 3, 1, 0) * scale
  return {'kernel': kernel.astype(np.float32),
          'bias': (bias - mean * scale).astype(np.float32)}


def dense(state: State, name: str) -> dict[str, np.ndarray]:
  """Reads a dense layer: float32 'kernel' `[in, out]` and 'bias' `[out]`."""
  return {'kernel': np.asarray(state[f'{name}.weight'], np.float32).T,
          'bias': np.asarray(state[f'{name}.bias'], np.float32)}
