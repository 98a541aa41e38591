"""Checkpoints of the hub: what is fetched, from where, and what is refused.

By a stand-in for huggingface_hub, which `make test` does not install; the last
tests are by itself, on a cache that the test makes.
"""

import os
import subprocess
import sys

import checkpoints
import families
import foreign
import hub_cache
import jax
import numpy as np
import pytest
import text_oracle

from msfp_jax import convert
from msfp_jax.convert import hub
from msfp_jax.convert import load

REPOSITORY = 'google/ddpm-tiny'
WEIGHTS = 'diffusion_pytorch_model.safetensors'
SCHEDULER = b'{"_class_name": "DDPMScheduler", "beta_end": 0.012}'


@pytest.fixture(autouse=True)
def fresh():
  hub.fetch.cache_clear()
  yield
  hub.fetch.cache_clear()


@pytest.fixture
def connect(tmp_path, monkeypatch):
  """Puts a stand-in in place: connect({repository: files}) -> module."""
  def put(remote, **options):
    module = hub_cache.stand_in(tmp_path / 'cache', remote, **options)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', module)
    return module
  return put


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """{kind: (files, parameters)} of small models, as diffusers saves them."""
  found = {}
  for kind in ('diffusers', 'diffusers_shards', 'pipeline'):
    folder = tmp_path_factory.mktemp(kind) / 'model'
    checkpoints.SAVE[kind](folder, checkpoints.state_of('unet2d'),
                           families.CONFIGS['unet2d'])
    found[kind] = (hub_cache.files_in(folder),
                   convert.load_pretrained(str(folder))[1])
  return found


def assert_equal(params, expected):
  jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize('text, expected', [
    ('hf:a/b', ('a/b', '', None)),
    ('hf:a/b@v1.0', ('a/b', '', 'v1.0')),
    ('hf:a/b/unet', ('a/b', 'unet', None)),
    ('hf:a/b/c/d.ckpt@refs/pr/1', ('a/b', 'c/d.ckpt', 'refs/pr/1'))])
def test_references(text, expected):
  assert hub.is_reference(text) and hub.parse(text) == expected


@pytest.mark.parametrize('text', [
    'hf:', 'hf:a', 'hf:a/', 'hf:/b', 'hf:a/b@', 'hf:a//c', 'hf:a/b/',
    'hf:../b', 'hf:a/..', 'hf:a/b/../../c', 'hf:a/b/.'])
def test_no_references(text):
  with pytest.raises(ValueError, match='must be hf:OWNER/NAME'):
    hub.parse(text)


@pytest.mark.parametrize('path', [None, 'a/b', './hf:a/b', '/hf:a/b', 'HF'])
def test_files_of_this_machine_are_no_references(path):
  assert not hub.is_reference(path)


@pytest.mark.parametrize('kind', ['diffusers', 'diffusers_shards', 'pipeline'])
def test_only_what_is_read_is_downloaded(connect, saved, kind):
  files, expected = saved[kind]
  unread = {'README.md': b'x', 'a.ckpt': b'x', 'vae/' + WEIGHTS: b'x',
            'text_encoder/model.safetensors': b'x', 'text_encoder/config.json':
            b'x', 'diffusion_pytorch_model.fp16.safetensors': b'x',
            'diffusion_pytorch_model.non_ema.safetensors': b'x'}
  read = files | {'scheduler/scheduler_config.json': SCHEDULER}
  module = connect({REPOSITORY: unread | read})
  _, params = convert.load_pretrained(f'hf:{REPOSITORY}')
  assert_equal(params, expected)
  assert sorted(module.taken) == sorted(read)
  assert load.load_origin(f'hf:{REPOSITORY}').noise_schedule().betas[
      -1] == pytest.approx(0.012)


def test_a_text_encoder_of_a_pipeline(connect, tmp_path):
  """Alone, and in one of the forms that it is kept in."""
  state = text_oracle.state_of(text_oracle.clip_shapes(text_oracle.CLIP))
  files = hub_cache.files_in(
      text_oracle.write(tmp_path / 'x', text_oracle.CLIP, state))
  read = {f'text_encoder/{name}': x for name, x in files.items()}
  module = connect({REPOSITORY: read | {
      'text_encoder/pytorch_model.bin': b'x', 'vae/' + WEIGHTS: b'x',
      'text_encoder/model.fp16.safetensors': b'x'}})
  _, params = convert.load_text_encoder(f'hf:{REPOSITORY}')
  assert_equal(params, convert.load_text_encoder(tmp_path / 'x')[1])
  assert sorted(module.taken) == sorted(read)


def test_the_average_is_fetched_where_it_is_wanted(connect, saved):
  """And the weights where they are."""
  files, _ = saved['diffusers']
  remote = {f'{part}/{name}': content for part in ('unet', 'unet_ema')
            for name, content in files.items()}
  for ema, part in ((True, 'unet_ema'), (False, 'unet')):
    module = connect({REPOSITORY: remote})
    hub.fetch(f'hf:{REPOSITORY}', ('unet',), ema)
    assert f'{part}/{WEIGHTS}' in module.taken
    assert len([n for n in module.taken if n.endswith('.safetensors')]) == 1


