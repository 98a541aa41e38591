"""What a folder of data holds: the files wanted, and all that is left out."""

import collections
from collections.abc import Collection
import dataclasses
import os

from absl import logging


@dataclasses.dataclass(frozen=True)
class Contents:
  """The files in a folder and below.

  Attributes:
    files: paths of those that have a suffix that was asked for, in the order
      of paths: what is in a folder stays together.
    others: {suffix: number of files} of the rest, '' for none.
    hidden_files: their number; hidden folders are not looked into.
    hidden_folders: their number.
  """

  files: list[str]
  others: dict[str, int]
  hidden_files: int = 0
  hidden_folders: int = 0

  def left_out(self) -> str:
    """Counts what is not among `files`, such as '3 of .txt'; '' for nothing."""
    # Most frequent first; a folder of anything may hold any number of kinds.
    kinds = sorted(self.others.items(), key=lambda item: (-item[1], item[0]))
    parts = [f'{count:,} of {suffix}' if suffix else
             f'{count:,} without a suffix' for suffix, count in kinds[:10]]
    if kinds[10:]:
      parts.append(f'{sum(count for _, count in kinds[10:]):,} of '
                   f'{len(kinds) - 10} other suffixes')
    for count, kind in ((self.hidden_files, 'files'),
                        (self.hidden_folders, 'folders')):
      if count:
        parts.append(f'hidden {kind}: {count:,}')
    return ', '.join(parts)


def find(root: str | os.PathLike, suffixes: Collection[str]) -> Contents:
  """Looks for files by their suffixes, in a folder and all below it.

  Links to folders are followed, and every folder is looked into once: also
  where several links lead to it, or one leads back. What is left out is logged
  by kind and number.

  Args:
    root: the folder; its own name may be hidden.
    suffixes: lower case, with their dot; files' may be in capitals.

  Raises:
    OSError: a folder cannot be read.
    FileNotFoundError: a link among what is not wanted leads nowhere: it may
      have been a folder of what is.
  """
  files, others = [], collections.Counter()
  hidden_files = hidden_folders = 0
  seen, pending = set(), collections.deque([os.fspath(root)])
  # Links last: a folder that is there itself goes by that name, and a link
  # that is added later moves no other file.
  while pending:
    for folder, folders, names in os.walk(pending.popleft(), onerror=_raise):
      status = os.stat(folder)
      if (status.st_dev, status.st_ino) in seen:
        folders.clear()
        continue
      seen.add((status.st_dev, status.st_ino))
      hidden_folders += sum(map(_hidden, folders))
      # In place: os.walk goes into what is left. Sorted, for of two links to
      # one folder the first counts, whatever the order of the disk.
      folders[:] = sorted(name for name in folders if not _hidden(name))
      pending.extend(path for path in (
          os.path.join(folder, name) for name in folders)
          if os.path.islink(path))
      for name in names:
        path, suffix = os.path.join(folder, name), _suffix(name)
        if _hidden(name):
          hidden_files += 1
        elif suffix in suffixes:
          files.append(path)
        elif os.path.islink(path) and not os.path.exists(path):
          raise FileNotFoundError(
              f'{path} is a link to {os.readlink(path)}, which is not there: '
              'remove the link, or bring back what it leads to')
        else:
          others[suffix] += 1
  files.sort(key=lambda path: path.replace(os.sep, '\0'))
  contents = Contents(files, dict(others), hidden_files, hidden_folders)
  if files and (left_out := contents.left_out()):
    # Nothing that is hidden is missed, but a suffix may be.
    logging.log(logging.WARNING if others else logging.INFO,
                '%s: %s files are read; left out: %s', root,
                f'{len(files):,}', left_out)
  return contents


def _hidden(name: str) -> bool:
  return name.startswith('.')


def _suffix(name: str) -> str:
  return os.path.splitext(name)[1].lower()


def _raise(error: OSError) -> None:
  """For os.walk, which would otherwise skip a folder that it cannot read."""
  raise error
