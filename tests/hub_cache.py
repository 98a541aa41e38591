"""The hub: its cache on the disk, a stand-in for its library, a small server.
"""

import fnmatch
import hashlib
import http.server
import json
import os
import pathlib
import threading
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


def serve(repository, files):
  """Starts a server that answers as the hub does for one repository.

  Args:
    repository: OWNER/NAME.
    files: {path: bytes}.

  Returns:
    (server, its address, list that grows by the paths of files downloaded).
  """
  downloaded = []
  api, resolve = f'/api/models/{repository}', f'/{repository}/resolve/{COMMIT}/'
  etag = lambda name: hashlib.sha1(files[name]).hexdigest()

  class Handler(http.server.BaseHTTPRequestHandler):

    def do_GET(self):
      path = self.path.split('?')[0]
      name = path.removeprefix(resolve)
      if path in (api, f'{api}/revision/main'):
        self._answer(json.dumps({
            'id': repository, 'sha': COMMIT,
            'siblings': [{'rfilename': name} for name in files]}).encode())
      elif path.startswith(f'{api}/tree/'):
        self._answer(json.dumps([
            {'type': 'file', 'path': name, 'size': len(content),
             'oid': etag(name)} for name, content in files.items()]).encode())
      elif path.startswith(resolve) and name in files:
        if self.command == 'GET':
          downloaded.append(name)
        self._answer(files[name], ETag=f'"{etag(name)}"')
      else:
        self._answer(b'{}', 404)

    do_HEAD = do_GET

    def _answer(self, content, status=200, **headers):
      self.send_response(status)
      for key, value in ({'Content-Length': str(len(content)),
                          'X-Repo-Commit': COMMIT} | headers).items():
        self.send_header(key, value)
      self.end_headers()
      if self.command == 'GET':
        self.wfile.write(content)

    def log_message(self, *args):
      """Says nothing."""

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  return server, f'http://127.0.0.1:{server.server_port}', downloaded
