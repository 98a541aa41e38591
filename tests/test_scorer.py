"""Scores of sets of images: against a reference, and against each other."""

import jax.numpy as jnp
import numpy as np
import pytest
import runs
import scipy.special

from msfp_jax import data as data_lib
from msfp_jax.metrics import collect
from msfp_jax.metrics import features
from msfp_jax.metrics import frechet
from msfp_jax.metrics import kernel_distance
from msfp_jax.metrics import neighbours
from msfp_jax.metrics import scorer as scorer_lib
from msfp_jax.metrics import stats_file


def smooth(count, seed, size=8):
  return runs.smooth(count, size, size, 1, seed)


def scorer_of(images, name, num_vectors=0):
  network = features.get(name, images.shape[1:])
  return scorer_lib.Scorer(
      network, stats_file.measure(images, network, 'test', num_vectors))


@pytest.fixture(scope='module')
def scores():
  """Scores three sets: the data itself, itself again, and others."""
  scorer = scorer_of(smooth(200, 0), 'random')
  return scorer, [scorer.score(smooth(200, seed)) for seed in (0, 0, 1)]


def test_the_first_call_is_the_reference(scores):
  scorer, (first, same, other) = scores
  assert scorer.metric == 'fd_random'
  assert list(first) == ['fd_random']
  assert list(same) == list(other) == [
      'fd_random', 'fd_random_to_fp', 'psnr_to_fp']
  assert same['psnr_to_fp'] == 100
  assert abs(same['fd_random_to_fp']) < 1e-6
  assert other['psnr_to_fp'] < 30 and other['fd_random_to_fp'] > 1e-3


def test_the_reference_stays_the_first(scores):
  _, (first, same, other) = scores
  assert abs(first['fd_random']) < 1e-6
  assert same['fd_random'] == first['fd_random']
  # The data are the reference's images here.
  assert other['fd_random'] == pytest.approx(other['fd_random_to_fp'])


def test_digits_are_also_classified():
  images = smooth(140, 0, 16)
  scorer = scorer_of(images, 'digits')
  first, second = scorer.score(images), scorer.score(images)
  assert list(first) == ['fd_digits', 'confidence', 'class_balance']
  assert second['label_agreement'] == 1
  assert second.keys() - first.keys() == {
      'fd_digits_to_fp', 'psnr_to_fp', 'ssim_to_fp', 'label_agreement'}


class Counted:
  """Images of which only so many may be asked for at once."""

  def __init__(self, images):
    self.images, self.shape, self.asked = images, images.shape, []

  def __len__(self):
    return len(self.images)

  def __getitem__(self, rows):
    self.asked.append(rows)
    return self.images[rows]


def test_the_data_are_read_in_chunks(monkeypatch, caplog):
  images = smooth(600, 0)
  whole = scorer_of(images, 'random').score(images[:300])
  monkeypatch.setattr(collect, '_CHUNK_BYTES', 1)  # a network's batch
  counted = Counted(images)
  with caplog.at_level('INFO', 'absl'):
    scorer = scorer_of(counted, 'random')
  assert counted.asked == [slice(i, i + 256) for i in (0, 256, 512)]
  assert 'fd_random 600/600 (100%)' in caplog.text
  assert scorer.score(images[:300]) == pytest.approx(whole)


def test_features_that_do_not_fit_the_data():
  with pytest.raises(ValueError, match="'digits' takes.*use 'random'"):
    scorer_of(smooth(4, 0), 'digits')
  with pytest.raises(ValueError, match="'nope': must be one of"):
    scorer_of(smooth(4, 0), 'nope')


