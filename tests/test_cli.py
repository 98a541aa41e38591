"""The entry points as a shell sees them: exit status, stderr, no traceback."""

import json
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest

from configs import digits
from msfp_jax.base import errors
from msfp_jax.run import cli
from msfp_jax.run import references
from msfp_jax.tune import checkpoint

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments, **environment):
  return subprocess.run(
      [sys.executable, *map(str, arguments)], cwd=ROOT, text=True,
      capture_output=True, timeout=300, check=False,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'} | environment)


def assert_refused(finished, *parts):
  """Checks that a command fails with a message of these parts, no traceback."""
  assert finished.returncode not in (0, None)
  assert finished.stdout == ''
  assert 'Traceback' not in finished.stderr
  assert 'error: ' in finished.stderr
  for part in parts:
    assert part in finished.stderr


def test_a_misspelt_field_suggests_the_right_one(tmp_path):
  assert_refused(
      run('train.py', '--config=configs/digits.py', f'--workdir={tmp_path}/w',
          '--config.finetune.num_upates=3'),
      'num_upates', 'num_updates')
  assert not (tmp_path / 'w').exists()


@pytest.mark.slow
@pytest.mark.parametrize('variant, parts', [
    ('tabel', ("'tabel'", 'w4a4', 'skip-8', 'untuned')),
    ('w4a9', ("'w4a9'", '3 to 8')),
])
def test_an_unknown_variant(tmp_path, variant, parts):
  assert_refused(run('train.py', f'--config=configs/digits.py:{variant}',
                     f'--workdir={tmp_path}/w'), *parts)
  assert not (tmp_path / 'w').exists()


def test_a_config_that_is_not_there(tmp_path):
  """The shipped ones are listed, in one line."""
  finished = run('eval.py', '--config=configs/digit.py',
                 f'--workdir={tmp_path}/w')
  names = [path.stem for path in (ROOT / 'configs').glob('*.py')
           if path.stem != 'common']
  assert_refused(finished, "'configs/digit.py'",
                 *(f'configs/{name}.py' for name in names))
  assert [line.partition(' ')[0] for line in finished.stderr.splitlines()] == [
      'error:', '--help']


@pytest.mark.slow
@pytest.mark.parametrize('program', ['train.py', 'eval.py'])
def test_no_workdir(program):
  assert_refused(run(program, '--config=configs/digits.py'), '--workdir')


@pytest.mark.long
def test_statistics_of_images_are_written(tmp_path):
  path = tmp_path / 'digits.npz'
  finished = run('eval.py', '--make_stats=digits', f'--output={path}',
                 '--features=digits', '--vectors=5')
  assert finished.returncode == 0, finished.stderr
  assert "1,797 images of (16, 16, 1), features 'digits'" in finished.stdout
  with np.load(path) as arrays:
    assert arrays['mu'].shape == (64,) and arrays['vectors'].shape == (5, 64)


@pytest.mark.long
@pytest.mark.parametrize('arguments, part', [
    (['--make_stats=digits'], '--output'),
    (['--make_stats=nowhere', '--output=x.npz'], 'no images at nowhere'),
])
def test_statistics_that_cannot_be_made(arguments, part):
  assert_refused(run('eval.py', *arguments), part)


def test_statistics_need_weights_that_are_there(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere.pth'):
    references.run('digits', str(tmp_path / 'x.npz'), 'inception',
                   weights='nowhere.pth')
  assert not [*tmp_path.iterdir()]


@pytest.mark.long
def test_a_workdir_below_a_file(tmp_path):
  (tmp_path / 'file').write_text('here')
  assert_refused(run('train.py', '--config=configs/digits.py',
                     f'--workdir={tmp_path}/file/sub'),
                 f'{tmp_path}/file/sub', 'Not a directory')
  assert (tmp_path / 'file').read_text() == 'here'


@pytest.mark.long
def test_a_workdir_of_another_config(tmp_path):
  config = digits.get_config()
  config.seed = 5
  text = config.to_json_best_effort()
  (tmp_path / 'config.json').write_text(text)
  (tmp_path / 'quant_spec.json').write_text('{}')
  command = ['--config=configs/digits.py', f'--workdir={tmp_path}']
  assert_refused(run('train.py', *command), str(tmp_path), '--workdir',
                 'seed: 5 there, 0 now')
  assert (tmp_path / 'config.json').read_text() == text
  shown = run('train.py', *command, MSFP_TRACEBACK='1')
  assert shown.returncode != 0 and 'Traceback' in shown.stderr


@pytest.mark.slow
def test_eval_before_train(tmp_path):
  assert_refused(run('eval.py', '--config=configs/digits.py',
                     f'--workdir={tmp_path}/w'),
                 f'{tmp_path}/w', 'run train.py')


@pytest.mark.long
@pytest.mark.parametrize('arguments, parts', [
    (['--config=configs/digits.py:tabel'], ("'tabel'", 'table')),
    (['--config=configs/digits.py:table', '--seeds=1,x'], ('seeds', "'x'")),
])
def test_a_study_that_is_not_there(tmp_path, arguments, parts):
  assert_refused(run('-m', 'msfp_jax.run.study', *arguments,
                     f'--workdir={tmp_path}/w'), *parts)


def test_help_shows_both_flags():
  finished = run('train.py', '--help')
  assert '--config' in finished.stdout and '--workdir' in finished.stdout
  assert 'configs/digits.py:w4a4' in finished.stdout


@pytest.mark.parametrize('error', [
    ValueError('a b'), OSError('a b'), FileNotFoundError('a b'),
    errors.DivergedError('a b'), errors.WorkdirError('a b'),
    json.JSONDecodeError('a b', '', 0)])
def test_expected_errors_end_with_their_message(error):
  def work():
    raise error

  with pytest.raises(SystemExit) as stop:
    cli.guard(work)
  assert stop.value.code == f'error: {error}'


@pytest.mark.parametrize('error', [
    KeyError('a'), TypeError('a'), AssertionError('a')])
def test_mistakes_of_the_code_keep_their_traceback(error):
  def work():
    raise error

  with pytest.raises(type(error)):
    cli.guard(work)


def test_the_exit_code_of_a_stopped_run_passes():
  def work():
    raise checkpoint.Preempted(143)

  with pytest.raises(SystemExit) as stop:
    cli.guard(work)
  assert stop.value.code == 143


def test_the_result_passes():
  assert cli.guard(lambda: 7) == 7


@pytest.mark.slow
@pytest.mark.parametrize('program, field, value', [
    ('train.py', 'quant.recipe', 'x'), ('eval.py', 'eval.num_samples', 0)])
def test_what_cannot_be_run_ends_within_seconds(
    tmp_path, program, field, value):
  """Though the teacher of this config would be trained first, for long."""
  # Of the processor's time, which other processes do not lengthen.
  spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
  begin = spent()
  finished = run(program, '--config=configs/digits.py', '--config.pretrained=',
                 f'--workdir={tmp_path}/w', f'--config.{field}={value}')
  assert spent() - begin < 20
  assert finished.returncode == 1
  assert_refused(finished, f'config.{field}', 'must be')
  assert not [*tmp_path.iterdir()]
