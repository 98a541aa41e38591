"""Turns named tensors into a model's parameters; none missing or left over."""

from collections.abc import Callable, Mapping
import dataclasses
import operator
import pathlib
from typing import Any, NamedTuple

from flax import traverse_util
import jax.numpy as jnp
import numpy as np

from msfp_jax.convert.tensors import LazyTensor

# Flax's name of a parameter -> PyTorch's.
_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight',
           'bias': 'bias'}


class Form(NamedTuple):
  """The names and layouts that a code base has for our modules' parameters.

  Attributes:
    name: path in the parameters -> dotted name.
    shape: (our shape, last part of the path) -> its shape.
    fits: (a tensor's shape, that shape) -> whether it can be taken.
    place: (float32 values, our shape, last part of the path) -> ours.
  """
  name: Callable[[tuple[str, ...]], str]
  shape: Callable[[tuple[int, ...], str], tuple[int, ...]]
  fits: Callable[[tuple[int, ...], tuple[int, ...]], bool]
  place: Callable[[np.ndarray, tuple[int, ...], str], np.ndarray]


def restore(tensors: Mapping[str, LazyTensor], abstract: Any, source: str,
            form: Form, leftover: tuple[str, ...] = (),
            keep_half: bool = False) -> Any:
  """Reads a model's parameters, float32, one tensor at a time.

  Args:
    tensors: {name as `form` has it: tensor}.
    abstract: the parameters' shapes.
    source: of the tensors, for messages.
    form: TORCH or FLAX.
    leftover: names in the checkpoint that no rule could name.
    keep_half: leave tensors of float16 and bfloat16 in their type, for models
      that take what they read to float32.

  Raises:
    ValueError: tensors that are missing, unexpected, misshapen, of a type
      that holds no weights, in a form that is not read, or not finite: all are
      listed.
  """
  # All problems are collected first, so that a person sees them at once.
  places, problems = _match(tensors, abstract, form, leftover)
  found = {}
  for path, place in places.items():
    value = place.values()
    if count := np.count_nonzero(~np.isfinite(value)):
      problems.append(_not_finite(place.name, count))
    dtype = place.tensor.dtype
    kept = dtype if keep_half and dtype.itemsize == 2 else None
    # A copy of its own: what was read is then let go.
    found[path] = jnp.array(place.placed(value), kept)
  _refuse(source, problems)
  return traverse_util.unflatten_dict(found)


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a parameter of ours lies in a checkpoint.

  Attributes:
    name: of its tensor.
    tensor: still in its file.
    form: see `Form`.
    shape: ours.
    leaf: last part of its path.
    source: of the tensors, for messages.
  """

  name: str
  tensor: LazyTensor
  form: Form
  shape: tuple[int, ...]
  leaf: str
  source: str = ''

  def values(self) -> np.ndarray:
    """Its values as the file lays them out, float32."""
    return np.asarray(self.tensor.read(), np.float32)

  def placed(self, values: np.ndarray) -> np.ndarray:
    """`values` as ours; may be a view."""
    return self.form.place(values, self.shape, self.leaf)

  def read(self) -> np.ndarray:
    """The parameter, float32.

    Raises:
      ValueError: values that are not finite.
    """
    values = self.values()
    if count := np.count_nonzero(~np.isfinite(values)):
      _refuse(self.source, [_not_finite(self.name, count)])
    return np.ascontiguousarray(self.placed(values))


def locate(tensors: Mapping[str, LazyTensor], abstract: Any, source: str,
           form: Form, leftover: tuple[str, ...] = ()
           ) -> dict[tuple[str, ...], Place]:
  """{path: where the parameter lies}; what `restore` would read, unread.

  Raises:
    ValueError: as `restore`, but for values, which are not looked at.
  """
  places, problems = _match(tensors, abstract, form, leftover, source)
  _refuse(source, problems)
  return places


def _match(tensors, abstract, form, leftover, source=''):
  """({path: its place}, problems); reads nothing."""
  flat = traverse_util.flatten_dict(abstract)
  expected = {form.name(path): path for path in flat}
  shapes = {name: form.shape(flat[path].shape, path[-1])
            for name, path in expected.items()}
  problems = [f'missing {name} {shapes[name]}'
              for name in expected if name not in tensors]
  problems += [f'unexpected {name} {tensors[name].shape}'
               for name in tensors if name not in expected]
  problems += [f'unexpected {name}' for name in leftover]
  found = {}
  for name, path in expected.items():
    if name not in tensors:
      continue
    tensor = tensors[name]
    if tensor.refused:
      problems.append(f'{name} {tensor.refused}')
    elif not form.fits(tensor.shape, shapes[name]):
      problems.append(
          f'{name} is {tensor.shape}, the model wants {shapes[name]}')
    elif not jnp.issubdtype(tensor.dtype, jnp.floating):
      problems.append(f'{name} has type {tensor.dtype}, which holds no weights')
    else:
      found[path] = Place(
          name, tensor, form, flat[path].shape, path[-1], source)
  return found, problems


def _not_finite(name, count):
  return f'{name} holds {count} values that are not finite'


def _refuse(source, problems):
  if problems:
    raise ValueError(f'{source} does not fit the model:\n  '
                     + '\n  '.join(sorted(problems)))


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A checkpoint's model, and its parameters where they lie.

  Attributes:
    model: the Flax model.
    path: of the checkpoint's file, or of the index of its shards.
    tensors: {name as `form` has it: tensor}.
    abstract: the parameters' shapes.
    form: TORCH or FLAX.
    leftover: names in the checkpoint that no rule could name.
  """

  model: Any
  path: pathlib.Path
  tensors: Mapping[str, LazyTensor]
  abstract: Any
  form: Form
  leftover: tuple[str, ...] = ()

  def params(self) -> Any:
    """All of them, float32; see `restore`."""
    return restore(self.tensors, self.abstract, str(self.path), self.form,
                   self.leftover)

  def places(self) -> dict[tuple[str, ...], Place]:
    """Where each of them lies; see `locate`."""
    return locate(self.tensors, self.abstract, str(self.path), self.form,
                  self.leftover)


def torch_shape(shape: tuple[int, ...], leaf: str) -> tuple[int, ...]:
  """The shape that PyTorch gives a parameter of ours."""
  # Flax: [*window, I, O]; PyTorch: [O, I, *window]. Others have one axis.
  if leaf == 'kernel':
    return (shape[-1], shape[-2], *shape[:-2])
  return shape


def _fits(shape, wanted):
  if len(wanted) == 2 and len(shape) > 2:  # a convolution over one point
    return shape[:2] == wanted and set(shape[2:]) == {1}
  return shape == wanted


def _to_flax(value: np.ndarray, shape: tuple[int, ...], leaf: str
             ) -> np.ndarray:
  if leaf == 'kernel':
    axes = tuple(range(2, len(shape)))
    value = value.reshape(shape[-1], shape[-2], *shape[:-2]).transpose(
        *axes, 1, 0)
  return value


# Convolutions OIHW, matrices `[out, in]`, for which a 1x1 convolution may
# stand.
TORCH = Form(lambda path: '.'.join((*path[:-1], _LEAVES[path[-1]])),
             torch_shape, _fits, _to_flax)
FLAX = Form('.'.join, lambda shape, leaf: shape, operator.eq,
            lambda value, shape, leaf: value)
