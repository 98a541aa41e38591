"""Images in parquet files, as dataset hubs keep them."""

import collections
from collections.abc import Iterator, Sequence
import contextlib
import io
import pathlib
import threading
from typing import Any, NamedTuple

import numpy as np

from msfp_jax.data import folder
from msfp_jax.data.images import EncodedImages

_KEPT_BYTES = 2**28


def read(path: str) -> EncodedImages:
  """Opens images of one size, read and decoded when they are asked for.

  A file gives whole row groups. Of a data set larger than the 256 MiB that are
  kept, training, which takes rows in random order, reads about a row group an
  image: unpack such a set into a folder.

  Args:
    path: a .parquet file, or a folder of them, taken in the order of names.
      The column is the first that holds encoded images: bytes, or records
      with a field `bytes`.

  Raises:
    FileNotFoundError: no such file.
    ValueError: no such column, a damaged file, or no pyarrow, which only this
      needs.
  """
  root = pathlib.Path(path).expanduser()
  files = [root]
  if root.is_dir():
    files = [pathlib.Path(name) for name in
             folder.find(root, ('.parquet',)).files]
  if not files or not files[0].is_file():
    raise FileNotFoundError(
        f'no .parquet at {root}: download the .parquet files of the data set '
        'there, or pass the file or the folder that has them as '
        '--config.data.path')
  rows = _EncodedRows(files)
  if not len(rows):
    raise ValueError(f'{root}: its .parquet files hold no rows')
  return EncodedImages(len(rows), rows.fetch)


class _Group(NamedTuple):
  """A row group: the part of a file that can be read alone."""
  file: pathlib.Path
  column: str
  index: int  # in the file
  before: int  # rows of the file
  rows: int


class _EncodedRows:
  """The encoded images of parquet files.

  Keeps the row groups used last, _KEPT_BYTES of them or a single one: all of
  a small data set, and of a large one those that a slice runs through.
  """

  def __init__(self, files: Sequence[pathlib.Path]):
    self._groups = []
    self._starts = [0]
    for file in files:
      with _opened(file) as opened:
        column, before = _image_column(opened.schema_arrow), 0
        for index in range(opened.num_row_groups):
          count = opened.metadata.row_group(index).num_rows
          if count < 0:
            raise ValueError(f'row group {index} has {count} rows')
          self._groups.append(_Group(file, column, index, before, count))
          self._starts.append(self._starts[-1] + count)
          before += count
    self._kept = collections.OrderedDict()
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self._starts[-1]

  def fetch(self, rows: Sequence[int]) -> list[tuple[str, io.BytesIO]]:
    """Reads some rows: (name for messages, encoded image) of each."""
    rows = np.asarray(rows)
    # Group g has rows starts[g] to starts[g + 1] - 1, over all files.
    groups = np.searchsorted(self._starts, rows, side='right') - 1
    found = [None] * len(rows)
    with self._lock:
      # By group, so that each is read once.
      for i in np.argsort(groups, kind='stable'):
        group = self._groups[groups[i]]
        row = int(rows[i] - self._starts[groups[i]])
        value = self._values(group)[row].as_py()
        encoded = value['bytes'] if isinstance(value, dict) else value
        found[i] = (f'{group.file}: image {group.before + row}',
                    io.BytesIO(encoded or b''))
    return found

  def _values(self, group: _Group) -> Any:
    if group not in self._kept:
      with _opened(group.file) as opened:
        table = opened.read_row_group(group.index, columns=[group.column])
        if len(table) != group.rows:
          raise ValueError(f'row group {group.index} has {len(table)} rows of '
                           f'the {group.rows} that its footer says')
      self._kept[group] = table.column(0)
      # Oldest first in the dict, to whose end each use moves a group.
      while len(self._kept) > 1 and sum(
          values.nbytes for values in self._kept.values()) > _KEPT_BYTES:
        self._kept.popitem(last=False)
    self._kept.move_to_end(group)
    return self._kept[group]


@contextlib.contextmanager
def _opened(file: pathlib.Path) -> Iterator[Any]:
  """Opens a file with pyarrow; every error is a ValueError that names it."""
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as error:
    raise ValueError('parquet files need pyarrow, which is not installed: '
                     'pip install pyarrow') from error
  try:
    with parquet.ParquetFile(file) as opened:
      yield opened
  except (OSError, ValueError, pyarrow.ArrowException) as error:
    raise ValueError(f'{file} is no .parquet of images: {error}') from error


def _image_column(schema: Any) -> str:
  for field in schema:
    kind = str(field.type)
    if kind in ('binary', 'large_binary') or 'bytes: binary' in kind:
      return field.name
  raise ValueError(f'no column of encoded images, only {schema.names}')
