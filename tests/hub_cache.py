"""The hub's cache on the disk, and a stand-in for huggingface_hub."""

import fnmatch
import hashlib
import os
import pathlib
import types

COMMIT = '0123456789abcdef0123456789abcdef01234567'


def files_in(folder):
  """{path below the folder: bytes}."""
  folder = pathlib.Path(folder)
  return {path.relative_to(folder).as_posix(): path.read_bytes()
          for path in sorted(folder.rglob('*')) if path.is_file()}


def fill(cache, repository, files, revision='main'):
  """Writes files as huggingface_hub keeps them: blobs, and links to them."""
  root = pathlib.Path(cache) / f'models--{repository.replace("/", "--")}'
  snapshot = root / 'snapshots' / COMMIT
  for name, content in files.items():
    blob = root / 'blobs' / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link = snapshot / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
      link.symlink_to(os.path.relpath(blob, link.parent))
  ref = root / 'refs' / revision
  ref.parent.mkdir(parents=True, exist_ok=True)
  ref.write_text(COMMIT)
  return snapshot


def stand_in(cache, remote, revision='main'):
  """A module with what `convert.hub` uses of huggingface_hub.

  Args:
    cache: folder of the cache.
    remote: {repository: {path: bytes}}; None for no network.
    revision: the only one that there is.

  Returns:
    The module; `module.taken` lists what was downloaded.
  """
  module = types.ModuleType('huggingface_hub')
  module.taken = []
  module.constants = types.SimpleNamespace(HF_HUB_CACHE=str(cache))

  class HfApi:

    def model_info(self, repo_id, revision, timeout):
      if remote is None:
        raise ConnectionError('no route to the hub\nand more lines')
      if repo_id not in remote or revision not in (None, module.revision):
        raise LookupError(f'404: {repo_id} {revision}')
      return types.SimpleNamespace(siblings=[
          types.SimpleNamespace(rfilename=name) for name in remote[repo_id]])

  def snapshot_download(repo_id, revision, allow_patterns=None,
                        local_files_only=False):
    revision = revision or 'main'
    if local_files_only:
      root = pathlib.Path(cache) / f'models--{repo_id.replace("/", "--")}'
      if not (root / 'refs' / revision).is_file():
        raise FileNotFoundError('not in the cache')
      return str(root / 'snapshots' / (root / 'refs' / revision).read_text())
    matching = {
        name: content for name, content in remote[repo_id].items()
        if any(fnmatch.fnmatch(name, p) for p in allow_patterns)}
    module.taken += matching
    return str(fill(cache, repo_id, matching, revision))

  module.revision = revision
  module.HfApi, module.snapshot_download = HfApi, snapshot_download
  return module
