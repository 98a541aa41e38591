"""Files of bounded size that hold a folder, for where only such come back."""

from collections.abc import Iterable
import hashlib
import io
import os
import pathlib
import re
import tarfile

MIB = 2**20
SIZE = 15 * MIB  # bytes of a piece, where nothing else is asked for
# Pythons before 3.11.4 have no filters; the pieces are our own.
_SAFELY = {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}
# GROUP.NUMBER.PIECE-PIECES.DIGEST, the digest of all pieces together.
_NAME = re.compile(r'(\w+)\.(\d+)\.(\d+)-(\d+)\.([0-9a-f]{8})')


def split(group: str, files: Iterable[pathlib.Path], root: pathlib.Path,
          target: pathlib.Path, compress: bool, size: int = SIZE) -> int:
  """Writes files into pieces, which replace those of the same group.

  The older ones go once the new ones are complete. Equal content is not written
  again, unless its pieces are of another size.

  Args:
    group: their name, a word.
    files: what is kept.
    root: the folder that their names are relative to.
    target: the folder of the pieces.
    compress: whether it is worth it.
    size: bytes of a piece at most.

  Returns:
    How many bytes the pieces have.
  """
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w:xz' if compress else 'w') as tar:
    for file in sorted(files):
      tar.add(file, file.relative_to(root), filter=_without_times)
  content = buffer.getvalue()
  digest = hashlib.sha256(content).hexdigest()[:8]
  old = _pieces(target).get(group, {})
  parts = [content[i:i + size] for i in range(0, len(content), size)]
  sizes = list(map(len, parts))
  if any(digest == earlier and sizes == [
      found[i].stat().st_size for i in sorted(found)]
         for (_, earlier, _), found in old.items()):
    return len(content)
  number = 1 + max((key[0] for key in old), default=0)
  target.mkdir(parents=True, exist_ok=True)
  for i, part in enumerate(parts):
    path = target / f'{group}.{number}.{i}-{len(parts)}.{digest}'
    temporary = path.with_name('tmp')
    temporary.write_bytes(part)
    os.replace(temporary, path)
  for earlier in old.values():
    for path in earlier.values():
      path.unlink()
  return len(content)


def join(source: pathlib.Path, root: pathlib.Path) -> list[str]:
  """Unpacks the newest complete pieces of every group; returns their groups.

  Raises:
    FileNotFoundError: there are none; incomplete ones are named.
  """
  found = []
  groups = _pieces(source)
  for group, sets in groups.items():
    for (_, digest, count), parts in sorted(sets.items(), reverse=True):
      content = b''.join(parts[i].read_bytes() for i in sorted(parts))
      if (len(parts) == count
          and hashlib.sha256(content).hexdigest()[:8] == digest):
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
          tar.extractall(root, **_SAFELY)
        found.append(group)
        break
  if not found:
    raise FileNotFoundError(
        f'no complete pieces in {source}: it holds those of {sorted(groups)}')
  return found


def _pieces(folder: pathlib.Path) -> dict[
    str, dict[tuple[int, str, int], dict[int, pathlib.Path]]]:
  """{group: {(number, digest, pieces): {piece: path}}} of a folder."""
  found = {}
  for path in sorted(folder.iterdir()) if folder.is_dir() else ():
    if match := _NAME.fullmatch(path.name):
      group, number, piece, count, digest = match.groups()
      found.setdefault(group, {}).setdefault(
          (int(number), digest, int(count)), {})[int(piece)] = path
  return found


def _without_times(info: tarfile.TarInfo) -> tarfile.TarInfo:
  """Of equal files come equal pieces."""
  info.mtime = 0
  info.uid = info.gid = 0
  info.uname = info.gname = ''
  return info


def largest(files: Iterable[pathlib.Path], size: int) -> list[pathlib.Path]:
  """The largest files that have `size` bytes together, at most."""
  chosen = []
  for file in sorted(files, key=lambda f: -f.stat().st_size):
    if file.stat().st_size <= size:
      chosen.append(file)
      size -= file.stat().st_size
  return chosen
