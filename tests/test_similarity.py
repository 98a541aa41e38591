"""PSNR and SSIM of sets of images."""

import numpy as np
import pytest
import scipy.ndimage

from msfp_jax.metrics import similarity


def noise(count, shape, seed=0):
  return np.random.RandomState(seed).randint(
      0, 256, (count, *shape), dtype=np.uint8)


def test_psnr_is_the_mean_over_images():
  a = np.zeros((2, 4, 4, 1), np.uint8)
  b = a.copy()
  b[0], b[1] = 255, 5  # mse 255^2: 0 dB; mse 25
  expected = (0 + 10 * np.log10(255**2 / 25)) / 2
  assert similarity.psnr(a, b) == pytest.approx(expected)
  assert similarity.psnr(b, a) == pytest.approx(expected)


def test_psnr_of_identical_images_is_100():
  a = noise(3, (4, 4, 3))
  assert similarity.psnr(a, a) == pytest.approx(100)


@pytest.mark.parametrize('a, b', [
    (np.zeros((1, 2, 2, 1)), np.zeros((1, 2, 2, 1))),
    (np.zeros((1, 2, 2, 1), np.uint8), np.zeros((2, 2, 2, 1), np.uint8)),
    (np.zeros((2, 2, 1), np.uint8), np.zeros((2, 2, 1), np.uint8)),
    (np.zeros((0, 2, 2, 1), np.uint8), np.zeros((0, 2, 2, 1), np.uint8)),
])
def test_psnr_refuses_what_cannot_be_compared(a, b):
  with pytest.raises(ValueError, match='psnr'):
    similarity.psnr(a, b)


def test_decibels_of_floats_by_hand():
  """In [-1, 1] the peak is 2: an mse of 1/4 has 10 log10(16) dB."""
  a = np.zeros((3, 2, 2, 1), np.float32)
  b = a + np.float32([0.5, 1e-6, 0]).reshape(3, 1, 1, 1)
  found = similarity.decibels(a, b, peak=2, cap=150)
  np.testing.assert_allclose(
      found, [10 * np.log10(16), 10 * np.log10(4e12), 150], rtol=1e-6)
  assert similarity.decibels(a, b, peak=2).tolist()[1:] == [100, 100]


def ssim_of(a, b):
  """Computes the formula of Wang et al. on two planes, in float64."""
  blur = lambda x: scipy.ndimage.gaussian_filter(
      x, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]
  a, b = a / 255, b / 255
  mean_a, mean_b = blur(a), blur(b)
  var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
  cov = blur(a * b) - mean_a * mean_b
  return np.mean(
      (2 * mean_a * mean_b + 1e-4) * (2 * cov + 9e-4)
      / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)))


@pytest.mark.parametrize('shape', [(11, 11, 1), (16, 23, 3)])
def test_ssim_is_wang_et_al_s(shape):
  # More than one chunk; from flat to noisy, from alike to unlike.
  a = noise(300, shape) // np.arange(1, 301).reshape(-1, 1, 1, 1)
  b = a + noise(300, shape, 1) // np.arange(300, 0, -1).reshape(-1, 1, 1, 1)
  a, b = a.astype(np.uint8), b.astype(np.uint8)
  expected = np.mean([ssim_of(x[..., c].astype(float), y[..., c].astype(float))
                      for x, y in zip(a, b, strict=True)
                      for c in range(shape[-1])])
  assert 0.2 < expected < 0.9
  assert similarity.ssim(a, b) == pytest.approx(expected, abs=1e-5)
  assert similarity.ssim(a, a) == pytest.approx(1, abs=1e-6)


def test_ssim_needs_images_as_large_as_its_window():
  a = noise(2, (10, 16, 3))
  assert not similarity.can_ssim(a.shape)
  with pytest.raises(ValueError, match='10, 16.*11 x 11'):
    similarity.ssim(a, a)
