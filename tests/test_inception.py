"""Inception: the network, its weights from every kind of file, its input."""

import http.client
import io
import urllib.error
import urllib.request

import inception_oracle
import jax
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy
import torch_writer
import unet_oracle

from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.metrics import classifier_files
from msfp_jax.metrics import features
from msfp_jax.metrics import inception
from msfp_jax.metrics import inception_names
from msfp_jax.metrics import inception_weights
from msfp_jax.metrics import preprocess
from msfp_jax.metrics import scorer as scorer_lib
from msfp_jax.metrics import stats_file

# A network of two layers, for what does not run it.
SMALL = {'first': (3, 3, 3, 4), 'Mixed.second': (1, 7, 4, 2)}


@pytest.fixture
def small(monkeypatch):
  """Puts a tiny network in Inception's place; returns its state dict."""
  monkeypatch.setattr(inception, 'CONVOLUTIONS', SMALL)
  monkeypatch.setattr(inception, 'NUM_FEATURES', 5)
  monkeypatch.setattr(inception, 'NUM_CLASSES', 3)
  rng = np.random.default_rng(0)
  return {name: rng.uniform(0.5, 2, shape).astype(np.float32)
          for name, shape in inception_names.state_shapes().items()}


def nested(state, make):
  """Nests tensors of dotted names as modules in modules."""
  root = make()
  for name, value in state.items():
    module = root
    *path, leaf = name.split('.')
    for part in path:
      module = module.__dict__.setdefault(part, make())
    setattr(module, leaf, value)
  return root


def save_script(path, state):
  """Saves as torch.jit.save does: objects of the archive's own classes."""
  name = '__torch__.net.___torch_mangle_1.Net'
  torch_writer.save_zip(
      path, lambda made: nested(state, made[name]), extra=[name])


SAVERS = {
    'weights.pth': torch_writer.save_zip, 'old.pth': torch_writer.save_legacy,
    'script.pt': save_script,
    'weights.safetensors':
        lambda path, state: safetensors.numpy.save_file(state, path)}


def test_the_network_computes_what_torch_fidelity_computes():
  params = inception_weights.fold(inception_oracle.random_state())
  images = inception_oracle.random_images(inception_oracle.GOLDEN_SHAPE)
  actual = jax.jit(lambda params, images: inception.apply(
      params, preprocess.to_inception(images)))(params, images)
  with np.load(unet_oracle.GOLDEN / 'inception.npz') as golden:
    assert {*golden} == {*inception.Outputs._fields}
    for name, value in actual._asdict().items():
      assert value.shape == golden[name].shape
      assert unet_oracle.rel_l2(value, golden[name]) < 5e-6, name


def test_there_are_94_convolutions_with_the_published_shapes():
  shapes = inception_names.state_shapes()
  assert len(inception.CONVOLUTIONS) == 94
  assert len(shapes) + 94 == 566  # with num_batches_tracked
  # The published file has 95,628,359 bytes; the zip takes some of them.
  size = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
  assert 95_300_000 < size < 95_628_359


def test_folding_is_batch_normalisation(small):
  rng = np.random.default_rng(1)
  x = rng.standard_normal((1, 3, 3, 3))
  params = inception_weights.fold(small)['first']
  get = lambda leaf: small[f'first.bn.{leaf}'].astype(np.float64)
  product = np.einsum('nijc,dcij->nd', x, small['first.conv.weight'])
  expected = ((product - get('running_mean'))
              / np.sqrt(get('running_var') + 1e-3) * get('weight')
              + get('bias'))
  actual = np.einsum('nijc,ijcd->nd', x, params['kernel']) + params['bias']
  np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize('name', SAVERS)
def test_weights_load_from_every_kind_of_file(tmp_path, small, name):
  extra = {'first.bn.num_batches_tracked': np.array(7)}
  SAVERS[name](tmp_path / name, small | extra)
  loaded = inception_weights.load(tmp_path / name)
  expected = inception_weights.fold(small)
  assert loaded.keys() == expected.keys() == {*SMALL, 'fc'}
  jax.tree.map(np.testing.assert_array_equal, loaded, expected)


# As in the maps by which TensorFlow's weights were first converted.
@pytest.mark.parametrize('name, scripted', [
    ('Conv2d_1a_3x3', 'conv'), ('Conv2d_4a_3x3', 'conv_4'),
    ('Mixed_5b.branch1x1', 'mixed.conv'),
    ('Mixed_5d.branch5x5_2', 'mixed_2.tower.conv_1'),
    ('Mixed_6a.branch3x3', 'mixed_3.conv'),
    ('Mixed_6a.branch3x3dbl_3', 'mixed_3.tower.conv_2'),
    ('Mixed_6d.branch1x1', 'mixed_6.conv'),
    ('Mixed_6d.branch7x7dbl_4', 'mixed_6.tower_1.conv_3'),
    ('Mixed_6e.branch_pool', 'mixed_7.tower_2.conv'),
    ('Mixed_7a.branch3x3_1', 'mixed_8.tower.conv'),
    ('Mixed_7a.branch7x7x3_4', 'mixed_8.tower_1.conv_3'),
    ('Mixed_7b.branch3x3_2a', 'mixed_9.tower_mixed_conv'),
    ('Mixed_7c.branch3x3dbl_3b', 'mixed_10.tower_1_mixed_conv_1'),
    ('Mixed_7c.branch_pool', 'mixed_10.tower_2_conv')])
