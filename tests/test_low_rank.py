"""The nearest matrices of few singular vectors."""

import numpy as np
import pytest
from scipy import linalg

from msfp_jax.quant import low_rank


def draw(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def left(matrix, factors):
  """What the factors leave of a matrix: the norm, in float64."""
  down, up = map(np.float64, factors)
  return linalg.norm(matrix - down @ up)


@pytest.mark.parametrize('shape', [(40, 12), (12, 40), (1, 5), (5, 1)])
def test_no_matrix_of_that_rank_is_nearer(shape):
  """Eckart and Young: what is left has the singular values that follow."""
  matrix = draw(shape)
  values = linalg.svdvals(np.float64(matrix))
  for rank in (1, min(shape)):
    down, up = low_rank.exact(matrix, rank)
    assert down.shape == (shape[0], rank) and up.shape == (rank, shape[1])
    np.testing.assert_allclose(
        left(matrix, (down, up)), linalg.norm(values[rank:]), rtol=1e-9,
        atol=1e-6)
    # Both sides carry the same share.
    np.testing.assert_allclose(
        linalg.norm(down, axis=0), linalg.norm(up, axis=1), rtol=1e-9)


@pytest.mark.parametrize('shape', [(300, 120), (60, 200), (1, 5), (5, 1)])
def test_the_quick_one_is_nearly_as_near(shape):
  """Of normal numbers, whose singular values hardly differ: its worst case."""
  matrix = draw(shape)
  rank = min(*shape, 16)
  quick = left(matrix, low_rank.randomized(matrix, rank))
  exact = left(matrix, low_rank.exact(matrix, rank))
  assert quick <= 1.01 * exact + 1e-5


def test_a_matrix_of_that_rank_comes_back():
  matrix = np.float64(draw((200, 5))) @ draw((5, 90), 1)
  assert left(matrix, low_rank.randomized(matrix, 5)) < (
      1e-5 * linalg.norm(matrix))


def test_a_seed_gives_the_same_factors_each_time():
  matrix = draw((100, 80))
  first, again, other = (low_rank.randomized(matrix, 4, seed)
                         for seed in (0, 0, 1))
  np.testing.assert_array_equal(first[0], again[0])
  np.testing.assert_array_equal(first[1], again[1])
  assert not np.array_equal(first[0], other[0])
