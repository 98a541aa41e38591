"""Lines that survive their process."""

import pytest

from msfp_jax.base.journal import Journal

JOB = {'files': ('a', 3), 'bits': 4}


def entries(path, job=JOB):
  with Journal(path, job, 'delete it') as journal:
    return list(journal.entries)


def test_lines_come_back_as_json_has_them(tmp_path):
  path = tmp_path / 'j.jsonl'
  with Journal(path, JOB, '') as journal:
    journal.add({'piece': 'a'})
    journal.add({'piece': 'b'})
  assert entries(path, {'bits': 4, 'files': ['a', 3]}) == [
      {'piece': 'a'}, {'piece': 'b'}]


def test_a_line_is_on_disk_when_add_returns(tmp_path):
  path = tmp_path / 'j.jsonl'
  with Journal(path, JOB, '') as journal:
    journal.add(1)
    assert entries(path) == [1]


@pytest.mark.parametrize('cut', range(1, 18))
def test_half_a_line_is_dropped_and_the_next_stands_alone(tmp_path, cut):
  path = tmp_path / 'j.jsonl'
  with Journal(path, JOB, '') as journal:
    journal.add(1)
    journal.add({'piece': 'abcdef'})  # 19 bytes
  path.write_bytes(path.read_bytes()[:-cut])
  with Journal(path, JOB, '') as journal:
    assert journal.entries == [1]
    journal.add(3)
  assert entries(path) == [1, 3]


def test_what_is_written_by_a_failing_disk_ends_it(tmp_path):
  """Zeros where a power failure left a hole, or what is JSON and not the same:
  later lines are not believed.
  """
  path = tmp_path / 'j.jsonl'
  for old, new in ((b'\n2', b'\n\0'), (b'\n2', b'\n3'), (b'\n2\t', b'\n2 '),
                   (b'\n2\t', b'\n2\t0')):
    path.unlink(missing_ok=True)
    with Journal(path, JOB, '') as journal:
      for number in (1, 2, 3):
        journal.add(number)
    path.write_bytes(path.read_bytes().replace(old, new))
    assert entries(path) == [1]


def test_lines_of_earlier_versions_have_no_digest(tmp_path):
  path = tmp_path / 'j.jsonl'
  path.write_bytes(b'{"bits": 4, "files": ["a", 3]}\n1\n2\n')
  with Journal(path, JOB, '') as journal:
    assert journal.entries == [1, 2]
    journal.add(3)
  assert entries(path) == [1, 2, 3]


def test_lines_that_were_never_written_are_left_out(tmp_path):
  """Found by changing a journal without digests at random."""
  path = tmp_path / 'j.jsonl'
  path.write_text('{}\n1\n[2]\n"piece"\n{"piece": "a"}\n{"spec": 3}\n')
  with Journal(path, {}, 'go') as journal:
    assert journal.of('piece') == [{'piece': 'a'}]
    assert journal.of('piece', 'spec') == []


def test_half_a_first_line_is_no_journal(tmp_path):
  path = tmp_path / 'j.jsonl'
  path.write_bytes(b'{"bits": 4, "fi')
  assert entries(path) == []


def test_of_another_job(tmp_path):
  path = tmp_path / 'j.jsonl'
  entries(path)
  with pytest.raises(ValueError, match=r"another job: \['bits'\] differ; del"):
    entries(path, JOB | {'bits': 5})