def test_names_of_the_script(name, scripted):
  assert inception_names.scripted(name) == scripted


def test_tensors_of_the_script_get_the_published_names():
  leaves = {'conv.weight': 'weight', 'bn.bias': 'beta',
            'bn.running_mean': 'mean', 'bn.running_var': 'var'}
  wanted = inception_names.state_shapes()
  tensors = {'output.weight': wanted['fc.weight'],
             'output.bias': wanted['fc.bias']}
  for name in inception.CONVOLUTIONS:
    tensors |= {f'layers.{inception_names.scripted(name)}.{theirs}':
                wanted[f'{name}.{ours}'] for ours, theirs in leaves.items()}
  assert len(tensors) == 4 * 94 + 2
  empty = lambda shape: LazyTensor(shape, np.dtype(np.float32), lambda: None)
  found = inception_names.published(
      {name: empty(shape) for name, shape in tensors.items()})
  assert {name: tensor.shape for name, tensor in found.items()} == wanted
  scale = found['Mixed_7c.branch_pool.bn.weight'].read()
  np.testing.assert_array_equal(scale, np.ones(192))
  left = inception_names.published(
      {name: empty((1,)) for name in ('layers.conv.weight', 'layers.x')})
  assert 'layers.x' in left and 'fc.bias' not in left


def test_other_weights_are_refused_and_all_problems_listed(tmp_path, small):
  path = tmp_path / 'w.pth'
  del small['first.bn.bias']
  small |= {'AuxLogits.fc.weight': np.ones(2, np.float32),
            'fc.weight': np.ones((1000, 5), np.float32)}
  torch_writer.save_zip(path, small)
  with pytest.raises(ValueError) as error:
    inception_weights.load(path)
  for part in (str(path), inception_weights.FILE, 'missing first.bn.bias (4,)',
               'unexpected AuxLogits.fc.weight (2,)',
               'fc.weight is (1000, 5), not (3, 5)'):
    assert part in str(error.value)


def test_weights_that_are_not_finite(tmp_path, small):
  small['fc.bias'][1] = np.nan
  torch_writer.save_zip(tmp_path / 'w.pth', small)
  with pytest.raises(ValueError, match='NaN or infinity in fc.bias'):
    inception_weights.load(tmp_path / 'w.pth')


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  return tmp_path / 'msfp_jax'


def answer(content):
  def urlopen(url, timeout):
    assert url == inception_weights.URL
    if isinstance(content, Exception):
      raise content
    return io.BytesIO(content)
  return urlopen


def test_a_download_is_checked_and_kept(cache, monkeypatch, tmp_path):
  (tmp_path / 'x').write_bytes(b'weights')
  monkeypatch.setattr(inception_weights, 'SHA256',
                      classifier_files.digest(tmp_path / 'x'))
  monkeypatch.setattr(urllib.request, 'urlopen', answer(b'weights'))
  path = inception_weights.find()
  assert path == cache / inception_weights.FILE
  assert path.read_bytes() == b'weights'
  monkeypatch.setattr(urllib.request, 'urlopen', None)
  assert inception_weights.find() == path


def test_a_damaged_download_leaves_nothing(cache, monkeypatch):
  monkeypatch.setattr(urllib.request, 'urlopen', answer(b'<html>'))
  with pytest.raises(ValueError, match='SHA-256') as error:
    inception_weights.find()
  assert inception_weights.SHA256 in str(error.value)
  assert list(cache.iterdir()) == []


@pytest.mark.parametrize('reason', [
    urllib.error.URLError('no network'), TimeoutError('slow'),
    http.client.IncompleteRead(b'')])
def test_offline_it_says_what_to_get(cache, monkeypatch, reason):
  monkeypatch.setattr(urllib.request, 'urlopen', answer(reason))
  with pytest.raises(OSError) as error:
    inception_weights.find()
  for part in (inception_weights.FILE, inception_weights.SHA256,
               inception_weights.URL, '--config.eval.inception='):
    assert part in str(error.value)


def test_files_by_hand(tmp_path):
  with pytest.raises(FileNotFoundError, match='no Inception weights at .*x.pt'):
    inception_weights.find(tmp_path / 'x.pt')
  (tmp_path / 'x.pt').write_bytes(b'any')
  assert inception_weights.find(tmp_path / 'x.pt') == tmp_path / 'x.pt'
  # torch-fidelity's name of the same file.
  path = tmp_path / 'weights-inception-2015-12-05-6726825d.pth'
  path.write_bytes(b'other')
  with pytest.raises(ValueError, match='6726825d.pth is damaged'):
    inception_weights.find(path)


