"""benchmarks.gpu's teacher: whatever ends it, the kept file is complete."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.gpu import pieces
from benchmarks.gpu import runner
from benchmarks.gpu import session as session_lib
import msfp_jax as msfp
from msfp_jax.convert import source as source_lib

# Writes pieces of ever other content, as fast as it can.
WRITES = '''
import itertools, pathlib, random
from benchmarks.gpu import pieces
root = pathlib.Path({root!r})
for n in itertools.count(1):
  (root / 'one').write_bytes(random.Random(n).randbytes(2_000_000) + b'%d' % n)
  pieces.split('all', [root / 'one'], root, root / 'p', False, 100_000)
  print(n, flush=True)
'''


def kill(process):
  """Ends a process and all that it started, without a word."""
  os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def test_pieces_are_complete_whenever_their_writer_is_killed(tmp_path):
  """They are those that it had last finished, or the ones after."""
  draw = random.Random(0)
  newest = 0
  for life in range(4):
    with subprocess.Popen(
        [sys.executable, '-c', WRITES.format(root=str(tmp_path))],
        cwd=session_lib.ROOT, stdout=subprocess.PIPE, text=True,
        start_new_session=True) as process:
      process.stdout.readline()
      time.sleep(draw.uniform(0, 0.1))
      kill(process)
      said = [1, *map(int, process.stdout.read().split())]
    back = tmp_path / f'back{life}'
    assert pieces.join(tmp_path / 'p', back) == ['all']
    content = (back / 'one').read_bytes()
    newest = int(content[2_000_000:])
    assert content[:2_000_000] == random.Random(newest).randbytes(2_000_000)
    assert newest >= said[-1]


def begin(output, back, log):
  """Starts the stage as a call does, at toy size, saving all the time."""
  return subprocess.Popen(
      [sys.executable, '-m', 'benchmarks.gpu.teacher', '--dry', '--every=0',
       f'--folder={output / "teacher"}', f'--pieces={back}'],
      cwd=session_lib.ROOT, stdout=log, stderr=subprocess.STDOUT,
      env=session_lib.environment(output.parent, None, dry=True),
      start_new_session=True)


def last_step(folder):
  """The step of a teacher that loads."""
  path = folder / 'teacher' / 'state' / 'teacher.safetensors'
  msfp.load_pretrained(str(path))
  return int(source_lib.read_safetensors(path)[1]['step'])


@pytest.mark.long
def test_a_killed_teacher_is_kept_and_goes_on(tmp_path):
  """Each life is on a machine of its own, which has the pieces alone."""
  draw, back = random.Random(1), tmp_path / 'back'
  step = 0
  for life in range(2):
    output = tmp_path / f'machine{life}'
    if step:
      pieces.join(back, output)
    with open(tmp_path / f'log{life}', 'w') as log:
      process = begin(output, back, log)
      before = set(back.glob('*'))
      while set(back.glob('teacher.*')) <= before:
        assert process.poll() is None, (tmp_path / f'log{life}').read_text()
        time.sleep(0.05)
      time.sleep(draw.uniform(0, 3))
      kill(process)
    if step:
      said = (tmp_path / f'log{life}').read_text()
      assert f'teacher.safetensors, step {step}\n' in said
    there = tmp_path / f'there{life}'
    assert pieces.join(back, there) == ['teacher']
    assert last_step(there) > step
    step = last_step(there)
    assert all(path.stat().st_size <= pieces.SIZE for path in back.iterdir())
    if step == 400:  # a fast machine: the last life finds it trained
      break
  output = tmp_path / 'last'
  pieces.join(back, output)
  with open(tmp_path / 'log', 'w') as log:
    assert begin(output, back, log).wait() == 0
  found = json.loads((output / 'teacher' / runner.FOUND).read_text())
  assert found['resumed_at'] == step and found['step'] == found['steps'] == 400


def test_a_call_hands_the_folder_of_pieces_to_the_teacher(tmp_path):
  # In a process of its own, since all stages define flags.
  code = ('from absl import flags; '
          'from benchmarks.gpu import __main__ as m; '
          'from benchmarks.gpu import stages as s; '
          f'flags.FLAGS(["x", "--pieces={tmp_path}", "--data=a:b", '
          '"--piece_mib=2"]); '
          'print([m.flags_of(one) for one in s.STAGES])')
  said = subprocess.run([sys.executable, '-c', code], cwd=session_lib.ROOT,
                        check=True, text=True, capture_output=True).stdout
  *others, teacher = eval(said)
  assert teacher == ['--data=a:b', f'--pieces={tmp_path}', '--piece_mib=2.0']
  assert not any(others)
