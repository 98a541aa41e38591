"""Inception score, precision and recall, kernel distance: known answers."""

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special

from msfp_jax.metrics import frechet
from msfp_jax.metrics import inception_score
from msfp_jax.metrics import kernel_distance
from msfp_jax.metrics import neighbours


def normal(count, dim, seed=0, shift=0.0):
  return np.random.RandomState(seed).standard_normal((count, dim)) + shift


def score_of(p):
  """Computes exp(E KL(p || mean p)) of probabilities by its formula."""
  return np.exp(np.mean(np.sum(p * np.log(p / p.mean(axis=0)), axis=1)))


def inception_score_of(logits):
  score = inception_score.InceptionScore(len(logits))
  score.update(logits)
  return score.result()


def test_score_of_shuffled_splits_is_torch_fidelity_s():
  logits = 3 * normal(57, 6)
  order = np.random.RandomState(2020).permutation(57)
  p = scipy.special.softmax(logits[order], axis=1)
  scores = [score_of(p[i * 57 // 10:(i + 1) * 57 // 10]) for i in range(10)]
  found = inception_score_of(logits)
  assert found.mean == pytest.approx(np.mean(scores), rel=1e-12)
  assert found.std == pytest.approx(np.std(scores), rel=1e-10)


def test_score_runs_from_one_to_the_number_of_classes():
  same = inception_score_of(np.ones((40, 5)))
  assert same.mean == pytest.approx(1, abs=1e-14)
  order = np.random.RandomState(2020).permutation(400)  # of the splits
  sure = np.empty((400, 4))
  sure[order] = 1e4 * np.tile(np.eye(4), (100, 1))
  assert inception_score_of(sure).mean == pytest.approx(4)


def test_score_in_batches_is_that_of_all():
  logits = 3 * normal(64, 6)
  score = inception_score.InceptionScore(64)
  with pytest.raises(ValueError, match='0 of 64 images'):
    score.result()
  for batch in np.split(logits, [7, 40]):
    score.update(batch)
  assert score.result().mean == pytest.approx(
      inception_score_of(logits).mean, rel=1e-12)
  with pytest.raises(ValueError, match='65 images, 64 were announced'):
    score.update(logits[:1])


def test_scores_that_there_are_not():
  with pytest.raises(ValueError, match='0 images'):
    inception_score.InceptionScore(0)
  with pytest.raises(ValueError, match='9 images, needs at least 10'):
    inception_score.InceptionScore(9)
  with pytest.raises(ValueError, match='1 of 10 images hold NaN'):
    logits = np.ones((10, 3))
    logits[4, 1] = np.nan
    inception_score_of(logits)
  with pytest.raises(ValueError, match=r'\[N, K\]'):
    inception_score_of(np.ones(12))


def manifold_shares(generated, real, k):
  """Computes precision and recall with the whole distance matrices."""
  cdist = scipy.spatial.distance.cdist
  reach = lambda x: np.sort(cdist(x, x), axis=1)[:, k]
  inside = lambda a, b: np.mean((cdist(a, b) <= reach(b)).any(axis=1))
  return inside(generated, real), inside(real, generated)


@pytest.mark.parametrize('block', [7, 64, 2048])
@pytest.mark.parametrize('k', [1, 3])
def test_precision_and_recall_in_blocks(monkeypatch, block, k):
  monkeypatch.setattr(neighbours, '_BLOCK', block)
  generated, real = 0.7 * normal(90, 5, 1, 0.3), normal(110, 5, 2)
  found = neighbours.precision_recall(generated, real, k)
  assert found == pytest.approx(manifold_shares(generated, real, k))
  assert found.precision > found.recall > 0


def test_precision_and_recall_of_one_set_and_of_strangers():
  x = normal(50, 4)
  assert neighbours.precision_recall(x, x) == (1, 1)
  assert neighbours.precision_recall(x, x + 100) == (0, 0)


def kernel_formula(a, b):
  """Computes the unbiased estimator term by term."""
  k = lambda x, y: (x @ y / len(x) + 1) ** 3
  among = lambda s: np.mean([k(x, y) for i, x in enumerate(s)
                             for j, y in enumerate(s) if i != j])
  return among(a) + among(b) - 2 * np.mean([k(x, y) for x in a for y in b])


@pytest.mark.parametrize('block', [4, 2048])
def test_kernel_distance_is_the_formula(monkeypatch, block):
  monkeypatch.setattr(kernel_distance, '_BLOCK', block)
  a, b = normal(9, 3, 1), normal(12, 3, 2, 0.5)
  assert kernel_distance.of_all(a, b) == pytest.approx(
      kernel_formula(a, b), rel=1e-10)


def test_kernel_distance_on_subsets():
  a, b = normal(40, 3, 1), normal(30, 3, 2, 0.5)
  found = kernel_distance.of_subsets(a, b, 5, 30)
  rng = np.random.RandomState(2020)
  expected = []
  for _ in range(5):
    first = a[rng.choice(40, 30, replace=False)]
    expected.append(kernel_formula(first, b[rng.choice(30, 30, replace=False)]))
  assert found.mean == pytest.approx(np.mean(expected), rel=1e-10)
  assert found.std == pytest.approx(np.std(expected), rel=1e-8)
  with pytest.raises(ValueError, match='at least 31 samples.*40 and 30'):
    kernel_distance.of_subsets(a, b, 5, 31)
  with pytest.raises(ValueError, match='size=1'):
    kernel_distance.of_subsets(a, b, 5, 1)


@pytest.mark.parametrize('metric', [
    neighbours.precision_recall, kernel_distance.of_all])
def test_sets_that_cannot_be_compared(metric):
  x = normal(9, 3)
  with pytest.raises(ValueError, match='3 and 2 dimensions'):
    metric(x, x[:, :2])
  with pytest.raises(ValueError, match='9 and 0'):
    metric(x, x[:0])
  with pytest.raises(ValueError, match='second set have the same'):
    metric(x, np.ones((9, 3)))
  with pytest.raises(ValueError, match='1 of 9 feature vectors hold NaN'):
    bad = x.copy()
    bad[2] = np.nan
    metric(bad, x)


def test_neighbours_that_there_are_not():
  with pytest.raises(ValueError, match='k=0'):
    neighbours.precision_recall(normal(9, 2), normal(9, 2), 0)
  with pytest.raises(ValueError, match='at least 4 samples'):
    neighbours.precision_recall(normal(3, 2), normal(9, 2))


def test_frechet_of_float32_features_that_are_all_alike_but_for_rounding():
  x = np.float32(0.3) * np.ones((50, 6), np.float32)
  x[::2] = np.nextafter(x[::2], np.float32(1))
  alike, other = frechet.GaussianStats(), frechet.GaussianStats()
  alike.update(x)
  other.update(normal(50, 6))
  with pytest.raises(ValueError, match='first set have the same'):
    frechet.frechet_distance(alike, other)