def resize_like_tensorflow(x):
  """Resizes as TensorFlow 1 does, every operation rounded to float32."""
  one = np.float32
  out = x.astype(one)
  for axis in (1, 0):
    size = out.shape[axis]
    at = [one(i) * one(size / 299) for i in range(299)]
    rows = []
    for place in at:
      low = int(place)
      a = out.take(low, axis)
      b = out.take(min(low + 1, size - 1), axis)
      rows.append(a + (b - a) * (place - one(low)))
    out = np.stack(rows, axis)
  return (out - one(128)) / one(128)


@pytest.mark.parametrize('height, width', [(32, 32), (7, 400), (299, 299)])
def test_tensorflow_s_resize_is_exact(height, width):
  image = inception_oracle.random_images((1, height, width, 3))
  actual = jax.jit(preprocess.to_inception)(image)
  np.testing.assert_array_equal(actual[0], resize_like_tensorflow(image[0]))


@pytest.mark.parametrize('height, width', [(32, 30), (400, 299)])
def test_clean_resize_is_pillow_s(height, width):
  image = inception_oracle.random_images((1, height, width, 3))
  actual = preprocess.to_inception(image, 'clean')
  channels = [Image.fromarray(image[0, ..., c].astype(np.float32)).resize(
      (299, 299), Image.BICUBIC) for c in range(3)]
  expected = np.clip(np.stack(list(map(np.asarray, channels)), -1), 0, 255)
  np.testing.assert_allclose(actual[0], (expected - 128) / 128, atol=2e-6)


@pytest.mark.parametrize('size', [5, 400])
def test_pytorch_resize_lies_between_pixel_centres(size):
  image = inception_oracle.random_images((1, size, size, 1))
  actual = preprocess.to_inception(image, 'pytorch')
  at = np.clip((np.arange(299) + 0.5) * size / 299 - 0.5, 0, size - 1)
  low = at.astype(int)
  weights = np.zeros((299, size))
  weights[np.arange(299), np.minimum(low + 1, size - 1)] = at - low
  weights[np.arange(299), low] += 1 - (at - low)
  expected = 2 * (weights @ image[0, ..., 0] @ weights.T) / 255 - 1
  for channel in range(3):  # grey is repeated
    np.testing.assert_allclose(actual[0, ..., channel], expected, atol=1e-4)


def test_conventions_and_channels_that_there_are_not():
  with pytest.raises(ValueError, match="'torch'.*'tf', 'pytorch', 'clean'"):
    preprocess.to_inception(np.zeros((1, 8, 8, 3), np.uint8), 'torch')
  with pytest.raises(ValueError, match=r'\[1, 8, 8, 4\]'):
    preprocess.to_inception(np.zeros((1, 8, 8, 4), np.uint8))


@pytest.fixture
def fake(monkeypatch):
  """Puts a fake in Inception's place, whose outputs are mean colours."""
  def apply(params, x):
    mean = x.mean(axis=(1, 2))
    return inception.Outputs(
        mean, mean[:, :2], 9 * mean, 9 * mean + params['bias'])

  monkeypatch.setattr(inception, 'apply', apply)
  monkeypatch.setattr(inception_weights, 'find', lambda path: __file__)
  monkeypatch.setattr(inception_weights, 'load',
                      lambda path: {'bias': np.ones(3, np.float32)})


@pytest.mark.usefixtures('fake')
def test_inception_as_a_feature_network():
  images = inception_oracle.random_images((3, 8, 8, 3))
  network = features.get('inception', (8, 8, 3), weights='f')
  out = network.outputs(images)
  assert out.features.shape == (3, 3) and out.spatial.shape == (3, 2)
  np.testing.assert_allclose(out.logits, 9 * out.features, rtol=1e-5)
  assert network.metric == 'fid'
  assert network.provenance == {
      'features': 'inception', 'image_shape': [8, 8, 3],
      'preprocessing': 'tf',
      'weights_sha256': classifier_files.digest(__file__)}
  clean = features.get('inception', (8, 8, 3), preprocessing='clean')
  assert clean.metric == 'fid_clean'
  with pytest.raises(ValueError, match='1 or 3 channels'):
    features.get('inception', (8, 8, 2))
  with pytest.raises(ValueError, match="preprocessing 'nope'"):
    features.get('inception', (8, 8, 3), preprocessing='nope')


@pytest.mark.usefixtures('fake')
def test_scores_on_inception_have_the_names_everyone_uses():
  images = inception_oracle.random_images((20, 4, 4, 3))
  network = features.get('inception', (4, 4, 3), weights='f')
  scorer = scorer_lib.Scorer(
      network, stats_file.measure(images, network, 'noise', 12))
  first, second = scorer.score(images), scorer.score(images)
  assert list(first) == ['fid', 'sfid', 'kid', 'precision', 'recall', 'is',
                         'is_std']
  assert list(second) == [
      *first, 'fid_to_fp', 'sfid_to_fp', 'psnr_to_fp']
  assert first['fid'] == pytest.approx(0, abs=1e-6)
  assert first['sfid'] == pytest.approx(0, abs=1e-6)
  assert 1 < first['is'] < 3
  assert scorer.provenance['is_splitting'] == 'shuffled'
