"""Files of arrays, and what is none."""

import io
import zipfile

import numpy as np
import pytest

from msfp_jax.base import npz


def write(path, **members):
  with zipfile.ZipFile(path, 'w') as archive:
    for name, content in members.items():
      archive.writestr(name, content)


def array(change=lambda content: content):
  out = io.BytesIO()
  np.save(out, np.arange(6.0))
  return change(out.getvalue())


def read(path):
  with npz.opened(path, 'of numbers') as arrays:
    return dict(arrays)


def test_arrays_by_name(tmp_path):
  np.savez(tmp_path / 'a.npz', x=np.arange(3), y=np.ones(()))
  with npz.opened(tmp_path / 'a.npz', 'of numbers') as arrays:
    assert list(arrays) == ['x', 'y'] and len(arrays) == 2 and 'z' not in arrays
    np.testing.assert_array_equal(arrays['x'], [0, 1, 2])


# Found by changing small files at random.
@pytest.mark.parametrize('member', [
    b'no array', b'', array(lambda content: content[:-1]),
    # A header that does not end, one of a size of no memory, one of objects.
    array(lambda content: content.replace(b'}', b' ')),
    array(lambda content: content.replace(b'(6,)', b'(6666666666666,)').replace(
        b' ' * 12, b'', 1)),
    array(lambda content: content.replace(b'<f8', b'|O8')),
    # A type that NumPy parses as Python, and one that it gave up.
    array(lambda content: content.replace(b'<f8', b',f8')),
    array(lambda content: content.replace(b'<f8', b'|a8'))],
    ids=['text', 'empty', 'cut', 'endless', 'huge', 'objects', 'odd type',
         'old type'])
def test_what_is_no_array(tmp_path, member):
  write(tmp_path / 'a.npz', **{'x.npy': member})
  with pytest.raises(ValueError, match='a.npz is no .npz of numbers: '):
    read(tmp_path / 'a.npz')


def test_what_python_2_wrote(tmp_path):
  """Sizes with an L, of which NumPy warns: statistics of those years."""
  write(tmp_path / 'a.npz', **{'x.npy': array(
      lambda content: content.replace(b'(6,), ', b'(6L,),'))})
  np.testing.assert_array_equal(read(tmp_path / 'a.npz')['x'], np.arange(6.0))


def test_members_that_are_no_arrays(tmp_path):
  write(tmp_path / 'a.npz', x=b'text')
  with pytest.raises(ValueError, match="of numbers: 'x' is no array"):
    read(tmp_path / 'a.npz')


def test_a_single_array(tmp_path):
  np.save(tmp_path / 'a.npy', np.arange(3))
  with pytest.raises(ValueError, match='a.npy is no .npz of numbers: '):
    read(tmp_path / 'a.npy')


@pytest.mark.parametrize('place, value', [(6, 0xff), (10, 0x63), (8, 1)])
def test_a_directory_of_what_zipfile_does_not_read(tmp_path, place, value):
  """A version, a method of compression and a password that are none."""
  np.savez(tmp_path / 'a.npz', x=np.arange(3))
  content = bytearray((tmp_path / 'a.npz').read_bytes())
  content[content.index(b'PK\1\2') + place] = value
  (tmp_path / 'a.npz').write_bytes(content)
  with pytest.raises(ValueError, match='a.npz is no .npz of numbers: '):
    read(tmp_path / 'a.npz')


def test_nothing_there(tmp_path):
  with pytest.raises(FileNotFoundError):
    read(tmp_path / 'a.npz')
