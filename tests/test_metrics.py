"""Tests of metrics/: distances, feature networks, checks of digits."""

import os

import numpy as np
import pytest
import scipy.linalg

from msfp_jax import data
from msfp_jax.metrics import class_checks
from msfp_jax.metrics import digits_classifier
from msfp_jax.metrics import features
from msfp_jax.metrics import frechet
from msfp_jax.metrics import train_digits_classifier


def _correlated(count, dim, seed):
  rng = np.random.RandomState(seed)
  return rng.standard_normal((count, dim)) @ rng.standard_normal((dim, dim))


def _stats(x, batch=None):
  stats = frechet.GaussianStats()
  for start in range(0, len(x), batch or len(x)):
    stats.update(x[start:start + (batch or len(x))])
  return stats


def _normalised(count=400, dim=2, seed=0):
  """Draws samples with mean 0 and the identity as covariance, exactly."""
  x = np.random.RandomState(seed).standard_normal((count, dim))
  x -= x.mean(axis=0)
  return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T


def test_streamed_statistics_are_numpy_s_mean_and_cov():
  x = _correlated(103, 5, 0)
  stats = _stats(x, batch=10)
  assert stats.num_samples == 103
  assert stats.cov.dtype == np.float64
  np.testing.assert_allclose(stats.mean, x.mean(axis=0), rtol=0, atol=1e-13)
  np.testing.assert_allclose(stats.cov, np.cov(x.T), rtol=0, atol=1e-12)


def test_covariance_survives_a_large_mean():
  x = _correlated(100, 3, 1) + 1e7
  np.testing.assert_allclose(_stats(x, 7).cov, np.cov(x.T), rtol=1e-7)


def test_distance_has_the_closed_form_of_diagonal_gaussians():
  x = _normalised()
  s1, s2, shift = np.array([1., 3.]), np.array([2., .5]), np.array([.3, -4.])
  distance = frechet.frechet_distance(_stats(x * s1), _stats(x * s2 + shift))
  expected = (shift**2).sum() + ((s1 - s2) ** 2).sum()
  assert distance == pytest.approx(expected, rel=1e-10)


def test_distance_agrees_with_sqrtm_and_is_symmetric():
  a, b = _stats(_correlated(60, 8, 4)), _stats(_correlated(70, 8, 5) + 1)
  root = scipy.linalg.sqrtm(np.asarray(a.cov @ b.cov)).real
  expected = (((a.mean - b.mean) ** 2).sum()
              + np.trace(a.cov + b.cov - 2 * root))
  assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
  assert frechet.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_distance_of_a_set_to_itself_is_zero():
  stats = _stats(_correlated(100, 20, 6))
  assert 0 <= frechet.frechet_distance(stats, stats) < 1e-6


def test_fewer_samples_than_dimensions_warn_and_count_the_mean_still():
  x = _correlated(5, 8, 7)
  with pytest.warns(frechet.FewSamplesWarning, match='first set has 5 samples'):
    distance = frechet.frechet_distance(
        _stats(x), frechet.Gaussian(x.mean(axis=0) + 2, np.cov(x.T), None))
  assert distance == pytest.approx(8 * 2**2, rel=1e-6)


def test_sets_without_statistics_are_refused():
  good = _stats(_correlated(9, 2, 8))
  with pytest.raises(ValueError, match='0 samples'):
    frechet.frechet_distance(good, frechet.GaussianStats())
  with pytest.raises(ValueError, match='of 1 samples'):
    frechet.frechet_distance(good, _stats(np.ones((1, 2))))
  with pytest.raises(ValueError, match='second set have the same'):
    frechet.frechet_distance(good, _stats(np.full((50, 2), 0.1), 7))
  with pytest.raises(ValueError, match='2 and 3 dimensions'):
    frechet.frechet_distance(good, _stats(_correlated(9, 3, 8)))


def test_refused_features_leave_the_statistics_alone():
  x = _correlated(9, 2, 9)
  stats = _stats(x)
  bad = x.copy()
  bad[[1, 4], 0] = np.nan, np.inf
  with pytest.raises(ValueError, match='2 of 9 feature vectors'):
    stats.update(bad)
  with pytest.raises(ValueError, match='3 dimensions'):
    stats.update(np.ones((4, 3)))
  with pytest.raises(ValueError, match=r'\[N, D\]'):
    stats.update(np.ones(3))
  np.testing.assert_allclose(stats.cov, np.cov(x.T))


