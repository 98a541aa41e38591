"""Takes fused tensors apart: one in a file, several of ours, by a table.

Parts stay in the file until they are read.
"""

from collections.abc import Mapping, Sequence
import re
from typing import NamedTuple

import numpy as np

from msfp_jax.convert.tensors import LazyTensor

# PyTorch's and other names of what a module holds -> PyTorch's.
_LEAVES = {'weight': 'weight', 'bias': 'bias', 'scale': 'weight'}


class Fused(NamedTuple):
  """How a module's tensors become those of other modules.

  A tensor is so many equal pieces along an axis; each part takes some of them,
  in an order of its own. One piece and one part is a new name.

  Attributes:
    pattern: of the whole module's name.
    parts: {new module, as of re.Match.expand: the pieces that it takes}.
    pieces: how many there are.
    axis: 0 for outputs, 1 for inputs; of those a bias knows nothing, and goes
      whole to the first part.
  """

  pattern: str
  parts: Mapping[str, tuple[int, ...]]
  pieces: int = 1
  axis: int = 0


class Product(NamedTuple):
  """A matrix that a file holds as a product: up down, of few rows between.

  Attributes:
    down: `[R, I]`, or of a convolution `[R, I, *window]`.
    up: `[O, R]`, or `[O, R, 1, 1]`.
    scale: what it is multiplied with.
    name: that the file has for it.
  """

  down: LazyTensor
  up: LazyTensor
  scale: float
  name: str


def renamed(pattern: str, module: str) -> Fused:
  """A module that only gets another name."""
  return Fused(pattern, {module: (0,)})


def take_apart(tensors: Mapping[str, LazyTensor], table: Sequence[Fused]
               ) -> dict[str, LazyTensor]:
  """Renames and splits tensors by the first row that matches their module.

  Args:
    tensors: {module.weight, module.bias or module.scale: tensor}.
    table: what is not in it keeps its name.

  Returns:
    {name: tensor}. A tensor that its row cannot split, or whose place another
    has taken, keeps its name too, so that `restore` lists it.
  """
  found = {}
  for name, tensor in tensors.items():
    module, _, leaf = name.rpartition('.')
    row, match = _row(table, module)
    new = {} if row is None or leaf not in _LEAVES else {
        f'{match.expand(part)}.{_LEAVES[leaf]}': value
        for part, value in _split(tensor, row, leaf).items()}
    if not new or new.keys() & found.keys():
      new = {_free(name, found): tensor}
    found |= new
  return found


def take_apart_products(products: Mapping[str, Product],
                        table: Sequence[Fused]) -> dict[str, Product]:
  """As `take_apart`, of {module: what is added to its weight}.

  Outputs are rows of `up`, inputs columns of `down`: one of the two is split,
  the other is that of every part.
  """
  found = {}
  for module, product in products.items():
    row, match = _row(table, module)
    new = {}
    if row is not None:
      half = 'down' if row.axis else 'up'
      new = {match.expand(part): product._replace(**{half: value})
             for part, value in _split(
                 getattr(product, half), row, 'weight').items()}
    if not new or new.keys() & found.keys():
      new = {_free(module, found): product}
    found |= new
  return found


def _free(name, found):
  """The name, or one that no layer has, where a part of another took it."""
  return f'{name} (twice)' if name in found else name


def _row(table, module):
  for row in table:
    if match := re.fullmatch(row.pattern, module):
      return row, match
  return None, None


def _split(tensor, row, leaf):
  """{part: its tensor}; empty where the tensor has no such pieces."""
  first, *_ = row.parts
  if row.pieces == 1 or row.axis and leaf == 'bias':
    return {first: tensor}
  if len(tensor.shape) <= row.axis or tensor.shape[row.axis] % row.pieces:
    return {}
  return {part: _part(tensor, row, taken) for part, taken in row.parts.items()}


def _part(tensor, row, taken):
  length = tensor.shape[row.axis] // row.pieces
  shape = list(tensor.shape)
  shape[row.axis] = length * len(taken)

  def read():
    if row.axis:
      pieces = np.split(tensor.read(), row.pieces, row.axis)
      return np.concatenate([pieces[i] for i in taken], row.axis)
    # Of a large file a part is read alone, and not all of it for every part.
    return np.concatenate([tensor.rows(i * length, (i + 1) * length)
                           for i in taken])
  return LazyTensor(tuple(shape), tensor.dtype, read, tensor.refused)
