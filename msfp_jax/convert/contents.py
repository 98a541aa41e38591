"""Says what a file holds in place of tensors."""

from collections.abc import Mapping, Sequence
import itertools
from typing import Any

from msfp_jax.base.pickle_names import shown
from msfp_jax.base.pickles import Opaque

_NUMPY = 'numpy'  # arrays are made by one of its functions, by version
_MOST = 10_000  # entries that are looked at: shared ones multiply
_LONGEST = 100  # characters of a name


def told(content: Any) -> str:
  """Says what is in an unpickled file without tensors, and the way out.

  Args:
    content: of `pickles.read_pickle`.

  Returns:
    A sentence; '' where there are only numbers, texts and the like.
  """
  found = _opaque(content)
  if names := [name for name, made_by in found
               if made_by.partition('.')[0] == _NUMPY]:
    return arrays(names)
  if found:
    kinds = sorted({made_by for _, made_by in found})
    return (f'it holds whole objects, made by {kinds[0]}'
            + (f' and {len(kinds) - 1} others' if kinds[1:] else '')
            + ', and their classes are needed to read them: where these are '
            'at hand, save the weights alone, '
            'torch.save(model.state_dict(), path)')
  return ''


def arrays(names: Sequence[str]) -> str:
  """Says that a file holds NumPy arrays of these names."""
  return (f'it holds {len(names)} NumPy arrays, such as '
          f'{shown(names[0] or "the whole")}, and no tensors: write them with '
          'safetensors.numpy.save_file')


def _below(name, key):
  part = key[:_LONGEST] if isinstance(key, str) else shown(key)
  return f'{name}.{part}'.lstrip('.')[:_LONGEST]


def _opaque(content):
  """The objects in plain containers: [(dotted name, what made it)]."""
  found, waiting = [], [('', content)]
  for _ in range(_MOST):
    if not waiting:
      break
    name, value = waiting.pop()
    if isinstance(value, Opaque):
      found.append((name, value.made_by))
    elif isinstance(value, Mapping | list | tuple):
      items = (value.items() if isinstance(value, Mapping)
               else enumerate(value))
      # Not more of them than will be looked at, by names that do not grow.
      waiting += [(_below(name, key), part) for key, part
                  in itertools.islice(items, max(0, _MOST - len(waiting)))]
  return found
