"""benchmarks.gpu's calls: limits, deaths, what is left and what goes on."""

import json
import subprocess
import sys
import time

import pytest

from benchmarks.gpu import runner
from benchmarks.gpu import session as session_lib
from benchmarks.gpu import stages as stages_lib
from msfp_jax.kernels.mosaic_gpu import measured

# What a stage may do; argv ends with --folder=... and --seconds=...
_FOLDER = 'import sys, pathlib; f = pathlib.Path(sys.argv[1][9:]);'
FINISHES = 'print("said")'
WRITES_AND_DIES = _FOLDER + (
    'n = len(list(f.glob("try*"))); (f / f"try{n}").touch();'
    '(f / "found.json").write_text(f\'{{"tries": {min(n, 1)}}}\');'
    'import os, signal; os.kill(os.getpid(), signal.SIGKILL)')
HANGS = (
    'import signal, subprocess, sys, time;'
    'signal.signal(signal.SIGTERM, signal.SIG_IGN);'
    'child = subprocess.Popen([sys.executable, "-c", "import time;'
    'time.sleep(60)"]); print("child", child.pid, flush=True); time.sleep(60)')
HAS_MORE = f'import sys; sys.exit({runner.MORE})'


def stage(name, code, limit=0.0, least=0.0):
  return stages_lib.Stage(
      name, '', (sys.executable, '-c', code), limit, least)


def session(folder, *stages, budget=60.0, **options):
  return session_lib.Session(
      stages, folder, budget + stages_lib.RESERVE, None, grace=0.2, **options)


def status(folder, name):
  return json.loads((folder / f'{name}.json').read_text())['status']


def test_time_is_shared_in_order_of_worth():
  first, second, rest = (stage('a', '', limit=100, least=30),
                         stage('b', '', limit=50, least=40), stage('c', ''))
  reserve = stages_lib.RESERVE
  assert stages_lib.seconds(first, 60 + reserve) == 60
  assert stages_lib.seconds(first, 500) == 100
  assert stages_lib.seconds(first, 29 + reserve) == 0
  lines = stages_lib.plan((first, second, rest), {'c'}, 135 + reserve)
  assert '0 to  100 s' in lines[0]
  assert 'not begun: needs 40 s' in lines[1]
  assert 'is there' in lines[2]
  lines = stages_lib.plan((first, second, rest), {'a'}, 200 + reserve)
  assert '0 to   50 s' in lines[1] and '50 to  200 s' in lines[2]


def test_the_usual_budget_begins_every_stage():
  lines = stages_lib.plan(stages_lib.STAGES, set(), 840)
  assert not [line for line in lines if 'not begun' in line]
  with pytest.raises(ValueError, match="no stage .'kernel'"):
    stages_lib.choose(['kernel'])


def test_a_killed_stage_leaves_what_it_had_and_others_go_on(tmp_path):
  """It is begun again while it finds something new, and no longer."""
  ended = session(tmp_path, stage('one', WRITES_AND_DIES),
                  stage('two', FINISHES)).run()
  assert ended == {'one': 'died', 'two': 'finished'}
  left = json.loads((tmp_path / 'one.json').read_text())
  assert [row['returncode'] for row in left['tries']] == [-9, -9, -9]
  assert left['found'] == {'tries': 1}
  assert (tmp_path / 'one.log').read_text().count('== one, try') == 3
  assert 'said' in (tmp_path / 'two.log').read_text()


@pytest.mark.slow
def test_a_stage_that_hangs_ends_with_all_that_it_started(tmp_path):
  start = time.monotonic()
  hangs = session(tmp_path, stage('one', HANGS, limit=3.0),
                  stage('two', FINISHES))
  assert hangs.run() == {'one': 'timed out', 'two': 'finished'}
  assert time.monotonic() - start < 20
  pid = (tmp_path / 'one.log').read_text().split()[-1]
  state = subprocess.run(['ps', '-o', 'stat=', '-p', pid], text=True,
                         capture_output=True).stdout.strip()
  assert state[:1] in ('', 'Z')  # gone, or only not yet waited for


def test_the_second_call_does_what_the_first_did_not(tmp_path):
  stages = stage('one', FINISHES), stage('two', HAS_MORE), stage(
      'three', FINISHES, least=1000.0)
  assert session(tmp_path, *stages).run() == {
      'one': 'finished', 'two': 'stopped', 'three': 'no time left'}
  assert session(tmp_path, *stages, budget=2000.0).run() == {
      'two': 'stopped', 'three': 'finished'}
  assert len(json.loads((tmp_path / 'two.json').read_text())['tries']) == 2


def test_stages_know_their_time(tmp_path):
  code = _FOLDER + '(f / "seconds").write_text(sys.argv[2])'
  one = session(tmp_path, stage('one', code, limit=30.0))
  one.grace = 5.0
  one.run()
  # Twice its grace before the limit: to leave in time, and then to be stopped.
  assert (tmp_path / 'one/seconds').read_text() == '--seconds=20'


