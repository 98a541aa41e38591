"""Bridges a PyTorch-named UNet state dict and our Flax parameters.

Written apart from `msfp_jax.convert`, which it helps to check.
"""

import functools
import json
from pathlib import Path
import re

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig

GOLDEN = Path(__file__).parent / 'golden'
EMBEDDINGS = ('label_emb.weight', 'context_emb.weight', 'quantize.weight')

# Cases of tests/make_golden.py, small enough to keep their weights in git.
TINY = UNetConfig(
    image_size=16, ch=4, ch_mult=(1, 2), attn_resolutions=(8,), norm_groups=2)
# Every switch on the other side, as latent diffusion may set them.
TINY_RELATIVE = UNetConfig(
    image_size=16, ch=4, ch_mult=(1, 2), num_res_blocks=1,
    attn_resolutions=(8,), norm_groups=2, norm_eps=1e-5, head_channels=4,
    downsample_padding=(1, 1), resample='resblock',
    time_injection='scale_shift', time_order='cos_sin', time_freq_shift=0,
    num_classes=5)


@functools.cache
def abstract_params(config: UNetConfig):
  """The shapes of the parameters, at no cost."""
  side = config.image_size
  labels = context = None
  if config.num_classes is not None or config.context_classes is not None:
    labels = jnp.zeros(1, jnp.int32)
  elif config.context_dim is not None:
    context = jnp.zeros((1, 2, config.context_dim))
  return jax.eval_shape(
      UNet(config).init, jax.random.key(0),
      jnp.zeros((1, side, side, config.in_channels)), jnp.zeros(1),
      labels, context)['params']


def dotted(path) -> str:
  """The state-dict key of a leaf of our parameter tree."""
  *modules, leaf = (key.key for key in path)
  leaf = {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight'}.get(
      leaf, leaf)
  return '.'.join([*modules, leaf])


def flat_params(params) -> dict:
  """`{state-dict key: leaf}`, shapes as Flax has them."""
  return {dotted(path): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def from_state_dict(config: UNetConfig, state: dict[str, np.ndarray]):
  """Makes our parameters of PyTorch's; strict in names and shapes."""
  return restore(abstract_params(config), state)


def restore(params, state: dict[str, np.ndarray]):
  """Does what `from_state_dict` does, for any model's parameters."""
  missing = flat_params(params).keys() ^ state.keys()
  assert not missing, f'on one side only: {sorted(missing)}'

  def convert(path, leaf):
    value = state[dotted(path)].astype(np.float32)
    if path[-1].key == 'kernel':
      if leaf.ndim == 2:
        value = value.reshape(value.shape[:2]).T
      else:
        value = value.transpose(2, 3, 1, 0)
    assert value.shape == leaf.shape, (dotted(path), value.shape, leaf.shape)
    return jnp.asarray(value)

  return jax.tree_util.tree_map_with_path(convert, params)


def state_dict_shapes(config: UNetConfig) -> dict[str, tuple[int, ...]]:
  """The shapes of the PyTorch state dict, attention as 1x1 convolutions."""
  return shapes_of(abstract_params(config))


def shapes_of(params) -> dict[str, tuple[int, ...]]:
  """The shapes of the PyTorch state dict of any model's parameters."""
  shapes = {}
  for name, leaf in flat_params(params).items():
    shape = leaf.shape
    if len(shape) == 4:
      shape = (shape[3], shape[2], *shape[:2])
    elif len(shape) == 2 and name not in EMBEDDINGS:
      # In a spatial transformer only the projections around it can be.
      pointwise = re.fullmatch(
          r'.*attn[._]\d+\.(q|k|v|proj_in|proj_out)\.weight', name)
      shape = shape[::-1] + (1, 1) * bool(pointwise)
    shapes[name] = shape
  return shapes


def random_state_dict(shapes: dict[str, tuple[int, ...]], seed: int):
  """Draws weights that keep activations near 1; no parameter is neutral."""
  # RandomState's stream never changes between NumPy versions.
  rng = np.random.RandomState(seed)
  state = {}
  for name in sorted(shapes):
    shape = shapes[name]
    value = rng.standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
      value /= np.sqrt(np.prod(shape[1:]))
    else:
      value = 0.2 * value + ('norm' in name and name.endswith('weight'))
    state[name] = value.astype(np.float32)
  return state


def random_inputs(config: UNetConfig, height: int, width: int, seed: int):
  """Draws (x NHWC, t, labels or None), a batch over the range of timesteps."""
  rng = np.random.RandomState(seed)
  t = np.array([0, 3, 500, 999])
  x = rng.standard_normal((len(t), height, width, config.in_channels))
  labels = None
  if config.num_classes is not None:
    labels = rng.randint(config.num_classes, size=len(t))
  return x.astype(np.float32), t, labels


def apply(config: UNetConfig, state, x, t, labels=None) -> np.ndarray:
  """Runs our UNet with a PyTorch-named state dict."""
  params = from_state_dict(config, state)
  with jax.default_matmul_precision('highest'):
    return np.asarray(jax.jit(UNet(config).apply)(
        {'params': params}, x, t, labels))


def load_golden(name: str):
  """Reads (config, state dict, inputs, expected output) of a golden file."""
  with np.load(GOLDEN / f'{name}.npz') as file:
    arrays = dict(file)
  config = UNetConfig(**json.loads(str(arrays.pop('config'))))
  inputs = tuple(arrays.pop(key, None) for key in ('x', 't', 'labels'))
  out = arrays.pop('out')
  return config, arrays, inputs, out


def rel_l2(actual, expected) -> float:
  actual, expected = np.float64(actual), np.float64(expected)
  return np.linalg.norm(actual - expected) / np.linalg.norm(expected)
