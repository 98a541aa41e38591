"""Checkpoints of the Hugging Face Hub: hf:OWNER/NAME[/PATH][@REVISION].

PATH is a folder or a file of the repository. Of it only what an import reads
is downloaded: of the forms in which a hub keeps the same weights, one.
huggingface_hub, which this needs, keeps its own cache (HF_HOME), takes the
token from its own places (HF_TOKEN, `hf auth login`) and shows its own
progress.
"""

from collections.abc import Callable, Collection
import functools
import os
import pathlib
from pathlib import PurePosixPath
from typing import NamedTuple

from absl import logging

from msfp_jax.convert import source

PREFIX = 'hf:'
_CONFIGS = ('config.json', 'scheduler_config.json', 'model_index.json')
_SECONDS = 10  # for the hub's first answer, before the cache is asked
_WEIGHT_SUFFIXES = ('.safetensors', '.ckpt', '.pth', '.pt', '.bin')


class Reference(NamedTuple):
  """What hf:OWNER/NAME[/PATH][@REVISION] says; '' and None of what it does not.
  """

  repository: str
  path: str
  revision: str | None


def is_reference(path: str | os.PathLike | None) -> bool:
  """Whether a path is one of the hub's, and not of this machine."""
  return path is not None and os.fspath(path).startswith(PREFIX)


def parse(text: str) -> Reference:
  """Takes a reference apart.

  Raises:
    ValueError: it is none.
  """
  name, at, revision = text.removeprefix(PREFIX).partition('@')
  owner, *rest = name.split('/')
  # Neither may lead out of the repository's folder.
  if not rest or (at and not revision) or {'', '.', '..'} & {owner, *rest}:
    raise ValueError(f'{text}: must be {PREFIX}OWNER/NAME[/PATH][@REVISION], '
                     f'such as {PREFIX}google/ddpm-cifar10-32')
  return Reference(f'{owner}/{rest[0]}', '/'.join(rest[1:]), revision or None)


# One answer a process: a branch may move while a run reads it in parts.
@functools.cache
def fetch(text: str, parts: tuple[str, ...] = (), ema: bool = True
          ) -> pathlib.Path:
  """Downloads what an import needs, or finds it in the hub's cache.

  Args:
    text: the reference.
    parts: as of `source.open_source`.
    ema: likewise.

  Returns:
    As `fetch_files`.

  Raises:
    As `fetch_files`.
  """
  return fetch_files(
      text, lambda path, names: _wanted(text, path, names, parts, ema))


def fetch_files(text: str, choose: Callable[[str, Collection[str]], list[str]]
                ) -> pathlib.Path:
  """Downloads files of a repository, or finds them in the hub's cache.

  Args:
    text: the reference.
    choose: (the reference's path, names of all files) -> those that are
      wanted; with an index of shards these are taken too. It may refuse.

  Returns:
    The file or folder in the cache, to be opened as any other.

  Raises:
    ValueError: no reference, or no huggingface_hub.
    FileNotFoundError: not there, or not reached and not in the cache; the
      message says what to do instead.
  """
  reference = parse(text)
  try:
    import huggingface_hub
  except ImportError as error:
    raise ValueError(
        f'{text} needs huggingface_hub, which is not installed: pip install '
        f"'msfp-jax[hub]' or huggingface_hub; or {_by_hand(reference)}"
    ) from error
  where = {'repo_id': reference.repository, 'revision': reference.revision}
  try:
    # Unlike a list of the files alone this is tried once: a machine without a
    # network is told at once.
    info = huggingface_hub.HfApi().model_info(**where, timeout=_SECONDS)
    names = [file.rfilename for file in info.siblings]
  # Of many kinds, with the library's version: no network, switched off by
  # HF_HUB_OFFLINE, a name or a revision that is not there, a token that lacks.
  except Exception as error:
    return _cached(huggingface_hub, text, reference, error) / reference.path
  try:
    wanted = choose(reference.path, frozenset(names))
    folder = pathlib.Path(huggingface_hub.snapshot_download(
        **where, allow_patterns=wanted))
    for index in (name for name in wanted if '.index.' in name):
      shards = [str(PurePosixPath(index).with_name(name))
                for name in source.shard_names(folder / index)]
      huggingface_hub.snapshot_download(**where, allow_patterns=shards)
  except (ValueError, FileNotFoundError):
    raise
  except Exception as error:
    raise FileNotFoundError(
        f'{text}: the download failed ({_reason(error)}); the same command '
        f'goes on with it; or {_by_hand(reference)}') from error
  logging.info('%s: %s', text, folder)
  return folder / reference.path


def _cached(huggingface_hub, text: str, reference: Reference,
            error: Exception) -> pathlib.Path:
  """The repository's folder in the cache, for want of the hub."""
  try:
    folder = huggingface_hub.snapshot_download(
        repo_id=reference.repository, revision=reference.revision,
        local_files_only=True)
  except Exception as absent:
    # It misses the files that no import reads; what is there is known.
    folder = getattr(absent, 'snapshot_path', None)
    if folder is None:
      raise FileNotFoundError(
          f'{text} cannot be had from the hub ({_reason(error)}), and is not '
          f'in the cache, {huggingface_hub.constants.HF_HUB_CACHE}: '
          f'{_by_hand(reference)}. A private or gated one needs '
          '`hf auth login` or HF_TOKEN') from error
  logging.warning('%s: the hub was not reached (%s); taken from the cache, %s',
                  text, _reason(error), folder)
  return pathlib.Path(folder)


def _reason(error: Exception) -> str:
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return lines[0] if lines else type(error).__name__


def _by_hand(reference: Reference) -> str:
  revision = f' --revision {reference.revision}' if reference.revision else ''
  path = '/'.join(filter(None, ('FOLDER', reference.path)))
  return (f'download it where there is a network, `hf download '
          f'{reference.repository}{revision} --local-dir FOLDER`, and pass '
          f'{path} instead')


def _wanted(text: str, path: str, names: Collection[str],
            parts: tuple[str, ...], ema: bool) -> list[str]:
  """The files of a repository that an import of `path` reads, shards aside."""
  weights = weights_in(text, path, names, parts, ema)
  beside = weights.parent
  folders = {beside, PurePosixPath(path), beside / 'scheduler',
             beside.parent / 'scheduler'}
  return sorted({str(weights)} | {
      name for name in names if PurePosixPath(name).parent in folders
      and (PurePosixPath(name).name in _CONFIGS or name.endswith('.yaml'))})


def weights_in(text: str, path: str, names: Collection[str],
               parts: tuple[str, ...] = (), ema: bool = True
               ) -> PurePosixPath:
  """The file with the weights among those of a repository, or its index.

  Args:
    text: the reference, for messages.
    path: of the file, or of a folder.
    names: of all files.
    parts: as of `source.open_source`.
    ema: likewise.

  Raises:
    FileNotFoundError: there is none; names others that there are.
  """
  if path in names:
    return PurePosixPath(path)
  found = next((file for file, _ in source.candidates(
      PurePosixPath(path), parts, ema) if str(file) in names), None)
  if found is None:
    others = sorted(name for name in names if name.endswith(_WEIGHT_SUFFIXES))
    raise FileNotFoundError(
        f"{text}: no weights there under diffusers' names"
        + (f'; name one of its files, such as {others[:5]}, as PATH in '
           f'{PREFIX}OWNER/NAME/PATH' if others else
           ', nor any others in the repository'))
  return found
