"""Statistics files: ours, and those of the other tools."""

import hashlib
import json
import os

import numpy as np
import pytest
import scipy.linalg

from msfp_jax.metrics import collect
from msfp_jax.metrics import features
from msfp_jax.metrics import frechet
from msfp_jax.metrics import stats_file


def stats(count, dim, seed):
  rng = np.random.RandomState(seed)
  found = frechet.GaussianStats()
  found.update(rng.standard_normal((count, dim))
               @ rng.standard_normal((dim, dim)))
  return found


def reference(seed=0):
  return stats_file.Reference(
      stats(30, 4, seed), stats(30, 3, seed + 1), {'features': 'inception'})


def test_saved_statistics_load_exactly(tmp_path):
  saved = reference()
  stats_file.save(tmp_path / 'ref.npz', saved)
  loaded = stats_file.load(tmp_path / 'ref.npz')
  for name in ('pool', 'spatial'):
    ours, theirs = getattr(saved, name), getattr(loaded, name)
    np.testing.assert_array_equal(theirs.mean, ours.mean)
    np.testing.assert_array_equal(theirs.cov, ours.cov)
    assert theirs.num_samples == 30
  assert loaded.provenance == {'features': 'inception'}
  assert os.listdir(tmp_path) == ['ref.npz']


def test_the_other_tools_read_ours(tmp_path):
  """Read as by other tools, by np.load and keys, the distance is the same."""
  paths = [tmp_path / f'{seed}.npz' for seed in (0, 5)]
  for path, seed in zip(paths, (0, 5), strict=True):
    stats_file.save(path, reference(seed))
  ours = [stats_file.load(path) for path in paths]
  for suffix, name in (('', 'pool'), ('_s', 'spatial')):
    (m1, s1), (m2, s2) = (
        [np.load(path)[key + suffix][:] for key in ('mu', 'sigma')]
        for path in paths)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = (m1 - m2) @ (m1 - m2) + np.trace(s1 + s2 - 2 * root)
    actual = frechet.frechet_distance(*(getattr(r, name) for r in ours))
    assert actual == pytest.approx(expected, rel=1e-9)


def test_statistics_of_other_tools_load(tmp_path):
  adm = {'arr_0': np.zeros((2, 4, 4, 3), np.uint8),
         'mu': np.ones(2, np.float32), 'sigma': np.eye(2, dtype=np.float32),
         'mu_s': np.ones(3), 'sigma_s': np.eye(3)}
  np.savez(tmp_path / 'adm.npz', **adm)
  loaded = stats_file.load(tmp_path / 'adm.npz')
  assert loaded.pool.num_samples is None and loaded.provenance == {}
  assert loaded.pool.cov.dtype == np.float64
  assert loaded.spatial.cov.shape == (3, 3)
  np.savez(tmp_path / 'edm.npz', mu=adm['mu'], sigma=adm['sigma'])
  assert stats_file.load(tmp_path / 'edm.npz').spatial is None


def test_a_failed_save_keeps_the_old_file(tmp_path):
  path = tmp_path / 'ref.npz'
  path.write_bytes(b'old')
  with pytest.raises(ValueError, match='1 samples'):
    stats_file.save(path, stats_file.Reference(stats(1, 2, 0), None, {}))
  assert path.read_bytes() == b'old'
  assert os.listdir(tmp_path) == ['ref.npz']


