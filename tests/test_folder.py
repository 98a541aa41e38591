"""What a folder holds: hidden files, links, other suffixes."""

import os

import numpy as np
from PIL import Image
import pytest

from msfp_jax import data
from msfp_jax.data import folder as folder_lib

WANTED = ('.png', '.tif')


def write(root, *names):
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(b'')


def found(root):
  """The paths of the files found, below the folder."""
  contents = folder_lib.find(root, WANTED)
  return [os.path.relpath(path, root) for path in contents.files]


def test_hidden_files_and_folders_are_skipped_and_counted(tmp_path):
  root = tmp_path / '.cache'  # where to look may be hidden itself
  write(root, 'a.png', '._a.png', '.DS_Store', '.ipynb_checkpoints/a.png',
        'b/.git/c/d.png', 'b/e.png')
  contents = folder_lib.find(root, WANTED)
  assert found(root) == ['a.png', 'b/e.png']
  assert (contents.hidden_files, contents.hidden_folders) == (2, 2)
  assert contents.others == {}
  assert contents.left_out() == 'hidden files: 2, hidden folders: 2'


def test_other_suffixes_are_counted_by_name(tmp_path, caplog):
  write(tmp_path, 'a.png', 'b.TIF', 'c.txt', 'd/e.TXT', 'f.heic', 'LICENSE')
  contents = folder_lib.find(tmp_path, WANTED)
  assert found(tmp_path) == ['a.png', 'b.TIF']
  assert contents.others == {'.txt': 2, '.heic': 1, '': 1}
  message = '2 of .txt, 1 without a suffix, 1 of .heic'
  assert contents.left_out() == message
  warned = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
  assert f'{tmp_path}: 2 files are read; left out: {message}' in warned


def test_many_suffixes_take_one_line(tmp_path):
  write(tmp_path, *[f'a.{i:02d}' for i in range(14)])
  left_out = folder_lib.find(tmp_path, WANTED).left_out()
  assert left_out.startswith('1 of .00, 1 of .01, ')
  assert left_out.endswith('1 of .09, 4 of 4 other suffixes')


def test_nothing_is_said_where_nothing_is_left_out(tmp_path, caplog):
  write(tmp_path, 'a.png')
  assert folder_lib.find(tmp_path, WANTED).left_out() == ''
  assert not caplog.records


def test_linked_folders_are_followed_once(tmp_path):
  root, outside = tmp_path / 'root', tmp_path / 'outside'
  write(root, 'b/1.png')
  write(outside, '2.png', 'deep/3.png')
  (root / 'a').symlink_to(root / 'b')  # of a folder that is there itself
  (root / 'x').symlink_to(outside)
  (root / 'y').symlink_to(outside)  # a second link to one folder
  (root / 'z').symlink_to(outside / 'deep')  # to what is inside of another
  assert found(root) == ['b/1.png', 'x/2.png', 'x/deep/3.png']


def test_links_that_lead_back_end(tmp_path):
  root = tmp_path / 'root'
  write(root, 'a/1.png')
  (root / 'a/root').symlink_to(root)
  (root / 'a/self').symlink_to('.')
  assert found(root) == ['a/1.png']
  # To where the walk came from: what else is there belongs to it.
  (root / 'up').symlink_to('..')
  write(tmp_path, 'beside/2.png')
  assert found(root) == ['a/1.png', 'up/beside/2.png']


def test_links_to_files_are_files(tmp_path):
  """As in the cache of a hub, whose files are all links."""
  write(tmp_path, 'blobs/0a1b')
  (tmp_path / 'set').mkdir()
  (tmp_path / 'set/a.png').symlink_to('../blobs/0a1b')
  assert found(tmp_path / 'set') == ['a.png']


@pytest.mark.parametrize('target', ['absent', 'broken'])
def test_a_link_that_leads_nowhere_is_named(tmp_path, target):
  """It may have been half of the data; 'broken' leads to itself."""
  write(tmp_path, 'a.png')
  (tmp_path / 'broken').symlink_to(target)
  with pytest.raises(FileNotFoundError, match=f'broken is a link to {target}'):
    folder_lib.find(tmp_path, WANTED)


def test_images_are_looked_for_so(tmp_path):
  pixels = np.full((4, 6, 3), 9, np.uint8)
  for place in ('set', 'set/.ipynb_checkpoints', 'more'):
    (tmp_path / place).mkdir()
    Image.fromarray(pixels).save(tmp_path / place / 'a.png')
  (tmp_path / 'set/more').symlink_to(tmp_path / 'more')
  assert len(data.load('images', str(tmp_path / 'set'))) == 2


def test_parquet_files_are_looked_for_so(tmp_path):
  write(tmp_path, '.cache/a.parquet', 'notes.md')
  with pytest.raises(FileNotFoundError, match='no .parquet at'):
    data.load('parquet', str(tmp_path))
  # Hubs' caches link to files and folders; this one is no parquet, by name.
  (tmp_path / 'set').symlink_to(tmp_path / '.cache')
  with pytest.raises(ValueError, match='set/a.parquet is no .parquet'):
    data.load('parquet', str(tmp_path))


def test_a_folder_without_images_says_what_it_holds(tmp_path):
  write(tmp_path, 'a.heic', '.b.png')
  with pytest.raises(ValueError, match='holds no images, only: 1 of .heic, '
                     r'hidden files: 1; what is read are .*\.png'):
    data.load('images', str(tmp_path))
