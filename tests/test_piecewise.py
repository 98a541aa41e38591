"""A file in pieces is the file as a whole."""

import os

import numpy as np
import pytest

from msfp_jax.convert import native
from msfp_jax.convert import piecewise
from msfp_jax.convert.piecewise import PiecewiseFile

TENSORS = {
    'b': np.arange(6, dtype=np.float32).reshape(2, 3),
    'a': np.arange(5, dtype=np.uint8),  # what follows it is not aligned
    'shared': np.arange(7, dtype=np.float32) / 3,
    'c': np.arange(3, dtype=np.float16), 'empty': np.zeros((0, 4))}
METADATA = {'format': 'x', 'z': 'é'}


def opened(tmp_path):
  return PiecewiseFile(tmp_path / 'f.safetensors', tmp_path / 'work', METADATA,
                       TENSORS, {'job': 1})


def test_the_bytes_of_a_file_written_at_once(tmp_path):
  native.write_safetensors(tmp_path / 'whole', TENSORS, METADATA)
  with opened(tmp_path) as file:
    file.write('2', {'c': TENSORS['c']},
               {('shared', 4): TENSORS['shared'][4:]})
    assert not (tmp_path / 'f.safetensors').exists()
  with opened(tmp_path) as file:
    assert file.done == {'2'}
    # Not in one piece of memory, as after transposing.
    file.write('1', {'b': np.asfortranarray(TENSORS['b']), 'a': TENSORS['a'],
                     'empty': TENSORS['empty']},
               {('shared', 0): TENSORS['shared'][:4]})
    file.finish()
  whole = (tmp_path / 'whole').read_bytes()
  assert (tmp_path / 'f.safetensors').read_bytes() == whole
  assert not list((tmp_path / 'work').iterdir())


def test_damage_meanwhile_does_not_pass_the_seal(tmp_path):
  """What is sealed is what was computed, and not what the disk made of it."""
  with opened(tmp_path) as file:
    file.write('1', {name: array for name, array in TENSORS.items()
                     if name != 'shared'}, {('shared', 0): TENSORS['shared']})
  data = tmp_path / 'work' / 'data'
  content = bytearray(data.read_bytes())
  place = content.index(TENSORS['b'].tobytes())
  content[place + 4] ^= 1
  data.write_bytes(content)
  with opened(tmp_path) as file:
    file.finish()
  path = tmp_path / 'f.safetensors'
  tensors, metadata = native.source_lib.read_safetensors(path)
  with pytest.raises(ValueError, match='f.safetensors is damaged'):
    native.check_seal(path, tensors, metadata, '')


def test_lines_of_a_journal_that_no_piece_wrote(tmp_path):
  """Without digests, as earlier versions wrote; what is whole goes on."""
  with opened(tmp_path) as file:
    file.write('1', {name: array for name, array in TENSORS.items()
                     if name != 'shared'}, {('shared', 0): TENSORS['shared']})
  journal = tmp_path / 'work' / piecewise.JOURNAL
  with open(journal, 'a', encoding='utf-8') as lines:
    lines.write('12\n[1]\n"tensors"\n{"within": 3}\n')
  with opened(tmp_path) as file:
    assert file.done == {'1'}
    file.finish()
  tensors, metadata = native.source_lib.read_safetensors(
      path := tmp_path / 'f.safetensors')
  native.check_seal(path, tensors, metadata, '')


def test_damage_of_what_pieces_share_is_not_sealed(tmp_path):
  """Its digest is of the file, which is compared with what was written."""
  with opened(tmp_path) as file:
    file.write(
        '1', {name: array for name, array in TENSORS.items()
              if name != 'shared'}, {('shared', 0): TENSORS['shared'][:4]})
    file.write('2', {}, {('shared', 4): TENSORS['shared'][4:]})
  data = tmp_path / 'work' / 'data'
  content = bytearray(data.read_bytes())
  content[content.index(TENSORS['shared'].tobytes()) + 4 * 5] ^= 1
  data.write_bytes(content)
  with opened(tmp_path) as file:
    with pytest.raises(ValueError, match="changed shared, of '2'; delete"):
      file.finish()
  assert not (tmp_path / 'f.safetensors').exists()


@pytest.mark.parametrize('take', [
    lambda data: data.unlink(), lambda data: os.truncate(data, 100)])
def test_data_that_were_taken_away_are_written_again(tmp_path, take):
  with opened(tmp_path) as file:
    file.write('1', {'a': TENSORS['a']})
  take(tmp_path / 'work' / 'data')
  with opened(tmp_path) as file:
    assert not file.done


@pytest.mark.parametrize('wrong', [
    np.zeros(4, np.uint8), np.zeros(5, np.int8), np.zeros((5, 1), np.uint8)])
def test_other_shapes_and_types_are_refused(tmp_path, wrong):
  with opened(tmp_path) as file:
    with pytest.raises(ValueError, match=r'^a is .*where uint8 \(5,\) was'):
      file.write('1', {'a': wrong})
    assert not file.done