def test_bad_statistics_files_are_refused_by_name(tmp_path):
  with pytest.raises(FileNotFoundError, match='none.npz'):
    stats_file.load(tmp_path / 'none.npz')
  path = tmp_path / 'ref.npz'
  stats_file.save(path, reference())
  whole = path.read_bytes()
  np.save(tmp_path / 'plain.npy', np.ones(3))
  for content in (b'', b'text', whole[:200],
                  (tmp_path / 'plain.npy').read_bytes()):
    path.write_bytes(content)
    with pytest.raises(ValueError, match='ref.npz is no .npz'):
      stats_file.load(path)
  np.savez(path, mu=np.ones(3))
  with pytest.raises(ValueError, match='sigma'):
    stats_file.load(path)
  np.savez(path, mu=np.ones(3), sigma=np.eye(2))
  with pytest.raises(ValueError, match=r'\(3,\) and \(2, 2\)'):
    stats_file.load(path)
  np.savez(path, mu=np.ones(2), sigma=np.eye(2), mu_s=np.ones(2) * np.nan,
           sigma_s=np.eye(2))
  with pytest.raises(ValueError, match='mu_s or sigma_s holds NaN'):
    stats_file.load(path)
  np.savez(path, mu=np.ones(2), sigma=np.eye(2), provenance=np.array('[1]'))
  with pytest.raises(ValueError, match='provenance'):
    stats_file.load(path)


class Counted:
  """Images of which we see how many are asked for at once."""

  def __init__(self, images):
    self.images, self.shape, self.most = images, images.shape, 0

  def __len__(self):
    return len(self.images)

  def __getitem__(self, rows):
    found = self.images[rows]
    self.most = max(self.most, len(found))
    return found


def test_statistics_are_made_in_chunks(tmp_path, monkeypatch):
  monkeypatch.setattr(collect, '_CHUNK_BYTES', 1)
  rng = np.random.RandomState(0)
  images = Counted(rng.randint(0, 256, (700, 8, 8, 3), dtype=np.uint8))
  network = features.get('random', (8, 8, 3))
  made = stats_file.measure(images, network, 'noise', num_vectors=100)
  stats_file.save(tmp_path / 'r.npz', made)
  assert images.most == 256
  loaded = stats_file.load(tmp_path / 'r.npz')
  np.testing.assert_allclose(
      loaded.pool.cov, np.cov(network.outputs(images.images).features.T),
      rtol=1e-6, atol=1e-9)
  assert loaded.provenance == made.provenance == {
      'dataset': 'noise', 'num_samples': 700, 'features': 'random',
      'image_shape': [8, 8, 3],
      'images_sha256': hashlib.sha256(images.images.tobytes()).hexdigest()}
  assert json.loads(json.dumps(made.provenance)) == made.provenance
  assert loaded.spatial is None
  # Every seventh image's: a set may be in order of classes.
  np.testing.assert_array_equal(
      loaded.vectors, network.outputs(images.images[::7]).features)


@pytest.mark.parametrize('network', ['resnet56', 'squeezenet_caffe'])
def test_statistics_that_ship_with_the_package(network):
  """All training images of CIFAR-10, by the very weights that are named."""
  found = stats_file.load(stats_file.locate('cifar10', network))
  told = found.provenance
  assert (told['features'], told['num_samples']) == (network, 50_000)
  assert told['image_shape'] == [32, 32, 3]
  # A Gaussian: symmetric, and nowhere below zero.
  cov = found.pool.cov
  np.testing.assert_allclose(cov, cov.T, rtol=1e-12)
  assert scipy.linalg.eigvalsh(cov).min() > -1e-9 * np.trace(cov)
  if network == 'resnet56':
    there = features.get(network, (32, 32, 3)).provenance
    assert told['weights_sha256'] == there['weights_sha256']


def test_a_file_goes_before_what_ships(tmp_path, monkeypatch):
  assert stats_file.is_shipped('cifar10')
  assert not stats_file.is_shipped('mnist')
  with pytest.raises(ValueError, match="of \\['resnet56', 'squeezenet_caffe'"
                     "\\], not of 'digits'"):
    stats_file.locate('cifar10', 'digits')
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'cifar10').mkdir()  # the data
  assert stats_file.is_shipped('cifar10')
  (tmp_path / 'cifar10').rmdir()
  (tmp_path / 'cifar10').touch()
  assert not stats_file.is_shipped('cifar10')
  assert stats_file.locate('cifar10', 'digits').name == 'cifar10'
