"""Tests of files.py."""

import os

import pytest

from msfp_jax.base import files


def test_atomic_path_keeps_the_old_file_on_failure(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('old')
  with pytest.raises(RuntimeError):
    with files.atomic_path(path) as temporary:
      temporary.write_text('half')
      raise RuntimeError
  assert path.read_text() == 'old'
  assert os.listdir(tmp_path) == ['a.txt']