def test_sets_are_compared_by_their_vectors_too():
  data, images = smooth(150, 0), smooth(140, 1)
  found = scorer_of(data, 'random', num_vectors=100).score(images)
  network = features.get('random', data.shape[1:])
  # Rows at equal distances.
  real = network.outputs(data[np.arange(100) * 150 // 100]).features
  generated = network.outputs(images[np.arange(100) * 140 // 100]).features
  shares = neighbours.precision_recall(generated, real)
  assert found['precision_random'] == shares.precision
  assert found['recall_random'] == shares.recall
  assert found['kd_random'] == kernel_distance.of_all(generated, real)
  assert 'kd_random_std' not in found


def test_large_sets_have_kernel_distances_of_subsets(monkeypatch):
  monkeypatch.setattr(kernel_distance, 'SUBSET_SIZE', 60)
  data, images = smooth(150, 0), smooth(150, 1)
  found = scorer_of(data, 'random', num_vectors=150).score(images)
  network = features.get('random', data.shape[1:])
  kernel = kernel_distance.of_subsets(
      network.outputs(images).features, network.outputs(data).features, size=60)
  assert found['kd_random'] == kernel.mean
  assert found['kd_random_std'] == kernel.std > 0


@pytest.mark.parametrize('provenance, told', [
    ({'features': 'digits'}, "features: 'digits' there, 'random' here"),
    ({'image_shape': [9, 9, 3]}, r'image_shape: \[9, 9, 3\] there'),
    ({'features': 'random', 'num_samples': 3}, None), ({}, None)])
def test_statistics_of_other_features_are_refused(provenance, told):
  images = smooth(150, 0)
  network = features.get('random', images.shape[1:])
  reference = stats_file.measure(images, network, 'test')._replace(
      provenance=provenance)
  if told is None:
    assert scorer_lib.Scorer(network, reference).provenance['reference'] == {
        name: value for name, value in provenance.items()
        if name != 'features'}
    return
  with pytest.raises(ValueError, match=told):
    scorer_lib.Scorer(network, reference)


def gaussian(vectors):
  return frechet.Gaussian(vectors.mean(axis=0), np.cov(vectors.T), len(vectors))


def test_distances_are_to_the_data_and_to_the_first_set():
  """Three different sets, so that none can stand for another."""
  data, first, second = (smooth(count, seed) for seed, count in enumerate(
      (150, 160, 160)))
  scorer = scorer_of(data, 'random')
  scorer.score(first)
  found = scorer.score(second)
  network = features.get('random', data.shape[1:])
  of_data, of_first, of_second = (
      gaussian(np.float64(network.outputs(x).features))
      for x in (data, first, second))
  distance = frechet.frechet_distance
  assert found['fd_random'] == pytest.approx(distance(of_second, of_data))
  assert found['fd_random_to_fp'] == pytest.approx(
      distance(of_second, of_first))
  assert abs(found['fd_random'] / found['fd_random_to_fp'] - 1) > 0.01
  mse = np.mean((np.float64(first) - second)**2, axis=(1, 2, 3))
  assert found['psnr_to_fp'] == pytest.approx(
      np.mean(10 * np.log10(255**2 / mse)))


def test_classes_are_those_of_the_classifier_in_both_sets():
  images, _ = data_lib.digits()
  scorer = scorer_of(images[:400], 'digits')
  first = images[400:700]
  second = np.where(np.arange(300)[:, None, None, None] % 3, first, 255 - first)
  found = [scorer.score(first), scorer.score(second)]
  network = features.get('digits', (16, 16, 1))
  p = [scipy.special.softmax(np.float64(network.outputs(x).logits), axis=1)
       for x in (first, second)]
  for row, probabilities in zip(found, p, strict=True):
    assert row['confidence'] == pytest.approx(
        probabilities.max(axis=1).mean(), rel=1e-6)
    mean = probabilities.mean(axis=0)
    assert row['class_balance'] == pytest.approx(
        -(mean * np.log(mean)).sum() / np.log(10), rel=1e-6)
  agree = np.mean(p[0].argmax(axis=1) == p[1].argmax(axis=1))
  assert 0.5 < agree < 0.9
  assert found[1]['label_agreement'] == agree


def test_the_inception_score_is_of_the_logits():
  """A network of one's own, whose logits are the first pixels."""
  images = smooth(130, 0)
  network = features.FeatureNetwork(
      'own', (8, 8, 1), lambda params, x: features.Outputs(
          jnp.float32(x).reshape(len(x), -1)[:, :6],
          jnp.float32(x).reshape(len(x), -1)[:, :4] / 32), {},
      uses_of_logits=['class_score'])
  found = scorer_lib.Scorer(
      network, stats_file.measure(images, network, 'test')).score(images)
  order = np.random.RandomState(2020).permutation(130)
  p = scipy.special.softmax(
      np.float64(images[order]).reshape(130, -1)[:, :4] / 32, axis=1)
  scores = [np.exp(np.mean(np.sum(q * np.log(q / q.mean(axis=0)), axis=1)))
            for q in np.split(p, 10)]
  assert found['is_own'] == pytest.approx(np.mean(scores), rel=1e-5)
  assert found['is_own_std'] == pytest.approx(np.std(scores), rel=1e-4)
  assert 'confidence' not in found


def test_without_a_reference_only_the_first_call_is_compared_with():
  network = features.get('random', (8, 8, 1))
  scorer = scorer_lib.Scorer(network, stats_file.NOTHING)
  assert scorer.least_samples == 2
  assert scorer.provenance['reference'] == {}
  assert scorer.score(smooth(20, 0)) == {}
  with pytest.warns(frechet.FewSamplesWarning):
    found = scorer.score(smooth(20, 1))
  assert list(found) == ['fd_random_to_fp', 'psnr_to_fp']
