"""Which Python the Makefile takes, and which it refuses."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# A Python of another version, which makes no environments but notes calls.
FAKE = '''#!/bin/sh
echo "$0 $*" >> {calls}
[ "$1" = -c ] || exit 0
code=$2; shift 2
exec {python} -c "import sys; sys.version_info = ({version}, 0, 'final', 0)
$code" "$@"
'''

pytestmark = pytest.mark.skipif(
    not shutil.which('make'), reason='there is no make')


@pytest.fixture
def fake(tmp_path):
  """Makes a Python of a version, by name, in tmp_path; returns its path."""
  def make(name, version):
    path = tmp_path / name
    path.write_text(FAKE.format(calls=tmp_path / 'calls', python=sys.executable,
                                version=version))
    path.chmod(0o755)
    return path

  return make


def setup(tmp_path, *arguments, **environment):
  """Runs `make setup` for an environment that is not there yet."""
  # Not as a part of the make that runs the tests, nor with its variables.
  own = {name: value for name, value in os.environ.items()
         if not name.startswith(('MAKE', 'MFLAGS'))
         and name not in ('PYTHON', 'JAX_EXTRA')}
  return subprocess.run(
      ['make', 'setup', f'VENV={tmp_path}/venv', *arguments], cwd=ROOT,
      text=True, capture_output=True, timeout=60, check=False,
      env=own | environment)


def makes_environment(tmp_path, python):
  return f'{python} -m venv {tmp_path}/venv\n' in (
      tmp_path / 'calls').read_text()


@pytest.mark.parametrize('version', ['3, 8', '3, 10', '3, 14', '4, 0'])
def test_a_python_that_is_not_known_to_work_is_refused(
    tmp_path, fake, version):
  python = fake('mine', version)
  finished = setup(tmp_path, f'PYTHON={python}')
  assert finished.returncode
  sentence, stopped = finished.stderr.splitlines()
  found = version.replace(', ', '.')
  assert f'{python} is Python {found}, and 3.11 to 3.13' in sentence
  assert 'PYTHON=' in sentence and stopped.startswith('make')
  assert not makes_environment(tmp_path, python)


@pytest.mark.parametrize('version', ['3, 11', '3, 12', '3, 13'])
def test_a_python_that_is_known_to_work_is_taken(tmp_path, fake, version):
  python = fake('mine', version)
  setup(tmp_path, f'PYTHON={python}')
  assert makes_environment(tmp_path, python)


@pytest.mark.parametrize('there, taken', [
    ({'python3.11': '3, 11', 'python3.12': '3, 12', 'python3.13': '3, 13',
      'python3': '3, 13'}, 'python3.12'),
    ({'python3.11': '3, 11', 'python3.13': '3, 13', 'python3': '3, 10'},
     'python3.13'),
    ({'python3.13': '3, 13', 'python3': '3, 14'}, 'python3.13'),
    ({'python3': '3, 13'}, 'python3'),
])
def test_the_python_that_is_taken_of_itself(tmp_path, fake, there, taken):
  """With those of this machine out of the way, as a version manager's are."""
  for name in ('python3.11', 'python3.12', 'python3.13', 'python3'):
    fake(name, there.get(name, '3, 6'))
  path = f'{tmp_path}:{os.environ["PATH"]}'
  assert re.search(f'^{re.escape(taken)} -m venv ', setup(
      tmp_path, '--dry-run', PATH=path).stdout, flags=re.M)


@pytest.mark.parametrize('version', ['3, 10', '3, 14'])
def test_no_python_that_serves(tmp_path, fake, version):
  for name in ('python3.11', 'python3.12', 'python3.13', 'python3'):
    fake(name, version)
  finished = setup(tmp_path, PATH=f'{tmp_path}:{os.environ["PATH"]}')
  assert finished.returncode and 'No Python 3.11 to 3.13' in finished.stdout


def test_versions_are_said_the_same_everywhere():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  stated = [line.rpartition(' ')[2] for line in project['classifiers']
            if re.search(r':: 3\.\d+$', line)]
  first, last = stated[0], stated[-1]
  assert project['requires-python'] == f'>={first}'
  ci = (ROOT / '.github/workflows/ci.yml').read_text()
  assert f'python-version: {stated}' in ci
  for name in ('README.md', 'CONTRIBUTING.md', 'docs/usage.md', 'Makefile'):
    text = ' '.join((ROOT / name).read_text().split())
    assert f'Python {first} to {last}' in text, name
  makefile = (ROOT / 'Makefile').read_text()
  for checked in (r'found < \((\d+), (\d+)\) or found > \((\d+), (\d+)\)',
                  r'\((\d+), (\d+)\) <= \S+ <= \((\d+), (\d+)\)'):
    a, b, c, d = re.search(checked, makefile).groups()
    assert [f'{a}.{b}', f'{c}.{d}'] == [first, last]
