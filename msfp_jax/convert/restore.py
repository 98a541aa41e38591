"""Named tensors -> parameters of a model, strict both ways."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.convert.tensors import LazyTensor

# Flax's name of a parameter -> PyTorch's.
_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight',
           'bias': 'bias'}


def torch_names(abstract: Any) -> dict[str, tuple[str, ...]]:
  """{dotted name as PyTorch ends it: path} of a model's parameters."""
  return {'.'.join((*path[:-1], _LEAVES[path[-1]])): path
          for path in traverse_util.flatten_dict(abstract)}


def restore(tensors: Mapping[str, LazyTensor], abstract: Any, source: str,
            leftover: tuple[str, ...] = ()) -> Any:
  """PyTorch's tensors -> a model's parameters, float32.

  Tensors are read one at a time. Convolutions are turned from OIHW to HWIO,
  matrices from `[out, in]` to `[in, out]`; a 1x1 convolution may stand for a
  matrix.

  Args:
    tensors: {our module name + '.weight' or '.bias': tensor}.
    abstract: the parameters' shapes.
    source: of the tensors, for messages.
    leftover: names in the checkpoint that no rule could name.

  Raises:
    ValueError: tensors that are missing, unexpected, misshapen, of a type
      that holds no weights, or not finite: all are listed.
  """
  flat = traverse_util.flatten_dict(abstract)
  expected = torch_names(abstract)
  problems = [f'missing {name} {torch_shape(flat[path].shape, path[-1])}'
              for name, path in expected.items() if name not in tensors]
  problems += [f'unexpected {name} {tensors[name].shape}'
               for name in tensors if name not in expected]
  problems += [f'unexpected {name}' for name in leftover]
  for name in expected.keys() & tensors.keys():
    tensor, path = tensors[name], expected[name]
    wanted = torch_shape(flat[path].shape, path[-1])
    if not _fits(tensor.shape, wanted):
      problems.append(f'{name} is {tensor.shape}, the model wants {wanted}')
    elif not _is_float(tensor.dtype):
      problems.append(f'{name} has type {tensor.dtype}, which holds no weights')
  _refuse(source, problems)
  found = {}
  for name, path in expected.items():
    value = np.asarray(tensors[name].read(), np.float32)
    if count := np.count_nonzero(~np.isfinite(value)):
      problems.append(f'{name} holds {count} values that are not finite')
    found[path] = _to_flax(value, flat[path].shape, path[-1])
  _refuse(source, problems)
  return traverse_util.unflatten_dict(found)


def _refuse(source, problems):
  if problems:
    raise ValueError(f'{source} does not fit the model:\n  '
                     + '\n  '.join(sorted(problems)))


def torch_shape(shape: tuple[int, ...], leaf: str) -> tuple[int, ...]:
  """The shape that PyTorch gives a parameter of ours."""
  if leaf == 'kernel':
    return (shape[-1], shape[-2], *shape[:-2])
  return shape


def _fits(shape, wanted):
  if len(wanted) == 2 and len(shape) > 2:  # a convolution over one point
    return shape[:2] == wanted and set(shape[2:]) == {1}
  return shape == wanted


def _is_float(dtype):
  return jnp.issubdtype(dtype, jnp.floating)


def _to_flax(value: np.ndarray, shape: tuple[int, ...], leaf: str) -> jax.Array:
  if leaf == 'kernel':
    axes = tuple(range(2, len(shape)))
    value = value.reshape(shape[-1], shape[-2], *shape[:-2]).transpose(
        *axes, 1, 0)
  # A copy of its own: what was read is then let go.
  return jnp.array(value)
