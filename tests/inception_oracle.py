"""Random weights for Inception, and torch-fidelity's network to run them.

torch-fidelity is installed without torchvision, of which it only needs names
at import. PyTorch is imported inside functions.
"""

import contextlib
import sys
import types
from unittest import mock

import numpy as np

from msfp_jax.metrics import inception

# Of the images of tests/golden/inception.npz.
GOLDEN_SHAPE = (2, 40, 32, 3)
_STUBS = {'torchvision': (), 'torchvision.transforms': (),
          'torchvision.transforms.functional': (),
          'torchvision.datasets': ('CIFAR10', 'CIFAR100', 'STL10')}


def random_state(seed: int = 0) -> dict[str, np.ndarray]:
  """A state dict with the names and shapes of the published weights."""
  rng = np.random.RandomState(seed)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  state = {}
  for name, (height, width, fan, out) in inception.CONVOLUTIONS.items():
    gain = np.float32(np.sqrt(2 / (height * width * fan)))
    state |= {f'{name}.conv.weight': draw(out, fan, height, width) * gain,
              f'{name}.bn.weight': np.float32(1) + draw(out) / 10,
              f'{name}.bn.bias': draw(out) / 10,
              f'{name}.bn.running_mean': draw(out) / 10,
              f'{name}.bn.running_var': np.exp(draw(out) / 10),
              f'{name}.bn.num_batches_tracked': np.array(0)}
  return state | {
      'fc.weight': draw(1008, 2048) / 45, 'fc.bias': draw(1008)}


def random_images(shape, seed: int = 0) -> np.ndarray:
  return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


@contextlib.contextmanager
def imports():
  """Makes torch-fidelity importable while it is open.

  Only the stubs go afterwards: what was imported meanwhile stays, since
  PyTorch cannot be imported twice.
  """
  stubs = {}
  for name, attributes in _STUBS.items():
    stubs[name] = types.ModuleType(name)
    for attribute in attributes:
      setattr(stubs[name], attribute, type(attribute, (), {}))
    parent, _, child = name.rpartition('.')
    if parent:
      setattr(stubs[parent], child, stubs[name])
  sys.modules.update(stubs)
  try:
    yield
  finally:
    for name in stubs:
      del sys.modules[name]


def network(state: dict[str, np.ndarray], features: list[str]):
  """torch-fidelity's extractor with these weights."""
  import torch
  with imports():
    from torch_fidelity import feature_extractor_inceptionv3 as theirs
  tensors = {name: torch.from_numpy(np.asarray(value))
             for name, value in state.items()}
  with mock.patch.object(theirs, 'load_state_dict_from_url',
                         lambda *unused, **also_unused: tensors):
    return theirs.FeatureExtractorInceptionV3('inception', features)


def outputs(state: dict[str, np.ndarray], images: np.ndarray
            ) -> inception.Outputs:
  """Runs torch-fidelity's network on uint8 `[N, H, W, 3]`."""
  import torch
  model = network(state, ['2048', 'logits_unbiased', 'logits'])
  kept = []
  model.Mixed_6d.branch1x1.register_forward_hook(
      lambda module, inputs, output: kept.append(output))
  with torch.no_grad():
    pool, unbiased, logits = model(
        torch.from_numpy(images).permute(0, 3, 1, 2))
  spatial = kept[0][:, :7].permute(0, 2, 3, 1).reshape(len(images), -1)
  return inception.Outputs(*(
      x.numpy() for x in (pool, spatial, unbiased, logits)))