def test_what_a_call_leaves_is_enough_for_another_machine(tmp_path):
  from benchmarks.gpu import pieces
  writes = _FOLDER + (
      '(f / "found.json").write_text("{}"); (f / "state").mkdir();'
      '(f / "state/teacher.safetensors").write_bytes(bytes(100));'
      '(f.parent / "cache").mkdir();'
      '(f.parent / "cache/program").write_bytes(b"compiled")')
  here, back, there = tmp_path / 'here', tmp_path / 'back', tmp_path / 'there'
  one = stage('one', writes)
  session(here, one, target=back).run()
  assert sorted(pieces.join(back, there)) == ['cache', 'results', 'teacher']
  for name in ('one.json', 'one.log', 'one/found.json', 'cache/program',
               'one/state/teacher.safetensors'):
    assert (there / name).read_bytes() == (here / name).read_bytes()
  assert session(there, one).run() == {}


def test_pieces_and_compiled_programs_are_as_small_as_asked_for(tmp_path):
  """What is more of either is in more pieces, or is not kept."""
  from benchmarks.gpu import pieces
  writes = _FOLDER + (
      '(f / "state").mkdir();'
      '(f / "state/teacher.safetensors").write_bytes(bytes(50_000));'
      '(f.parent / "cache").mkdir();'
      '(f.parent / "cache/large").write_bytes(bytes(9_000));'
      '(f.parent / "cache/small").write_bytes(bytes(5_000))')
  back, there = tmp_path / 'back', tmp_path / 'there'
  session(tmp_path / 'here', stage('one', writes), target=back, piece=20_000,
          cache=8_000).run()
  sizes = [path.stat().st_size for path in back.glob('teacher.*')]
  assert len(sizes) >= 3 and max(sizes) == 20_000
  pieces.join(back, there)
  assert [path.name for path in (there / 'cache').iterdir()] == ['small']


def test_stages_find_wheels_and_compiled_programs(tmp_path):
  (tmp_path / 'a-1-py3-none-any.whl').touch()
  found = session_lib.environment(tmp_path, str(tmp_path), dry=True)
  assert str(tmp_path / 'a-1-py3-none-any.whl') in found['PYTHONPATH']
  assert found['JAX_COMPILATION_CACHE_DIR'] == str(tmp_path / 'cache')
  assert found['JAX_PLATFORMS'] == 'cpu'
  with pytest.raises(FileNotFoundError, match='no .*whl in'):
    session_lib.environment(tmp_path, str(tmp_path / 'none'), dry=False)


def test_an_upload_has_room(tmp_path):
  """The repository is a small part of 64 MiB; all beside it is named."""
  (tmp_path / 'sheets').mkdir()
  (tmp_path / 'sheets/one').write_bytes(bytes(3 * 2**20))
  sizes = session_lib.upload(images=str(tmp_path / 'sheets'), wheels=None)
  assert 0 < sizes['repository'] < 24 * 2**20
  assert sizes == {'repository': sizes['repository'], 'images': 3 * 2**20}
  said = session_lib.describe_upload(
      {'repository': 2**20, 'images': 62 * 2**20}, 64.0)
  assert 'repository 1.0, images 62.0; 63.0 MiB of 64, as --upload' in said
  assert 'more than --upload_mib' in session_lib.describe_upload(
      {'images': 65 * 2**20}, 64.0)
  assert 'more than' in session_lib.describe_upload({'images': 2**20}, 0.5)
  with pytest.raises(FileNotFoundError, match='wheels: there is no none'):
    session_lib.upload(wheels='none')


@pytest.mark.long
def test_everything_at_toy_size(tmp_path):
  """All stages on a CPU; a second call finds all but the teacher's rest."""
  command = [
      sys.executable, '-m', 'benchmarks.gpu', '--dry', '--budget=3000',
      f'--output={tmp_path / "out"}', f'--pieces={tmp_path / "back"}']
  said = subprocess.run(command, cwd=session_lib.ROOT, text=True,
                        capture_output=True, check=True).stdout
  for one in stages_lib.STAGES:
    assert f'{one.name}: finished' in said
    assert status(tmp_path / 'out', one.name) == 'finished'
  assert 'error' not in said
  found = json.loads((tmp_path / 'out/kernels.json').read_text())['found']
  # Three cases in some blocks each, and the tables that follow.
  assert sum('stages, split' in name for name in found['measurements']) >= 6
  for table in ('blocks', 'slower'):
    assert isinstance(
        eval(found['measurements'][table]['value'], vars(measured)), tuple)
  found = json.loads((tmp_path / 'out/sampling.json').read_text())['found']
  for name in ('packed', 'bfloat16', 'float32', 'float32, TF32', 'simulated'):
    row = found['measurements'][name]['value']
    assert row['ms_an_image_and_step'] > 0 and row['bytes']['temporary'] > 0
    assert len(row['slowest']) == 3
  taught = json.loads((tmp_path / 'out/teacher.json').read_text())['found']
  assert taught['step'] == taught['steps'] and taught['loss'] > 0
  said = subprocess.run(command, cwd=session_lib.ROOT, text=True,
                        capture_output=True, check=True).stdout
  assert said.count('is there') == len(stages_lib.STAGES)
