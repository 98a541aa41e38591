"""Live comparison of the metrics with torch-fidelity (`make parity`).

The imports of PyTorch stand inside the tests, as in test_parity.py.
"""

import inception_oracle
import jax
import lpips_oracle
import numpy as np
import pytest
import unet_oracle

from msfp_jax.metrics import frechet
from msfp_jax.metrics import inception
from msfp_jax.metrics import inception_score
from msfp_jax.metrics import inception_weights
from msfp_jax.metrics import kernel_distance
from msfp_jax.metrics import lpips
from msfp_jax.metrics import neighbours
from msfp_jax.metrics import preprocess

pytestmark = pytest.mark.parity


@pytest.fixture(scope='module')
def state():
  return inception_oracle.random_state(3)


@pytest.mark.parametrize('shape', [(3, 32, 32, 3), (2, 320, 256, 3)])
def test_inception_equals_torch_fidelity(state, shape):
  images = inception_oracle.random_images(shape, 1)
  expected = inception_oracle.outputs(state, images)
  actual = jax.jit(lambda params, images: inception.apply(
      params, preprocess.to_inception(images)))(
          inception_weights.fold(state), images)
  for name, value in actual._asdict().items():
    error = unet_oracle.rel_l2(value, getattr(expected, name))
    print(f'{shape}, {name}: {error:.1e}')
    assert error < 5e-6, name


@pytest.mark.parametrize('name', lpips.TRUNKS)
@pytest.mark.parametrize('shape', [(4, 32, 32, 3), (2, 161, 130, 3)])
def test_lpips_equals_torch_fidelity_s(name, shape):
  state = lpips_oracle.random_state(name, 3)
  pairs = lpips_oracle.random_pairs(shape, 4)
  expected = lpips_oracle.distances(name, state, *pairs)
  actual = lpips.distances(name, lpips.params_of(name, state), *pairs)
  np.testing.assert_allclose(actual, expected, rtol=2e-5)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_weights_of_torch_and_of_torchscript(state, tmp_path):
  import torch
  network = inception_oracle.network(state, ['2048'])

  class Layers(torch.nn.Module):
    """The layers of torch-fidelity's network; torch cannot script the rest."""

    def __init__(self):
      super().__init__()
      for name, child in network.named_children():
        setattr(self, name, child)

    def forward(self, x):
      return self.Conv2d_1a_3x3(x)

  torch.save(network.state_dict(), tmp_path / 'w.pth')
  torch.jit.save(torch.jit.script(Layers()), tmp_path / 'w.pt')
  expected = inception_weights.fold(state)
  for name in ('w.pth', 'w.pt'):
    jax.tree.map(np.testing.assert_array_equal,
                 inception_weights.load(tmp_path / name), expected)


SIZES = [(32, 32), (64, 48), (256, 256), (299, 299), (301, 512)]


def channels_first(images):
  import torch
  return torch.from_numpy(images).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize('height, width', SIZES)
def test_tensorflow_s_resize_is_bit_exact(height, width):
  with inception_oracle.imports():
    from torch_fidelity import interpolate_compat_tensorflow as theirs
  images = inception_oracle.random_images((2, height, width, 3))
  expected = theirs.interpolate_bilinear_2d_like_tensorflow1x(
      channels_first(images), size=(299, 299), align_corners=False)
  expected = (expected - 128) / 128
  actual = jax.jit(preprocess.to_inception)(images)
  np.testing.assert_array_equal(
      actual, expected.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize('height, width', SIZES)
def test_pytorch_s_resize(height, width):
  import torch
  images = inception_oracle.random_images((2, height, width, 3))
  expected = 2 * torch.nn.functional.interpolate(
      channels_first(images) / 255, (299, 299), mode='bilinear',
      align_corners=False) - 1
  actual = preprocess.to_inception(images, 'pytorch')
  np.testing.assert_allclose(
      actual, expected.permute(0, 2, 3, 1).numpy(), atol=1e-6)


def vectors(count, seed, shift=0.0, dim=48):
  rng = np.random.RandomState(seed)
  mixed = rng.standard_normal((count, dim)) @ rng.standard_normal((dim, dim))
  return np.abs(mixed) / 8 + shift


def gaussian(x):
  stats = frechet.GaussianStats()
  for batch in np.array_split(x, 7):
    stats.update(batch)
  return stats


def agree(name, actual, expected):
  print(f'{name}: {actual:.12g} and {expected:.12g}')
  assert actual == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_equals_torch_fidelity():
  import torch
  with inception_oracle.imports():
    from torch_fidelity import metric_fid as theirs
  a, b = vectors(500, 0), vectors(400, 1, 0.2)
  expected = theirs.fid_statistics_to_metric(
      *(theirs.fid_features_to_statistics(torch.from_numpy(x))
        for x in (a, b)), verbose=False)
  agree('FID', frechet.frechet_distance(gaussian(a), gaussian(b)),
        expected[theirs.KEY_METRIC_FID])


def test_inception_score_equals_torch_fidelity():
  import torch
  with inception_oracle.imports():
    from torch_fidelity import metric_isc as theirs
  logits = np.random.RandomState(0).normal(0, 3, (503, 1008))
  logits = logits.astype(np.float32)
  score = inception_score.InceptionScore(len(logits))
  score.update(logits)
  found = score.result()
  expected = theirs.isc_features_to_metric(torch.from_numpy(logits))
  agree('IS', found.mean, expected[theirs.KEY_METRIC_ISC_MEAN])
  agree('IS, std', found.std, expected[theirs.KEY_METRIC_ISC_STD])


def test_kernel_distance_equals_torch_fidelity():
  import torch
  with inception_oracle.imports():
    from torch_fidelity import metric_kid as theirs
  a, b = vectors(500, 0), vectors(400, 1, 0.2)
  found = kernel_distance.of_subsets(a, b, 20, 150)
  expected = theirs.kid_features_to_metric(
      torch.from_numpy(a), torch.from_numpy(b), kid_subsets=20,
      kid_subset_size=150, verbose=False)
  agree('KID', found.mean, expected[theirs.KEY_METRIC_KID_MEAN])
  agree('KID, std', found.std, expected[theirs.KEY_METRIC_KID_STD])
  kernels = [theirs.kernel_poly(x, y) for x, y in (
      (a[:400], a[:400]), (a[:400], b), (b, b))]
  agree('KID of all', kernel_distance.of_all(a[:400], b),
        theirs.mmd2(*kernels))


def test_precision_and_recall_equal_torch_fidelity():
  import torch
  with inception_oracle.imports():
    from torch_fidelity import metric_prc as theirs
  generated, real = vectors(500, 0), vectors(400, 0, 0.1)
  found = neighbours.precision_recall(generated, real)
  expected = theirs.prc_features_to_metric(
      torch.from_numpy(generated), torch.from_numpy(real), verbose=False)
  assert 0 < found.recall < 1
  agree('precision', found.precision, expected[theirs.KEY_METRIC_PRECISION])
  agree('recall', found.recall, expected[theirs.KEY_METRIC_RECALL])
