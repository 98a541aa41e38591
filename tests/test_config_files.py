"""Which file --config names, and what configs import from each other."""

import pathlib
import runpy
import sys

from absl import flags
from ml_collections import config_flags
import pytest

from configs import digits
from msfp_jax.run import config_files

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
  """As a fresh process in an empty folder, which `python -m` looks in first."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'meta_path', [*sys.meta_path])
  monkeypatch.setattr(sys, 'path', [
      str(tmp_path), *(path for path in sys.path
                       if path and pathlib.Path(path).resolve() != ROOT)])
  for name in [*sys.modules]:
    if name.partition('.')[0] == 'configs':
      monkeypatch.delitem(sys.modules, name)
  yield tmp_path
  # What was imported here is no other test's.
  for name in [*sys.modules]:
    if name.partition('.')[0] == 'configs':
      del sys.modules[name]


def write(path, text):
  path.parent.mkdir(exist_ok=True)
  path.write_text(text)


def load(text):
  return runpy.run_path(config_files.find(text).partition(':')[0])


def test_all_experiments_of_the_folder_are_shipped():
  files = {path.stem for path in (ROOT / 'configs').glob('*.py')}
  assert {*config_files.names()} == files - {'common'}
  assert 'digits' in files


@pytest.mark.parametrize('path', [
    'configs/digits.py', './configs/digits.py', 'digits.py', 'digits'])
@pytest.mark.parametrize('words', ['', ':demo', ':recipe=msfp,w4a4', ':'])
def test_names_of_a_shipped_config(elsewhere, path, words):
  assert config_files.find(path + words) == (
      f'{ROOT}/configs/digits.py{words}')


@pytest.mark.parametrize('path', ['configs/digits.py', 'digits.py', 'digits'])
def test_a_file_that_is_there_wins(elsewhere, path):
  write(elsewhere / path, 'mine = True')
  assert config_files.find(f'{path}:demo') == f'{path}:demo'
  assert load(path)['mine']


@pytest.mark.parametrize('path', [
    'configs/digit.py', 'other/digits.py', '/configs/digits.py', 'digits.txt',
    'configs/digits', 'configs/common.py', 'common', 'configs', ''])
def test_what_is_no_config_is_told_which_there_are(elsewhere, path):
  (elsewhere / 'configs').mkdir()
  with pytest.raises(FileNotFoundError) as error:
    config_files.find(f'{path}:demo')
  message = str(error.value)
  assert repr(path) in message
  for name in config_files.names():
    assert f'configs/{name}.py' in message


def test_every_shipped_config_finds_those_it_imports(elsewhere):
  for name in config_files.names():
    assert load(name)['get_config']().eval.num_samples > 0


@pytest.mark.parametrize('package', ['', 'raise SystemExit("another package")'])
def test_shipped_configs_mean_each_other(elsewhere, package):
  """Though the current folder has some other project's."""
  write(elsewhere / 'configs/common.py', 'raise SystemExit("another common")')
  if package:
    write(elsewhere / 'configs/__init__.py', package)
  assert load('configs/digits.py')['get_config']('demo').pretrained


def test_a_config_of_the_users_imports_its_neighbours_and_the_shipped(
    elsewhere):
  write(elsewhere / 'configs/mine.py',
        'from configs import common, digits, images\n'
        'config = common.get_config()')
  write(elsewhere / 'configs/images.py', 'neighbour = True')
  found = load('configs/mine.py')
  assert found['images'].neighbour
  assert found['digits'].__file__ == f'{ROOT}/configs/digits.py'
  assert found['config'].seed == 0


def test_a_config_anywhere_imports_the_shipped(elsewhere):
  """And a shipped one that was found before takes nothing from it."""
  load('digits')
  for name in [*sys.modules]:
    if name.partition('.')[0] == 'configs':
      del sys.modules[name]
  write(elsewhere / 'configs/images.py', 'neighbour = True')
  write(elsewhere / 'mine.py', 'from configs import digits, images')
  found = load('mine.py')
  assert found['images'].neighbour
  assert found['digits'].__file__ == f'{ROOT}/configs/digits.py'


@pytest.mark.parametrize('given, meant', [
    ('fp,msfp:w6a6,tuned', ('fp', 'msfp:w6a6', 'tuned')),
    ('all:w6a6', ('all:w6a6',)), ('fp, msfp+gptq', ('fp', 'msfp+gptq')),
    ('fp', ('fp',)), ("('fp', 'int')", ('fp', 'int')), ('()', ()),
    ("'fp,int'", ('fp,int',))])
@pytest.mark.parametrize('field', ['eval.rows', 'eval.more_features'])
@pytest.mark.parametrize('between', ['=', None])
def test_lists_of_names_need_no_quotes(
    given, meant, field, between, monkeypatch):
  """As ml_collections reads what is left of them."""
  value = [f'--config.{field}={given}'] if between else [
      f'--config.{field}', given]
  argv = config_files.quote_lists(
      ['eval.py', *value, '--config.seed=3'])
  monkeypatch.setattr(sys, 'argv', argv)
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict(
      'config', digits.get_config(), flag_values=values)
  values(argv)
  assert values.config.eval[field.removeprefix('eval.')] == meant
  assert values.config.seed == 3


def test_other_flags_stay_as_they_were_typed():
  argv = ['x', '--config.eval.reference=a,b', "--config.eval.rows=('fp'",
          'fp,a:b']
  assert config_files.quote_lists(argv) == argv