def _noise(count, shape, seed=0):
  return np.random.RandomState(seed).randint(
      0, 256, (count, *shape), dtype=np.uint8)


@pytest.fixture(scope='module')
def digits_network():
  return features.get('digits', (16, 16, 1))


@pytest.fixture(scope='module')
def held_out():
  images, labels = data.digits()
  _, test = train_digits_classifier.split(len(images), 0)
  return images[test], labels[test]


@pytest.mark.parametrize('shape', [(16, 16, 1), (5, 9, 3), (1, 1, 4)])
def test_random_features_of_any_shape(shape):
  network = features.get('random', shape)
  out = network.outputs(_noise(3, shape)).features
  assert out.shape == (3, network.dim) == (3, 128)
  assert out.dtype == np.float32
  assert np.isfinite(out).all()
  assert network.metric == 'fd_random'


def test_first_random_layer_is_a_pooled_convolution():
  images = _noise(1, (4, 4, 1))
  x = np.pad(images[0, ..., 0] / 127.5 - 1.0, ((0, 1), (0, 1)))
  kernel = np.random.RandomState(0).standard_normal((3, 3, 1, 8)) * (2 / 9)**.5
  # SAME with stride 2 on an even size pads at the end only.
  windows = [x[i:i + 3, j:j + 3] for i in (0, 2) for j in (0, 2)]
  out = np.array([[(w * kernel[..., 0, k]).sum() for k in range(8)]
                  for w in windows])
  out = np.where(out > 0, out, 0.2 * out)
  got = features.get('random', (4, 4, 1)).outputs(images).features[0, :16]
  np.testing.assert_allclose(got[:8], out.mean(axis=0), atol=1e-5)
  np.testing.assert_allclose(got[8:], out.std(axis=0), atol=1e-5)


def test_features_repeat_and_do_not_depend_on_the_batch():
  images = _noise(300, (16, 16, 1))  # one full batch and a partial one
  network = features.get('random', (16, 16, 1))
  whole = network.outputs(images).features
  again = features.get('random', (16, 16, 1)).outputs(images).features
  np.testing.assert_array_equal(whole, again)
  np.testing.assert_allclose(
      network.outputs(images[290:]).features, whole[290:], rtol=1e-5,
      atol=1e-6)
  assert network.outputs(images[:0]).features.shape == (0, 128)


def test_random_distance_grows_with_the_damage():
  images, _ = data.digits()
  network = features.get('random', (16, 16, 1))
  rng = np.random.RandomState(0)
  clean = _stats(network.outputs(images).features)
  distances = []
  for sigma in (8, 32, 96):
    noisy = np.clip(images + rng.normal(0, sigma, images.shape), 0, 255)
    distances.append(frechet.frechet_distance(
        clean, _stats(network.outputs(np.uint8(noisy)).features)))
  assert 0 < distances[0] < distances[1] < distances[2]


def test_feature_networks_refuse_what_they_cannot_take():
  with pytest.raises(ValueError, match="'vgg'.*'digits', 'incept.*'random'"):
    features.get('vgg', (16, 16, 1))
  with pytest.raises(ValueError, match="32, 32, 3.*'random'"):
    features.get('digits', (32, 32, 3))
  with pytest.raises(ValueError, match='image_shape'):
    features.get('random', (16, 16))
  network = features.get('random', (16, 16, 1))
  with pytest.raises(ValueError, match='float32'):
    network.outputs(np.zeros((2, 16, 16, 1), np.float32))
  with pytest.raises(ValueError, match=r'\[N, 16, 16, 1\].*\[2, 16, 16, 3\]'):
    network.outputs(_noise(2, (16, 16, 3)))


def test_shipped_classifier_is_as_good_as_its_header_says(
    digits_network, held_out):
  images, labels = held_out
  _, metadata = digits_classifier.load()
  logits = digits_network.outputs(images).logits
  accuracy = np.mean(logits.argmax(axis=1) == labels)
  assert accuracy > 0.98
  assert accuracy == pytest.approx(float(metadata['test_accuracy']), abs=3e-3)
  assert digits_classifier.WEIGHTS.stat().st_size < 400_000
  assert 'train_digits_classifier' in metadata['command']


