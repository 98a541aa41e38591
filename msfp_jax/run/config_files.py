"""Finding config files: the user's own, and those that the package ships.

In a checkout the shipped ones lie beside the package, in configs/; where the
package is installed they lie inside of it (setup.py). Both ways they are named
as in the documentation, `configs/digits.py`, or shorter, and import each other
by `from configs import common`, as configs of the user's may.
"""

import ast
from collections.abc import Sequence
import importlib.machinery
import pathlib
import re
import sys
import types
from typing import Any

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

# Flags that `define` makes belong to the module that calls it, for --help.
flags.disclaim_key_flags()

_PACKAGE = pathlib.Path(__file__).parents[1]
# Inside first: beside an installed package others have their folders.
FOLDER = next((folder for folder in (_PACKAGE / 'configs',
                                     _PACKAGE.parent / 'configs')
               if folder.is_dir()), _PACKAGE / 'configs')
# What experiments share; none itself.
_SHARED = ('__init__', 'common')
# Fields that are lists of names, none of which has a comma.
_LISTS = ('eval.rows', 'eval.more_features', 'eval.more_references')


def names() -> list[str]:
  """The experiments that the package ships, by name, such as 'digits'."""
  return sorted(path.stem for path in FOLDER.glob('*.py')
                if path.stem not in _SHARED)


def find(text: str) -> str:
  """Finds the file of --config, and lets it import `configs`.

  A file that is there is taken as it is named. If there is none, then
  'configs/NAME.py', 'NAME.py' and 'NAME' are the shipped one.

  Args:
    text: 'PATH', or 'PATH:WORDS'.

  Returns:
    The same with the path of a file that exists.

  Raises:
    FileNotFoundError: there is no such file; the shipped ones are listed.
  """
  path, colon, words = text.partition(':')
  if pathlib.Path(path).is_file():
    _let_import(shipped_first=False)
    return text
  given = pathlib.PurePath(path)
  spellings = (given.stem, f'{given.stem}.py', f'configs/{given.stem}.py')
  if given.stem in names() and given in map(pathlib.PurePath, spellings):
    _let_import(shipped_first=True)
    found = f'{FOLDER / given.stem}.py'
    # A file of the user's may have been meant, in another folder than this.
    app.call_after_init(lambda: logging.info(
        'no file %s here: taking the shipped %s', path, found))
    return f'{found}{colon}{words}'
  raise FileNotFoundError(
      f'no config file {path!r}: name one that exists, or a shipped one: '
      + ', '.join(f'configs/{name}.py' for name in names()))


def define() -> flags.FlagHolder:
  """Defines --config, whose value is the config that its file makes."""
  holder = config_flags.DEFINE_config_file(
      'config', None, 'The experiment: configs/NAME.py[:variant].',
      lock_config=True)
  flag = flags.FLAGS[holder.name]
  flag.parser = _Parser(flag.parser)
  return holder


def quote_lists(argv: Sequence[str]) -> list[str]:
  """A command line whose lists of names are Python's, as flags want them.

  So `--config.eval.rows=fp,msfp:w6a6` means ('fp', 'msfp:w6a6'); without, names
  with a colon between commas are no tuple and no single name either.

  Args:
    argv: as it was typed; what is Python already stays as it is.
  """
  field = '|'.join(map(re.escape, _LISTS))
  found = list(argv)
  for i, text in enumerate(found):
    given = re.fullmatch(
        rf'(--?config\.(?:{field}))(?:=(.*))?', text, re.DOTALL)
    if given is None:
      continue
    if given[2] is not None:
      found[i] = f'{given[1]}={_quoted(given[2])}'
    elif i + 1 < len(found):  # the value is the next word
      found[i + 1] = _quoted(found[i + 1])
  return found


def _quoted(text):
  """'a,b' as "('a', 'b')"."""
  try:
    ast.literal_eval(text)
  except (SyntaxError, ValueError):
    if not text.lstrip().startswith(('(', '[')):  # whose mistake is named
      return repr(tuple(filter(None, map(str.strip, text.split(',')))))
  return text


class _Parser(flags.ArgumentParser):
  """Reads the file that `find` finds as `parser` reads files."""

  def __init__(self, parser: flags.ArgumentParser):
    self._parser = parser

  def parse(self, argument: str) -> Any:
    return self._parser.parse(find(argument))

  def flag_type(self) -> str:
    return self._parser.flag_type()


class _Finder:
  """Finds the shipped configs, for Python's import."""

  @staticmethod
  def find_spec(fullname: str, path: Sequence[str] | None = None,
                target: types.ModuleType | None = None
                ) -> importlib.machinery.ModuleSpec | None:
    """As importlib.abc.MetaPathFinder has it: `configs` and `configs.NAME`."""
    if fullname == 'configs':
      spec = importlib.machinery.ModuleSpec(fullname, None, is_package=True)
      spec.submodule_search_locations = [str(FOLDER)]
      return spec
    if fullname.startswith('configs.'):
      return importlib.machinery.PathFinder.find_spec(fullname, [str(FOLDER)])
    return None


def _let_import(shipped_first: bool) -> None:
  """Lets `from configs import NAME` find shipped configs.

  Args:
    shipped_first: for shipped configs, which mean each other, whatever the
      current folder has by that name. Those of the user's look in their own
      folder `configs` first, and find shipped ones beside it.
  """
  if _Finder in sys.meta_path:
    sys.meta_path.remove(_Finder)
  sys.meta_path.insert(0 if shipped_first else len(sys.meta_path), _Finder)
