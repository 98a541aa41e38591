"""LPIPS: its distances, the weights that it reads, and the scores it enters."""

import lpips_oracle
import numpy as np
import pytest
import runs
from safetensors.numpy import save_file
import torch_writer
import unet_oracle

from msfp_jax.metrics import classifier_files
from msfp_jax.metrics import features
from msfp_jax.metrics import lpips
from msfp_jax.metrics import scorer as scorer_lib
from msfp_jax.metrics import stats_file


def network(name, seed=0):
  return lpips.Lpips(name, lpips.params_of(
      name, lpips_oracle.random_state(name, seed)))


@pytest.mark.parametrize('name', lpips.TRUNKS)
def test_distances_are_torch_fidelity_s(name):
  with np.load(unet_oracle.GOLDEN / 'lpips.npz') as golden:
    expected = golden[name]
  found = lpips.distances(
      name, network(name).params, *lpips_oracle.random_pairs())
  assert expected.min() > 1e-5 and expected[0] < expected[-1] / 2
  np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.slow
def test_the_mean_over_images_of_any_number(monkeypatch):
  """In chunks of two; equal images are at 0, grey ones as coloured ones."""
  monkeypatch.setattr(lpips, '_PIXELS', 2 * 40 * 48 + 1)
  alex = network('alex')
  a, b = lpips_oracle.random_pairs((5, 40, 48, 3))
  each = np.asarray(lpips.distances('alex', alex.params, a, b))
  assert alex.distance(a, b) == pytest.approx(np.mean(each), rel=1e-6)
  assert 0 <= alex.distance(a, a) < 1e-12
  grey = lambda x: x[..., :1].repeat(3, axis=-1)
  assert alex.distance(a[..., :1], b[..., :1]) == pytest.approx(
      alex.distance(grey(a), grey(b)), rel=1e-6)


def test_images_that_cannot_be_compared():
  alex, vgg = network('alex'), network('vgg')
  a = np.zeros((1, 31, 31, 3), np.uint8)
  assert alex.distance(a, a) < 1e-12  # the least
  vgg.check((16, 16, 1))
  with pytest.raises(ValueError, match=r'alex.*31 x 31 pixels.*\(30, 31, 3\)'):
    alex.distance(a[:, 1:], a[:, 1:])
  with pytest.raises(ValueError, match=r'16 x 16 pixels, grey or in colours'):
    vgg.check((16, 16, 4))
  with pytest.raises(ValueError, match=r'\[1, 31, 31, 3\] and \[2, 31'):
    alex.distance(a, np.concatenate([a, a]))
  with pytest.raises(ValueError, match='lpips: a must be uint8'):
    alex.distance(a / 255, a / 255)


@pytest.mark.parametrize('save', [
    torch_writer.save_zip, lambda path, state: save_file(state, path)],
    ids=['pth', 'safetensors'])
def test_weights_are_torchvision_s(tmp_path, save):
  """With the dense layers, which are not needed."""
  path = tmp_path / ('w.pth' if save is torch_writer.save_zip
                     else 'w.safetensors')
  state = lpips_oracle.random_state('alex')
  save(path, state | {'classifier.1.weight': np.ones((2, 3), np.float32)})
  found = lpips.load(f'alex:{path}')
  a, b = lpips_oracle.random_pairs()
  assert found.distance(a, b) == network('alex').distance(a, b)
  assert found.provenance['lpips'] == 'alex'
  assert len(found.provenance['lpips_sha256']) == 64


def test_other_weights_are_refused(tmp_path):
  state = lpips_oracle.random_state('alex')
  path = tmp_path / 'w.safetensors'
  save_file(state, path)
  with pytest.raises(ValueError, match=r"weights of vgg.*\n.*\n*.*features"):
    lpips.load(f'vgg:{path}')
  named = tmp_path / lpips.TRUNKS['alex'].file
  torch_writer.save_zip(named, state)
  with pytest.raises(ValueError, match='damaged: its SHA-256 is'):
    lpips.load(f'alex:{named}')
  with pytest.raises(FileNotFoundError, match='none.pth'):
    lpips.load('alex:none.pth')


def test_the_weights_of_the_distance_are_the_published_ones():
  """As the package lpips 0.1.4 has them, compared when they were copied."""
  assert classifier_files.digest(lpips.LINEAR) == (
      'fd30720767e733e5a02b8d885ea8d12c3654c01207826373289bc74698c5a33a')


@pytest.mark.parametrize('text', ['alex', 'alex:', 'squeeze:w.pth', 'w.pth'])
def test_another_text_says_what_to_write(text):
  with pytest.raises(ValueError, match=r"'alex:PATH'.*alexnet-owt-7be5be79"):
    lpips.check(text)
  assert lpips.check('vgg:a:b.pth') == 'a:b.pth'
  assert lpips.check('') == ''


@pytest.mark.optimized
def test_scores_have_it_where_its_weights_are():
  images = runs.smooth(140, 40, 40, 3)
  random = features.get('random', (40, 40, 3))
  alex = lpips.Lpips('alex', network('alex').params, {'lpips': 'alex'})
  scorer = scorer_lib.Scorer(
      random, stats_file.measure(images, random, 'test', 0), alex)
  assert 'lpips_alex_to_fp' not in scorer.score(images)
  found = scorer.score(255 - images)
  assert found['lpips_alex_to_fp'] == alex.distance(255 - images, images) > 0
  assert 'lpips_vgg_to_fp' not in found
  assert scorer.provenance['lpips'] == 'alex'
  with pytest.raises(ValueError, match='31 x 31'):
    scorer_lib.Scorer(
        features.get('random', (8, 8, 1)), stats_file.NOTHING, alex)
