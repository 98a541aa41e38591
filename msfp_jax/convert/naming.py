"""Renaming tensors of other code bases, by rules that match a whole name."""

from collections.abc import Callable, Mapping, Sequence
import re
from typing import Any

from msfp_jax.convert import key_values
from msfp_jax.convert.tensors import LazyTensor

# A pattern of a whole module name, and what it becomes (as re.sub's).
Rule = tuple[str, str]

# A spatial transformer; diffusers has kept CompVis' names.
TRANSFORMER: tuple[Rule, ...] = (
    (r'(norm|proj_in|proj_out)', r'\1'),
    (r'transformer_blocks\.(\d+)\.(attn[12])\.to_([qkv])',
     r'transformer.\1.\2.\3'),
    (r'transformer_blocks\.(\d+)\.(attn[12])\.to_out\.0',
     r'transformer.\1.\2.proj_out'),
    (r'transformer_blocks\.(\d+)\.(norm[123])', r'transformer.\1.\2'),
    (r'transformer_blocks\.(\d+)\.ff\.net\.0\.proj', r'transformer.\1.ff.proj'),
    (r'transformer_blocks\.(\d+)\.ff\.net\.2', r'transformer.\1.ff.out'))


def rename_module(module: str, rules: Sequence[Rule]) -> str | None:
  """Renames a module by the first rule that matches all of it, or None."""
  for pattern, replacement in rules:
    match = re.fullmatch(pattern, module)
    if match:
      return match.expand(replacement)
  return None


def rename(tensors: Mapping[str, LazyTensor],
           module_of: Callable[[str], str | None]
           ) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
  """Renames tensors by their module.

  Args:
    tensors: {module.weight or module.bias: tensor}.
    module_of: our module for a foreign one, or None.

  Returns:
    {our name: tensor}, and the names for which there is no rule, or whose
    place another tensor has taken.
  """
  found, came_from, leftover = {}, {}, []
  for name, tensor in tensors.items():
    module, _, leaf = name.rpartition('.')
    ours = module_of(module)
    if ours is None or leaf not in ('weight', 'bias'):
      leftover.append(name)
      continue
    new = f'{ours}.{leaf}'
    # Two names for one place, of which neither may be lost in silence.
    if new in found:
      leftover.append(f'{name}, the same as {came_from[new]}')
      continue
    found[new], came_from[new] = tensor, name
  return found, tuple(leftover)


def single(value: Any, field: str) -> int | None:
  """Returns a field of a configuration that must be one number, or None.

  A list of equal numbers, one for each level, is one as well.

  Raises:
    ValueError: it is neither.
  """
  if isinstance(value, list | tuple) and value and all(
      other == value[0] for other in value):
    value = value[0]
  if value is not None and (not isinstance(value, int)
                            or isinstance(value, bool)):
    raise ValueError(f'{field}={value!r}: must be one number for all levels')
  return value


def size(tensors: Mapping[str, LazyTensor], name: str, axis: int) -> int:
  """The length of one axis of a tensor.

  Raises:
    KeyError: there is none of this name.
    ValueError: it has no such axis, or an empty one; names the tensor.
  """
  shape = tensors[name].shape
  if len(shape) <= axis or not shape[axis]:
    # Of some that are not read, not even the shape is known.
    if tensors[name].refused:
      raise ValueError(f'{name} {tensors[name].refused}')
    kind = f'has shape {list(shape)}' if shape else 'is a scalar'
    raise ValueError(f'{name} {kind}, and no length of axis {axis}')
  return shape[axis]


def size_if_any(tensors: Mapping[str, LazyTensor], name: str, axis: int
                ) -> int | None:
  """`size` of a tensor that a model need not have; None without it."""
  return size(tensors, name, axis) if name in tensors else None


def sides(value: Any, field: str) -> dict[str, int]:
  """The height and width of a model's images, as fields of `UNetConfig`.

  Args:
    value: one number of square images, or a list of height and width.
    field: that it stands in, for the message.

  Raises:
    ValueError: it is neither.
  """
  if not key_values.SIDES.has(value):
    raise ValueError(f'{field}={value!r}: must be {key_values.SIDES.what}')
  height, width = [value] * 2 if isinstance(value, int) else value
  return {'image_size': height} | (
      {} if width == height else {'image_width': width})


def multiples(channels: list[int]) -> tuple[int, tuple[int, ...]]:
  """Splits diffusers' block_out_channels.

  Args:
    channels: of each level; positive.

  Returns:
    The first, and of which multiple of it each level has.

  Raises:
    ValueError: one is no multiple of the first.
  """
  first = channels[0]
  if odd := [c for c in channels if c % first]:
    raise ValueError(f'block_out_channels={channels}: {odd} are no multiples '
                     'of the first')
  return first, tuple(c // first for c in channels)


def below(tensors: Mapping[str, LazyTensor], prefix: str
          ) -> dict[str, LazyTensor]:
  """The tensors whose names begin with a prefix, which is taken off."""
  return {name.removeprefix(prefix): tensor
          for name, tensor in tensors.items() if name.startswith(prefix)}


def indices(tensors: Mapping[str, LazyTensor], pattern: str) -> list[int]:
  """The distinct numbers that a pattern finds in the names, ascending."""
  matches = (re.match(pattern, name) for name in tensors)
  return sorted({int(match[1]) for match in matches if match})