def test_a_file_and_a_folder_of_a_repository(connect, saved):
  files, expected = saved['diffusers']
  remote = {f'deep/unet/{name}': content for name, content in files.items()}
  connect({REPOSITORY: remote | {'other.ckpt': b'x'}}, revision='v2')
  for path in ('deep', 'deep/unet', f'deep/unet/{WEIGHTS}'):
    assert_equal(convert.load_pretrained(
        f'hf:{REPOSITORY}/{path}@v2')[1], expected)


def test_a_first_stage(connect, tmp_path):
  folder, config = tmp_path / 'vae', families.STAGES['kl']
  folder.mkdir()
  checkpoints.write(folder / WEIGHTS, foreign.diffusers_first_stage(
      families.state_of(config), config))
  (folder / 'config.json').write_text(
      '{"_class_name": "AutoencoderKL", "scaling_factor": 0.5}')
  expected = convert.load_first_stage(str(folder))[1]
  module = connect({REPOSITORY: {
      f'vae/{name}': content
      for name, content in hub_cache.files_in(folder).items()} | {
          f'unet/{WEIGHTS}': b'x'}})
  assert_equal(convert.load_first_stage(f'hf:{REPOSITORY}')[1], expected)
  assert f'unet/{WEIGHTS}' not in module.taken


def test_a_repository_without_weights_by_those_names(connect):
  connect({REPOSITORY: {'v1.ckpt': b'x', 'README.md': b'x'}})
  with pytest.raises(FileNotFoundError, match=r"name one .*\['v1.ckpt'\]"):
    convert.load_pretrained(f'hf:{REPOSITORY}')
  connect({REPOSITORY: {'README.md': b'x'}})
  with pytest.raises(FileNotFoundError, match='nor any others'):
    convert.load_pretrained(f'hf:{REPOSITORY}')


def test_without_a_network_the_cache_serves_and_the_log_says_so(
    connect, saved, tmp_path, caplog):
  files, expected = saved['diffusers']
  hub_cache.fill(tmp_path / 'cache', REPOSITORY, files)
  connect(None)
  assert_equal(convert.load_pretrained(f'hf:{REPOSITORY}')[1], expected)
  assert 'not reached (no route to the hub); taken from the cache' in (
      caplog.text)


@pytest.mark.parametrize('remote', [None, {}], ids=['offline', 'unknown'])
def test_what_is_nowhere_is_refused_with_the_path_that_would_do(
    connect, tmp_path, remote):
  connect(remote)
  with pytest.raises(FileNotFoundError) as error:
    convert.load_pretrained(f'hf:{REPOSITORY}/unet@v2')
  message = str(error.value)
  reason = 'no route to the hub' if remote is None else '404'
  for part in (reason, str(tmp_path / 'cache'), 'pass FOLDER/unet instead',
               f'hf download {REPOSITORY} --revision v2 --local-dir FOLDER'):
    assert part in message
  assert 'more lines' not in message


def test_without_the_library_it_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  for read in (convert.load_pretrained, convert.load_first_stage,
               convert.load_origin):
    with pytest.raises(ValueError, match='pip install .*msfp-jax.hub.*or '
                       f'download it .*hf download {REPOSITORY}'):
      read(f'hf:{REPOSITORY}')


READ = '''
import sys
from msfp_jax import convert
try:
  model, params = convert.load_pretrained(sys.argv[1])
  print(model.sample_shape)
except FileNotFoundError as error:
  print(error)
'''


def read_in_a_process(text, **environment):
  """Loads a model where the library sees these variables from the start."""
  here = os.path.dirname(os.path.dirname(__file__))
  return subprocess.run(
      [sys.executable, '-c', READ, text], text=True, capture_output=True,
      check=True, timeout=300, cwd=here,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'} | environment)


@pytest.mark.parity
@pytest.mark.parametrize('kind', ['diffusers', 'pipeline'])
def test_the_library_itself_offline(tmp_path, saved, kind):
  pytest.importorskip('huggingface_hub')
  hub_cache.fill(tmp_path / 'hub', REPOSITORY, saved[kind][0])
  environment = {'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1'}
  found = read_in_a_process(f'hf:{REPOSITORY}', **environment)
  assert found.stdout.startswith('('), found.stdout + found.stderr
  assert 'taken from the cache' in found.stderr
  absent = read_in_a_process('hf:google/absent', **environment).stdout
  assert f'not in the cache, {tmp_path}/hub' in absent
  assert 'hf download google/absent --local-dir FOLDER' in absent


@pytest.mark.parity
def test_the_library_itself_downloads_and_then_needs_no_hub(tmp_path, saved):
  """From a server of this machine; what is not read stays there."""
  pytest.importorskip('huggingface_hub')
  files = saved['diffusers_shards'][0]
  server, address, downloaded = hub_cache.serve(
      REPOSITORY, files | {'README.md': b'x', 'model.ckpt': b'x'})
  environment = {'HF_HOME': str(tmp_path), 'HF_ENDPOINT': address}
  try:
    first = read_in_a_process(f'hf:{REPOSITORY}', **environment)
    assert first.stdout.startswith('('), first.stdout + first.stderr
    assert sorted(downloaded) == sorted(files)
    read_in_a_process(f'hf:{REPOSITORY}', **environment)
    assert len(downloaded) == len(files)  # the cache has them
  finally:
    server.shutdown()
    server.server_close()
  again = read_in_a_process(f'hf:{REPOSITORY}', **environment)
  assert again.stdout == first.stdout
  assert 'taken from the cache' in again.stderr
