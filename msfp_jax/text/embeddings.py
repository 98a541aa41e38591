"""What encoders made of prompts: conditions of a model, and their file."""

from collections.abc import Mapping
import dataclasses
import pathlib

import numpy as np

from msfp_jax.base import files
from msfp_jax.base import npz

# The conditions of each family of models by name, and how many axes they have.
FAMILIES = {'stable_diffusion': {'context': 3},
            'flux': {'text': 3, 'pooled': 2}}
_NEGATIVE = 'negative_'  # before their names in the file


@dataclasses.dataclass(frozen=True, eq=False)
class Embeddings:
  """Conditions of B images.

  Attributes:
    family: a name in FAMILIES.
    conditions: {name: float32 `[B, ...]`}, in the order of the model's
      arguments: `context` `[B, L, D]` of Stable Diffusion; `text` `[B, L, D]`
      and `pooled` `[B, D]` of FLUX.
    negative: the same of what guidance leads away from; None without.
    cut: how many prompts, negative ones among them, were longer than the
      encoder of the first condition takes.
  """

  family: str
  conditions: Mapping[str, np.ndarray]
  negative: Mapping[str, np.ndarray] | None = None
  cut: int = 0

  def __len__(self) -> int:
    return len(next(iter(self.conditions.values())))


def save_embeddings(path: str | pathlib.Path, embeddings: Embeddings) -> None:
  """Writes them to an .npz file: conditions by name, and negative_NAME."""
  arrays = dict(embeddings.conditions) | {
      _NEGATIVE + name: value
      for name, value in (embeddings.negative or {}).items()}
  with files.atomic_path(path) as temporary, open(temporary, 'wb') as file:
    np.savez(file, **arrays)


def load_embeddings(path: str | pathlib.Path) -> Embeddings:
  """Reads embeddings that were made here or by any other program.

  Args:
    path: an .npz file with `context`, or with `text` and `pooled`, of any
      floating type that NumPy knows; and perhaps the same names behind
      `negative_`.

  Raises:
    FileNotFoundError: nothing there.
    ValueError: another file, other names, or arrays of other shapes, of
      different numbers of images, or with values that are not finite.
  """
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f'no embeddings at {path}')
  with npz.opened(path, 'of arrays') as held:
    arrays = {name: held[name] for name in held}
  family = _family(path, arrays)
  axes = FAMILIES[family]
  # Of all arrays at once.
  problems = [text for name in arrays
              for text in _problems(name, arrays[name], axes)]
  if problems:
    raise ValueError(f'{path}: ' + '; '.join(problems))
  numbers = {name: len(value) for name, value in arrays.items()}
  if len(set(numbers.values())) > 1:
    raise ValueError(f'{path}: arrays of different numbers of images, '
                     f'{numbers}')
  made = lambda prefix: {name: arrays[prefix + name].astype(np.float32)
                         for name in axes}
  return Embeddings(family, made(''), made(_NEGATIVE) if any(
      name.startswith(_NEGATIVE) for name in arrays) else None)


def _family(path, arrays):
  for family, axes in FAMILIES.items():
    if arrays.keys() in (axes.keys(), axes.keys() | {
        _NEGATIVE + name for name in axes}):
      return family
  raise ValueError(
      f'{path} holds {sorted(arrays)}: must be the conditions of one of '
      + '; '.join(f'{name}: {[*axes]}' for name, axes in FAMILIES.items())
      + f', and perhaps each of them once more behind {_NEGATIVE!r}')


def _problems(name, array, axes):
  wanted = axes[name.removeprefix(_NEGATIVE)]
  if not np.issubdtype(array.dtype, np.floating):
    yield f'{name} has type {array.dtype}, must be floating'
  elif array.ndim != wanted or not array.size:
    yield f'{name} has shape {array.shape}, must have {wanted} axes'
  elif not np.isfinite(array).all():
    yield f'{name} holds values that are not finite'
