"""SqueezeNet's features, against the network written down in float64."""

import numpy as np
import pytest
import torch_writer
import unet_oracle

from msfp_jax.metrics import features
from msfp_jax.metrics import squeezenet

# (torchvision's index, channels in, squeezed, expanded) as it prints them.
FIRES = ((3, 64, 16, 64), (4, 128, 16, 64), (6, 128, 32, 128),
         (7, 256, 32, 128), (9, 256, 48, 192), (10, 384, 48, 192),
         (11, 384, 64, 256), (12, 512, 64, 256))
IMAGES = np.random.RandomState(1).randint(0, 256, (2, 16, 16, 3), np.uint8)


@pytest.fixture(scope='module')
def state():
  """Draws random weights, by torchvision's names and layouts."""
  rng = np.random.RandomState(0)
  found = {}

  def conv(name, out, inputs, size):
    found[f'{name}.weight'] = np.float32(rng.standard_normal(
        (out, inputs, size, size)) * np.sqrt(2 / (inputs * size * size)))
    found[f'{name}.bias'] = np.float32(rng.standard_normal(out) / 10)

  conv('features.0', 64, 3, 3)
  for index, inputs, few, many in FIRES:
    conv(f'features.{index}.squeeze', few, inputs, 1)
    conv(f'features.{index}.expand1x1', many, few, 1)
    conv(f'features.{index}.expand3x3', many, few, 3)
  conv('classifier.1', 1000, 512, 1)
  return found


def as_npz(path, state):
  """The same weights as those of Caffe are kept."""
  names = {'features.0': 'conv1'}
  for number, (index, *_) in enumerate(FIRES, 2):
    names |= {f'features.{index}.squeeze': f'fire{number}/squeeze1x1',
              f'features.{index}.expand1x1': f'fire{number}/expand1x1',
              f'features.{index}.expand3x3': f'fire{number}/expand3x3'}
  arrays = {}
  for name, to in names.items():
    arrays[f'{to}/w'] = state[f'{name}.weight'].transpose(2, 3, 1, 0)
    arrays[f'{to}/b'] = state[f'{name}.bias']
  np.savez(path, **arrays)
  return arrays


def reference(state, images):
  """Runs it in float64 NumPy on images that are prepared, `[N, 128, 128, 3]`.
  """
  def conv(x, name, stride=1, padding=0):
    weight = np.float64(state[f'{name}.weight'])
    x = np.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    reach = weight.shape[2]
    size = (x.shape[1] - reach) // stride + 1
    taps = [x[:, i:i + stride * size:stride, j:j + stride * size:stride]
            @ weight[:, :, i, j].T for i in range(reach) for j in range(reach)]
    return np.maximum(sum(taps) + state[f'{name}.bias'], 0)

  def pool(x):
    size = (x.shape[1] - 3) // 2 + 1
    assert 2 * size + 1 == x.shape[1]  # nothing is left over at the end
    return np.max([x[:, i:i + 2 * size:2, j:j + 2 * size:2]
                   for i in range(3) for j in range(3)], axis=0)

  x = conv(images, 'features.0', stride=2)
  for index, *_ in FIRES:
    # torchvision's pools are features 2, 5 and 8.
    if index in (3, 6, 9):
      x = pool(x)
    name = f'features.{index}'
    few = conv(x, f'{name}.squeeze')
    x = np.concatenate([conv(few, f'{name}.expand1x1'),
                        conv(few, f'{name}.expand3x3', padding=1)], axis=-1)
  return x.mean(axis=(1, 2))


def enlarged(images):
  """16 -> 128 pixels, linearly between centres, the ends kept."""
  place = np.clip((np.arange(128) + 0.5) / 8 - 0.5, 0, 15)
  low = np.minimum(place.astype(int), 14)
  share = (place - low)[:, None]
  along = lambda x: x[:, low] * (1 - share) + x[:, low + 1] * share
  once = along(np.float64(images).swapaxes(1, 2).reshape(-1, 16, 3))
  x = once.reshape(len(images), 16, 128, 3).swapaxes(1, 2)
  return along(x.reshape(-1, 16, 3)).reshape(len(images), 128, 128, 3)


def test_torchvisions_file(tmp_path, state):
  torch_writer.save_zip(tmp_path / 's.pth', state)
  network = features.get(f'squeezenet:{tmp_path}/s.pth', (16, 16, 3))
  assert network.metric == 'fd_squeezenet' and network.dim == 512
  x = enlarged(IMAGES) / 255
  expected = reference(state, (x - [0.485, 0.456, 0.406])
                       / [0.229, 0.224, 0.225])
  assert unet_oracle.rel_l2(
      network.outputs(IMAGES).features, expected) < 2e-6


def test_caffes_weights_have_a_name_and_colours_of_their_own(tmp_path, state):
  as_npz(tmp_path / 's.npz', state)
  network = features.get(f'squeezenet:{tmp_path}/s.npz', (16, 16, 3))
  assert network.metric == 'fd_squeezenet_caffe'
  # Blue first, less the mean colour, from 0 to 255.
  expected = reference(state, enlarged(IMAGES)[..., ::-1]
                       - [104.006, 116.669, 122.679])
  assert unet_oracle.rel_l2(
      network.outputs(IMAGES).features, expected) < 2e-6


def test_grey_images_are_repeated(tmp_path, state):
  as_npz(tmp_path / 's.npz', state)
  grey = IMAGES[..., :1]
  name = f'squeezenet:{tmp_path}/s.npz'
  np.testing.assert_array_equal(
      features.get(name, (16, 16, 1)).outputs(grey).features,
      features.get(name, (16, 16, 3)).outputs(
          np.repeat(grey, 3, axis=-1)).features)
  with pytest.raises(ValueError, match='1 or 3'):
    features.get(name, (16, 16, 4))


def test_what_it_cannot_take(tmp_path, state):
  torch_writer.save_zip(tmp_path / 's.pth', {
      name: value for name, value in state.items()
      if name != 'features.6.squeeze.bias'})
  with pytest.raises(ValueError, match='missing features.6.squeeze.bias'):
    squeezenet.load(tmp_path / 's.pth')
  arrays = as_npz(tmp_path / 's.npz', state)
  del arrays['fire4/squeeze1x1/b']
  np.savez(tmp_path / 't.npz', more=np.zeros(1), **arrays)
  with pytest.raises(ValueError, match=r'(?s)t.npz.*missing fire4/squeeze1x1/b'
                     '.*unexpected more'):
    squeezenet.load(tmp_path / 't.npz')
  with pytest.raises(FileNotFoundError):
    squeezenet.load(tmp_path / 'absent.npz')
