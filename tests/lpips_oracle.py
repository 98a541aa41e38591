"""Random weights for LPIPS's trunks, and torch-fidelity's LPIPS to run them.

PyTorch is imported inside functions.
"""

import inception_oracle
import numpy as np
from safetensors.numpy import load_file

from msfp_jax.metrics import lpips

# Of the images of tests/golden/lpips.npz.
GOLDEN_SHAPE = (3, 40, 48, 3)
# torchvision's `features` as it prints them: convolutions (channels, size,
# stride, padding), ReLUs, and maximum pools (size, stride).
FEATURES = {
    'alex': ((64, 11, 4, 2), 'R', (3, 2), (192, 5, 1, 2), 'R', (3, 2),
             (384, 3, 1, 1), 'R', (256, 3, 1, 1), 'R', (256, 3, 1, 1), 'R',
             (3, 2)),
    'vgg': tuple(part for width in (
        64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512,
        512, 0) for part in (((width, 3, 1, 1), 'R') if width else ((2, 2),))),
}
# The ends of the slices of the package lpips: what is compared.
ENDS = {'alex': (2, 5, 8, 10, 12), 'vgg': (4, 9, 16, 23, 30)}


def random_state(name: str, seed: int = 0) -> dict[str, np.ndarray]:
  """A state dict with torchvision's names and shapes, dense layers left out."""
  rng = np.random.RandomState(seed)
  state, channels = {}, 3
  for index, part in enumerate(FEATURES[name]):
    if len(part) == 4:
      out, size = part[:2]
      gain = np.float32(np.sqrt(2 / (size * size * channels)))
      state[f'features.{index}.weight'] = gain * rng.standard_normal(
          (out, channels, size, size)).astype(np.float32)
      state[f'features.{index}.bias'] = rng.standard_normal(
          out).astype(np.float32) / 10
      channels = out
  return state


def random_pairs(shape=GOLDEN_SHAPE, seed: int = 0
                 ) -> tuple[np.ndarray, np.ndarray]:
  """Pairs from alike to unlike."""
  rng = np.random.RandomState(seed)
  a, b = rng.randint(0, 256, (2, *shape))
  share = np.linspace(0.02, 1, shape[0]).reshape(-1, 1, 1, 1)
  return a.astype(np.uint8), ((1 - share) * a + share * b).astype(np.uint8)


def distances(name: str, state: dict[str, np.ndarray], a: np.ndarray,
              b: np.ndarray) -> np.ndarray:
  """torch-fidelity's LPIPS of every pair, with the trunk and its weights."""
  import torch
  from torch import nn
  parts, channels = [], 3
  for part in FEATURES[name]:
    if part == 'R':
      parts.append(nn.ReLU())
    elif len(part) == 2:
      parts.append(nn.MaxPool2d(*part))
    else:
      parts.append(nn.Conv2d(channels, *part))
      channels = part[0]
  whole = nn.Sequential(*parts)
  whole.load_state_dict({
      key.removeprefix('features.'): torch.from_numpy(np.asarray(value))
      for key, value in state.items()})

  class Slices(nn.Module):
    """In place of VGG16features, which takes torchvision's own."""

    def forward(self, x):
      found, start = [], 0
      for end in ENDS[name]:
        x = whole[start:end](x)
        found.append(x)
        start = end
      return found

  with inception_oracle.imports():
    from torch_fidelity import sample_similarity_lpips as theirs
  # Without its __init__, which downloads weights and knows VGG's widths alone.
  model = theirs.SampleSimilarityLPIPS.__new__(theirs.SampleSimilarityLPIPS)
  nn.Module.__init__(model)
  model.sample_similarity_dtype = model.sample_similarity_resize = None
  model.net, model.L = Slices(), len(ENDS[name])
  weights = load_file(lpips.LINEAR)
  model.lins = nn.ModuleList()
  for i in range(model.L):
    weight = torch.from_numpy(weights[f'{name}.{i}']).reshape(1, -1, 1, 1)
    model.lins.append(theirs.NetLinLayer(weight.shape[1], use_dropout=True))
    model.lins[i].load_state_dict({'model.1.weight': weight})
  model.eval()
  channels_first = lambda x: torch.from_numpy(x).permute(0, 3, 1, 2)
  with torch.no_grad():
    found = model(channels_first(a), channels_first(b))
  return found.numpy().reshape(len(a))
