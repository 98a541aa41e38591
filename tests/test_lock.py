"""A folder's lock, held by this process, another, or one that was killed."""

import pathlib
import subprocess
import sys
import threading

import pytest

from msfp_jax.base import errors
from msfp_jax.base import lock
from msfp_jax.run import workdir

# By the file alone: the package would take seconds to import.
_HOLDER = """
import runpy, sys, time
hold = runpy.run_path(sys.argv[1])['hold']
with hold(sys.argv[2]):
  print('held', flush=True)
  time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
  """Another process that holds a folder."""
  with subprocess.Popen(
      [sys.executable, '-c', _HOLDER, lock.__file__, str(tmp_path / 'run')],
      stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == 'held\n'
    yield process
    process.kill()


def test_a_second_process_is_refused_by_name(holder, tmp_path):
  with pytest.raises(errors.WorkdirError) as error, workdir.hold(
      str(tmp_path / 'run')):
    raise AssertionError('held twice')
  for part in (f'process {holder.pid} on ', 'another --workdir',
               str(tmp_path / 'run')):
    assert part in str(error.value)
  with workdir.hold(str(tmp_path / 'other')):
    pass
  holder.kill()  # SIGKILL: it has no time to remove anything
  holder.wait()
  assert (tmp_path / 'run' / lock.NAME).is_file()
  with workdir.hold(str(tmp_path / 'run')):
    pass


def test_another_thread_is_refused_too(tmp_path):
  with lock.hold(tmp_path), pytest.raises(lock.InUseError), lock.hold(tmp_path):
    raise AssertionError('held twice')


def test_what_it_made_and_nobody_used_is_removed(tmp_path):
  (tmp_path / 'there').mkdir()
  for name in ('there', 'new/deep/run'):
    with pytest.raises(KeyError), lock.hold(tmp_path / name):
      assert (tmp_path / name / lock.NAME).is_file()
      raise KeyError
  assert [*tmp_path.rglob('*')] == [tmp_path / 'there']
  with lock.hold(tmp_path / 'new/deep/run'):
    (tmp_path / 'new/deep/file').touch()
  assert {path.name for path in tmp_path.rglob('*')} == {
      'there', 'new', 'deep', 'file'}


def test_one_that_cannot_be_removed_hides_no_error(tmp_path, monkeypatch):
  """As where a disk has become read-only; and stands in nobody's way."""
  def refuse(*unused, **more):
    raise PermissionError('nothing can be removed')

  with pytest.raises(ValueError, match='the first'), lock.hold(tmp_path):
    monkeypatch.setattr(pathlib.Path, 'unlink', refuse)
    raise ValueError('the first')
  monkeypatch.undo()
  assert (tmp_path / lock.NAME).exists()
  with lock.hold(tmp_path):
    pass
  assert not (tmp_path / lock.NAME).exists()


def test_never_two_at_once(tmp_path):
  """Though each removes the file on which the others wait."""
  inside, most, taken = [], [], []

  def work():
    for _ in range(40):
      try:
        with lock.hold(tmp_path):
          inside.append(1)
          most.append(len(inside))
          inside.pop()
          taken.append(1)
      except lock.InUseError:
        pass

  threads = [threading.Thread(target=work) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert taken and max(most) == 1


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
  def refuse(*unused):
    raise OSError(lock.errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(lock.fcntl, 'flock', refuse)
  with lock.hold(tmp_path):
    assert not [*pathlib.Path(tmp_path).iterdir()]
