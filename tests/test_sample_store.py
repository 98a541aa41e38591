"""Samples on the disk: whole batches, in any order, read as one set."""

import tracemalloc
import zipfile

import numpy as np
import pytest

from msfp_jax.metrics import collect
from msfp_jax.metrics import features
from msfp_jax.metrics import scorer as scorer_lib
from msfp_jax.metrics import stats_file
from msfp_jax.run import sample_store

SHAPE = (8, 8, 3)


def random_images(count, seed=0):
  return np.random.default_rng(seed).integers(
      0, 256, (count, *SHAPE), np.uint8)


@pytest.fixture
def store(tmp_path):
  return sample_store.SampleStore(tmp_path / 'row', 10, 4, SHAPE)


def filled(folder, images, batch_size=4):
  store = sample_store.SampleStore(folder, len(images), batch_size, SHAPE)
  for number in store.missing:
    batch = images[number * batch_size:][:batch_size]
    store.write(number, np.pad(
        batch, ((0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0))))
  return store


def test_batches_come_in_any_order_and_the_last_is_cut(store):
  images = random_images(12)
  assert store.missing == [0, 1, 2]
  store.write(2, images[8:])
  store.write(0, images[:4])
  assert store.missing == [1]
  store.write(1, images[4:8])
  assert store.missing == []
  for rows in (slice(None), slice(3, 9), slice(9, 99), np.array([9, 0, 5, 0])):
    np.testing.assert_array_equal(store[rows], images[:10][rows])


def test_a_batch_of_the_wrong_size(store):
  with pytest.raises(ValueError, match=r'batch 1 has shape \[3, 8, 8, 3\]'):
    store.write(1, random_images(3))
  assert store.missing == [0, 1, 2]


def test_a_missing_batch_is_no_image(store):
  with pytest.raises(FileNotFoundError, match='000000'):
    store[:2]


# Rows that a file system could take for one another, or for other files.
ROWS = ('msfp:w6a6', 'msfp_w6a6', 'msfp%3Aw6a6', 'msfp/w6a6', 'msfp',
        'msfp+gptq', 'msfp.row.json', 'msfp.npz', 'methods', 'methods.png',
        '.', '..', '~', 'samples.json', 'reference.npz', 'a b', 'a\\b', 'a\nb',
        '\u00fc', '%C3%BC')


def test_no_two_rows_share_a_folder_or_a_file(tmp_path):
  """Beside the folders lie rows' metrics, samples and what all rows share."""
  names = [sample_store.folder_name(row) for row in ROWS]
  files = [name + suffix for name in names for suffix in (
      sample_store.ROW, *[suffix for suffix, _ in sample_store.FORMS.values()])]
  files += ['methods.png', 'samples.json', 'scores.json', 'reference.npz']
  assert len(set(files)) == len(files) == 3 * len(ROWS) + 4
  for name in names:
    (tmp_path / name).mkdir()
  assert {path.name for path in tmp_path.iterdir()} == set(names)
  # As they have always been.
  for row in ('fp', 'tuned', 'signed_fp', 'msfp+gptq', 'recipe=x,y-2'):
    assert sample_store.folder_name(row) == row


def test_what_is_shown_stays(tmp_path):
  images = random_images(10)
  store = filled(tmp_path, images)
  store.keep_first(5)
  assert store.missing == [2]
  np.testing.assert_array_equal(store[:5], images[:5])


def test_npz_as_adm_reads_it(tmp_path):
  images = random_images(600)
  sample_store.save_npz(tmp_path / 'a.npz', filled(tmp_path / 'row', images))
  with np.load(tmp_path / 'a.npz') as arrays:
    np.testing.assert_array_equal(arrays['arr_0'], images)
  assert zipfile.ZipFile(tmp_path / 'a.npz').testzip() is None


def peak(folder, count):
  """Scores images on the disk; returns the peak of memory, in bytes.

  The least of two: what a program forgets and traces anew is not the samples'.
  """
  images = filled(folder, random_images(count, 1), 64)
  first = filled(folder / 'fp', random_images(count, 2), 64)
  network = features.get('random', SHAPE)
  reference = stats_file.measure(random_images(300), network, 'noise', 100)
  scorer = scorer_lib.Scorer(network, reference)
  scorer.score(first)
  scorer.score(images)  # compiles
  peaks = []
  for _ in range(2):
    tracemalloc.start()
    try:
      scorer.score(images)
      peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
      tracemalloc.stop()
  return min(peaks)


def test_memory_does_not_grow_with_the_samples(tmp_path, monkeypatch):
  monkeypatch.setattr(collect, '_CHUNK_BYTES', 1)  # a network's batch
  few, many = peak(tmp_path / 'few', 1024), peak(tmp_path / 'many', 4096)
  image_bytes = np.prod(SHAPE) * (4096 - 1024)
  assert many - few < 0.4 * image_bytes, (few, many)


@pytest.mark.parametrize('size', [0, 1, 8 * 8 * 3, 5 * 8 * 8 * 3])
def test_a_batch_that_was_cut_is_named(store, size):
  store.write(0, random_images(4))
  (store.folder / '000000.uint8').write_bytes(bytes(size))
  assert 0 in store.missing
  with pytest.raises(ValueError, match='000000.uint8 has .* bytes of 768'):
    store[:2]


@pytest.mark.parametrize('content', [b'{"a": 1', b'\xff', b''])
def test_a_damaged_claim_deletes_no_samples(tmp_path, content):
  sample_store.claim(tmp_path, {'a': 1}, {})
  (tmp_path / 'samples.json').write_bytes(content)
  (tmp_path / 'kept').write_bytes(b'')
  with pytest.raises(ValueError, match='samples.json is damaged.*delete'):
    sample_store.claim(tmp_path, {'a': 1}, {})
  assert (tmp_path / 'kept').is_file()
