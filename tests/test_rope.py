"""Rotary positions against complex numbers in float64."""

import numpy as np
import pytest

from msfp_jax.models import rope


def test_positions_are_of_text_then_rows():
  found = rope.joint_positions(2, 2, 3)
  assert found.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1],
                            [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]


@pytest.mark.parametrize('dims, theta', [
    ((16, 56, 56), 10000.0), ((2, 4, 2), 10000.0), ((0, 2, 6, 4), 2000.0)])
def test_pairs_are_turned_as_complex_numbers(dims, theta):
  rng = np.random.default_rng(0)
  positions = rng.integers(0, 500, (7, len(dims)))
  x = rng.standard_normal((2, 7, 3, sum(dims))).astype(np.float32)
  # Pair k of an axis turns by e^(i position / theta^(2 k / dim)).
  turns, axis_of = [], np.repeat(np.arange(len(dims)), np.array(dims) // 2)
  inside = np.concatenate([np.arange(dim // 2) for dim in dims])
  for axis, k in zip(axis_of, inside, strict=True):
    frequency = theta ** (-2 * k / dims[axis])
    turns.append(np.exp(1j * positions[:, axis] * frequency))
  turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.stack(turns, -1)[:, None]
  found = np.asarray(rope.rotate(x, rope.make_table(positions, dims, theta)))
  np.testing.assert_allclose(found[..., ::2], turned.real, atol=1e-6)
  np.testing.assert_allclose(found[..., 1::2], turned.imag, atol=1e-6)


def test_products_tell_distances_alone():
  """What attention sees of two tokens does not change when both are moved."""
  rng = np.random.default_rng(1)
  q, k = rng.standard_normal((2, 1, 1, 1, 8)).astype(np.float32)
  product = lambda a, b: np.sum(
      rope.rotate(q, rope.make_table(np.array([a]), (2, 4, 2)))
      * rope.rotate(k, rope.make_table(np.array([b]), (2, 4, 2))))
  near = product([0, 3, 9], [0, 5, 2])
  np.testing.assert_allclose(product([0, 13, 29], [0, 15, 22]), near, rtol=1e-5)
  assert abs(product([0, 3, 9], [0, 5, 3]) - near) > 1e-3
