"""The flags that every stage takes."""

import pathlib

from absl import flags

_FOLDER = flags.DEFINE_string('folder', None, 'Where the stage writes.')
SECONDS = flags.DEFINE_float('seconds', 600.0, 'After which nothing is begun.')
DRY = flags.DEFINE_bool('dry', False, 'Toy sizes, for a CPU.')
flags.mark_flag_as_required('folder')


def folder() -> pathlib.Path:
  """Where the stage writes; made where missing."""
  path = pathlib.Path(_FOLDER.value).absolute()
  path.mkdir(parents=True, exist_ok=True)
  return path