def test_digit_distance_tells_digits_from_missing_ones(digits_network):
  images, labels = data.digits()
  vectors = digits_network.outputs(images).features
  assert vectors.shape == (1797, digits_network.dim)
  halves = frechet.frechet_distance(_stats(vectors[::2]), _stats(vectors[1::2]))
  collapsed = frechet.frechet_distance(
      _stats(vectors), _stats(vectors[labels < 5]))
  assert digits_network.metric == 'fd_digits'
  assert collapsed > 10 * halves


def test_the_test_images_are_not_trained_on():
  train, test = train_digits_classifier.split(1797, 0)
  assert sorted([*train, *test]) == list(range(1797))
  assert len(test) == 359


def test_shift_moves_by_at_most_a_pixel():
  images = np.zeros((200, 5, 5, 1), np.uint8)
  images[:, 2, 2] = 7
  shifted = train_digits_classifier.shift(images, np.random.RandomState(0))
  _, y, x, _ = np.nonzero(shifted)
  assert len(y) == 200
  assert {*zip(y, x, strict=True)} == {
      (i, j) for i in (1, 2, 3) for j in (1, 2, 3)}


@pytest.mark.slow
def test_training_learns():
  images, labels = data.digits()
  params = train_digits_classifier.train(images[:640], labels[:640], 0, 4)
  accuracy = train_digits_classifier.correct(params, images[640:], labels[640:])
  assert accuracy > 0.6


def test_classifier_files_round_trip_and_bad_ones_are_refused(tmp_path):
  path = tmp_path / 'c.safetensors'
  with pytest.raises(FileNotFoundError, match='train_digits_classifier'):
    digits_classifier.load(path)
  params, _ = digits_classifier.load()
  digits_classifier.save(path, params, {'seed': '3'})
  loaded, metadata = digits_classifier.load(path)
  assert metadata['seed'] == '3'
  np.testing.assert_array_equal(
      loaded['conv1']['kernel'], params['conv1']['kernel'])
  assert os.listdir(tmp_path) == ['c.safetensors']
  digits_classifier.save(path, params, {'format_version': '9'})
  with pytest.raises(ValueError, match="version '9'"):
    digits_classifier.load(path)
  digits_classifier.save(path, {'conv1': params['conv1']}, {})
  with pytest.raises(ValueError, match='needed are'):
    digits_classifier.load(path)
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(ValueError, match='c.safetensors is damaged'):
    digits_classifier.load(path)


def test_confidence_is_the_mean_of_the_largest_probability():
  p = [[.5, .3, .2], [0, .1, .9]]
  assert class_checks.confidence(p) == pytest.approx(.7)


def test_label_agreement_is_the_share_of_equal_labels():
  a = np.eye(10)[[1, 2, 3, 4]]
  b = np.eye(10)[[1, 2, 3, 5]]
  assert class_checks.label_agreement(a, b) == 0.75


def test_class_balance_runs_from_one_class_to_all():
  assert class_checks.class_balance(np.eye(10)) == pytest.approx(1)
  assert class_checks.class_balance(np.eye(10)[[3, 3]]) == 0
  half = class_checks.class_balance(np.eye(4)[[0, 1]])
  assert half == pytest.approx(np.log(2) / np.log(4))


@pytest.mark.parametrize('bad, message', [
    (np.ones(3) / 3, r'\[3\]'),
    (np.ones((0, 3)), r'\[0, 3\]'),
    ([[2., 3.], [.5, .5]], '1 of 2 rows'),
    ([[np.nan, 1.], [1.5, -.5]], '2 of 2 rows'),
])
def test_checks_refuse_what_is_no_probability(bad, message):
  for check in (class_checks.confidence, class_checks.class_balance):
    with pytest.raises(ValueError, match=message):
      check(bad)


def test_label_agreement_refuses_unequal_sets():
  with pytest.raises(ValueError, match=r'\[3, 3\] and \[2, 3\]'):
    class_checks.label_agreement(np.eye(3), np.eye(3)[:2])
