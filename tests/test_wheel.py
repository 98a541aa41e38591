"""The wheel alone, in an empty folder: what it holds, and that it runs.

It is built and installed without a network; the libraries are those of the
environment.
"""

import importlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import children
import pytest
import safetensors

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'msfp_jax',
           'configs', 'tests/requirements.txt')
NAMES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py')
               if path.stem != 'common')
PIP = ('-m', 'pip', '--disable-pip-version-check')


def call(*arguments, cwd, **environment):
  """Runs Python; returns what it printed."""
  finished = subprocess.run(
      [sys.executable, *map(str, arguments)], cwd=cwd, text=True,
      capture_output=True, timeout=600, check=False,
      env=children.compiling_fast(**environment))
  assert finished.returncode == 0, finished.stderr[-4000:]
  return finished.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """The wheel of a copy of the sources: building leaves files beside them."""
  copy, out = tmp_path_factory.mktemp('copy'), tmp_path_factory.mktemp('wheel')
  requirements = [path.name for path in ROOT.glob('requirements*.txt')]
  for name in (*SOURCES, *requirements):
    (copy / name).parent.mkdir(exist_ok=True)
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, copy / name,
                      ignore=shutil.ignore_patterns('__pycache__'))
    else:
      shutil.copy(ROOT / name, copy / name)
  call(*PIP, 'wheel', '--no-build-isolation', '--no-deps', '--no-index',
       f'--wheel-dir={out}', copy, cwd=copy)
  found, = out.glob('msfp_jax-*.whl')
  return found


@pytest.fixture(scope='module')
def run(wheel, tmp_path_factory):
  """Runs Python with the installed wheel, in an empty folder."""
  target = tmp_path_factory.mktemp('target')
  call(*PIP, 'install', '--no-deps', '--no-index', f'--target={target}', wheel,
       cwd=target)

  def run(cwd, *arguments, **environment):
    return call(*arguments, cwd=cwd, PYTHONPATH=str(target), **environment)

  folder = tmp_path_factory.mktemp('empty')
  where = run(folder, '-c', 'import msfp_jax; print(msfp_jax.__file__)')
  assert where.strip() == f'{target}/msfp_jax/__init__.py'
  return run


def files_below(folder):
  return {str(path.relative_to(folder)): path.read_bytes()
          for path in folder.rglob('*')
          if path.is_file() and '__pycache__' not in path.parts}


def test_the_wheel_holds_the_package_and_the_configs(wheel):
  """Every file of both, as it is, and no other package."""
  expected = {f'msfp_jax/{name}': content
              for name, content in files_below(ROOT / 'msfp_jax').items()}
  expected |= {f'msfp_jax/configs/{name}': content
               for name, content in files_below(ROOT / 'configs').items()}
  with zipfile.ZipFile(wheel) as opened:
    found = {name: opened.read(name) for name in opened.namelist()
             if '.dist-info/' not in name}
    metadata, = (opened.read(name).decode() for name in opened.namelist()
                 if name.endswith('.dist-info/METADATA'))
  assert found.keys() == expected.keys()
  assert found == expected
  required = {line for line in (ROOT / 'requirements.txt').read_text(
      ).splitlines() if line and not line.startswith('#')}
  stated = re.findall(r'^Requires-Dist: ([^;\n]+)$', metadata, flags=re.M)
  split = lambda line: tuple(sorted(re.split(r'(?=[<>]=?)|,', line)))
  assert {*map(split, stated)} == {*map(split, required)}


@pytest.mark.slow
def test_the_shipped_configs_are_the_repositorys(run, tmp_path):
  """As --config reads them, where there is no folder configs/."""
  found = json.loads(run(tmp_path, '-c', (
      'import json, sys\n'
      'from absl import flags\n'
      'from msfp_jax.run import config_files\n'
      'config_files.define()\n'
      'parse = flags.FLAGS["config"].parser.parse\n'
      'print(json.dumps({name: parse(f"configs/{name}.py:w6a6")'
      '.to_json_best_effort() for name in sys.argv[1:]}))'), *NAMES))
  assert found == {
      name: importlib.import_module(f'configs.{name}').get_config(
          'w6a6').to_json_best_effort() for name in NAMES}


@pytest.mark.long
def test_readmes_lines(run, tmp_path):
  """Compiled as users' programs are, without any flag of the tests."""
  readme = (ROOT / 'README.md').read_text()
  code, = re.findall(r'^```python\n(.*?)^```$', readme, flags=re.M | re.S)
  (tmp_path / 'lines.py').write_text(code)
  shown = run(tmp_path, 'lines.py', XLA_FLAGS='')
  assert shown.strip() == '(64, 16, 16, 1) UE2M2'
  assert (tmp_path / 'digits.safetensors').is_file()


@pytest.mark.slow
def test_train_and_eval(run, tmp_path):
  """The shipped model, its classifier and the report's templates are there."""
  arguments = (
      '--workdir=runs/demo', '--config.finetune.num_updates=0',
      '--config.sampler.num_steps=4', '--config.calibrate.batch_size=4',
      '--config.calibrate.num_batches=1', '--config.eval.num_samples=128',
      '--config.eval.batch_size=128', '--config.eval.rows=fp',
      '--config.quant.recipe=nvfp4')
  run(tmp_path, '-m', 'msfp_jax.train', '--config=digits.py:demo', *arguments)
  shown = run(tmp_path, '-m', 'msfp_jax.eval',
              '--config=configs/digits.py:demo', *arguments)
  assert '| fp' in shown and 'fd_digits' in shown
  work = tmp_path / 'runs/demo'
  assert {'fp'} == {row['name'] for row in json.loads(
      (work / 'results.json').read_text())['rows']}
  assert '</html>' in (work / 'report.html').read_text()
  with safetensors.safe_open(work / 'packed.safetensors', 'np') as opened:
    command = opened.metadata()['command']
  assert command.startswith(
      'python -m msfp_jax.train --config=digits.py:demo --workdir=runs/demo')


@pytest.mark.long
def test_the_other_commands(run, tmp_path):
  assert '| `ssim_to_fp` | high |' in run(tmp_path, '-m', 'msfp_jax.metrics')
  assert 'ends-8' in run(tmp_path, '-c', (
      'from msfp_jax.run import study\n'
      'print(*study.load_study("configs/digits.py:table")[1]["groups"])'))
  run(tmp_path, '-m', 'msfp_jax.convert', 'digits16', 'mine.safetensors')
  assert (tmp_path / 'mine.safetensors').stat().st_size > 2_000_000
