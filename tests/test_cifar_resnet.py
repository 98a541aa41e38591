"""CIFAR-10's ResNets, the example of another feature network."""

import numpy as np
import pytest
import torch_writer
import unet_oracle

from msfp_jax.metrics import cifar_resnet
from msfp_jax.metrics import features


@pytest.fixture
def state():
  """Draws random weights of ResNet-8."""
  rng = np.random.RandomState(0)
  found = {}
  for name, shape in cifar_resnet.state_shapes(1).items():
    found[name] = rng.uniform(-1, 1, shape).astype(np.float32)
    if len(shape) == 4:
      found[name] /= np.sqrt(3 * shape[1])
    if name.endswith('running_var'):
      found[name] += 2
  return found


def save(path, state):
  """Saves as its authors do: a DataParallel's names in a checkpoint."""
  torch_writer.save_zip(path, {
      'epoch': 3, 'state_dict': {f'module.{k}': v for k, v in state.items()}})
  return path


def reference(state, images):
  """Computes the network in float64 NumPy."""
  s = {name: value.astype(np.float64) for name, value in state.items()}

  def conv_norm(x, conv, norm, stride=1):
    size = x.shape[1] // stride
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = sum(x[:, i:, j:][:, :stride * size:stride, :stride * size:stride]
            @ s[f'{conv}.weight'][:, :, i, j].T
            for i in range(3) for j in range(3))
    y = (y - s[f'{norm}.running_mean']) / np.sqrt(
        s[f'{norm}.running_var'] + 1e-5)
    return y * s[f'{norm}.weight'] + s[f'{norm}.bias']

  x = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  x = np.maximum(conv_norm(x, 'conv1', 'bn1'), 0)
  for level, stride in ((1, 1), (2, 2), (3, 2)):
    name = f'layer{level}.0'
    y = np.maximum(conv_norm(x, f'{name}.conv1', f'{name}.bn1', stride), 0)
    y = conv_norm(y, f'{name}.conv2', f'{name}.bn2')
    side = (y.shape[-1] - x.shape[-1]) // 2
    x = np.pad(x[:, ::stride, ::stride], ((0, 0),) * 3 + ((side, side),))
    x = np.maximum(x + y, 0)
  x = x.mean(axis=(1, 2))
  return x, x @ s['linear.weight'].T + s['linear.bias']


def test_it_computes_the_published_network(tmp_path, state):
  path = save(tmp_path / 'r.th', state)
  images = np.random.RandomState(1).randint(
      0, 256, (3, 32, 32, 3), dtype=np.uint8)
  network = features.get(f'cifar_resnet:{path}', (32, 32, 3))
  assert (network.name, network.metric) == ('resnet8', 'fd_resnet8')
  assert network.provenance.keys() == {
      'features', 'image_shape', 'weights_sha256'}
  outputs = network.outputs(images)
  expected = reference(state, images)
  for actual, wanted in zip(outputs[:2], expected, strict=True):
    assert unet_oracle.rel_l2(actual, wanted) < 2e-6


def test_the_depth_is_told_from_the_file(tmp_path):
  state = {name: np.ones(shape, np.float32)
           for name, shape in cifar_resnet.state_shapes(9).items()}
  depth, params = cifar_resnet.load(save(tmp_path / 'r.th', state))
  assert depth == 56 and len(params['blocks']) == 27


def test_what_it_cannot_take(tmp_path, state):
  del state['layer2.0.bn1.bias']
  path = save(tmp_path / 'r.th', state)
  with pytest.raises(ValueError, match='ResNet-8.*\n  missing layer2.0.bn1.bi'):
    cifar_resnet.load(path)
  with pytest.raises(ValueError, match="64, 64, 3.*'inception'"):
    features.get(f'cifar_resnet:{path}', (64, 64, 3))
  for name in ('cifar_resnet', 'random:x'):
    with pytest.raises(ValueError, match=f"'{name}': must be one of 'cifar_re"):
      features.get(name, (32, 32, 3))
