"""The Inception network of the Frechet inception distance.

It is TensorFlow's graph of 2015-12-05, on whose features FID was defined
(Heusel et al., 2017). Later Inceptions differ: this one leaves the padding out
of its average pools, its last block has a maximum pool, and it knows 1008
classes. Layers bear the names of torchvision, as in the published weights.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from msfp_jax.models import convolution

SIZE = 299  # pixels of its input, each way
NUM_FEATURES = 2048
NUM_CLASSES = 1008
_SPATIAL_CHANNELS = 7

# Name of a convolution -> (height, width, channels in, channels out).
Shapes = dict[str, tuple[int, int, int, int]]
Params = Mapping[str, Mapping[str, jax.Array]]


class Outputs(NamedTuple):
  """The outputs of the network that metrics are made of, float32.

  Attributes:
    pool: `[N, 2048]`, the mean over the last block's pixels: FID, KID,
      precision and recall.
    spatial: `[N, 2023]`, sFID (Nash et al., 2021): the first 7 channels of
      Mixed_6d.branch1x1, TensorFlow's mixed_6/conv, in the order 17 x 17 x 7.
    logits_unbiased: `[N, 1008]`, without the bias: the inception score.
    logits: `[N, 1008]`.
  """

  pool: jax.Array
  spatial: jax.Array
  logits_unbiased: jax.Array
  logits: jax.Array


# The network, by the side of its maps and their channels:
#
#   299 x 3   Conv2d 1a, 2a, 2b, pool     73 x 64
#             Conv2d 3b, 4a, pool         35 x 192
#             Mixed_5b, 5c, 5d (a)        35 x 256, 288, 288
#             Mixed_6a (b, stride 2)      17 x 768
#             Mixed_6b .. 6e (c)          17 x 768     6d: spatial features
#             Mixed_7a (d, stride 2)       8 x 1280
#             Mixed_7b, 7c (e)             8 x 2048    mean: the 2048 features
#
# Each block runs branches beside each other and joins their channels; the
# letters are those of the functions below. Shapes are (height, width, in, out).


def _block_a(channels: int, pooled: int) -> Shapes:
  return {'branch1x1': (1, 1, channels, 64),
          'branch5x5_1': (1, 1, channels, 48),
          'branch5x5_2': (5, 5, 48, 64),
          'branch3x3dbl_1': (1, 1, channels, 64),
          'branch3x3dbl_2': (3, 3, 64, 96),
          'branch3x3dbl_3': (3, 3, 96, 96),
          'branch_pool': (1, 1, channels, pooled)}


def _block_b(channels: int) -> Shapes:
  return {'branch3x3': (3, 3, channels, 384),
          'branch3x3dbl_1': (1, 1, channels, 64),
          'branch3x3dbl_2': (3, 3, 64, 96),
          'branch3x3dbl_3': (3, 3, 96, 96)}


def _block_c(channels: int, inner: int) -> Shapes:
  return {'branch1x1': (1, 1, channels, 192),
          'branch7x7_1': (1, 1, channels, inner),
          'branch7x7_2': (1, 7, inner, inner),
          'branch7x7_3': (7, 1, inner, 192),
          'branch7x7dbl_1': (1, 1, channels, inner),
          'branch7x7dbl_2': (7, 1, inner, inner),
          'branch7x7dbl_3': (1, 7, inner, inner),
          'branch7x7dbl_4': (7, 1, inner, inner),
          'branch7x7dbl_5': (1, 7, inner, 192),
          'branch_pool': (1, 1, channels, 192)}


def _block_d(channels: int) -> Shapes:
  return {'branch3x3_1': (1, 1, channels, 192),
          'branch3x3_2': (3, 3, 192, 320),
          'branch7x7x3_1': (1, 1, channels, 192),
          'branch7x7x3_2': (1, 7, 192, 192),
          'branch7x7x3_3': (7, 1, 192, 192),
          'branch7x7x3_4': (3, 3, 192, 192)}


def _block_e(channels: int) -> Shapes:
  return {'branch1x1': (1, 1, channels, 320),
          'branch3x3_1': (1, 1, channels, 384),
          'branch3x3_2a': (1, 3, 384, 384),
          'branch3x3_2b': (3, 1, 384, 384),
          'branch3x3dbl_1': (1, 1, channels, 448),
          'branch3x3dbl_2': (3, 3, 448, 384),
          'branch3x3dbl_3a': (1, 3, 384, 384),
          'branch3x3dbl_3b': (3, 1, 384, 384),
          'branch_pool': (1, 1, channels, 192)}


_BLOCKS = {
    'Mixed_5b': _block_a(192, 32), 'Mixed_5c': _block_a(256, 64),
    'Mixed_5d': _block_a(288, 64), 'Mixed_6a': _block_b(288),
    'Mixed_6b': _block_c(768, 128), 'Mixed_6c': _block_c(768, 160),
    'Mixed_6d': _block_c(768, 160), 'Mixed_6e': _block_c(768, 192),
    'Mixed_7a': _block_d(768), 'Mixed_7b': _block_e(1280),
    'Mixed_7c': _block_e(2048)}

# All convolutions, in the order of the graph.
CONVOLUTIONS: Shapes = {
    'Conv2d_1a_3x3': (3, 3, 3, 32), 'Conv2d_2a_3x3': (3, 3, 32, 32),
    'Conv2d_2b_3x3': (3, 3, 32, 64), 'Conv2d_3b_1x1': (1, 1, 64, 80),
    'Conv2d_4a_3x3': (3, 3, 80, 192),
    **{f'{block}.{name}': shape for block, shapes in _BLOCKS.items()
       for name, shape in shapes.items()}}


def apply(params: Params, x: jax.Array) -> Outputs:
  """Runs the network.

  Under `jax.jit` outputs that are not used cost nothing.

  Args:
    params: {name in CONVOLUTIONS: {'kernel': HWIO, 'bias': `[C]`}}, batch
      normalisation folded into both, and 'fc' with a kernel `[2048, 1008]`;
      see `inception_weights.load`.
    x: float32 `[N, 299, 299, 3]` in about [-1, 1], see `preprocess`.
  """
  layer = lambda name, x, **options: _layer([params[name]], x, **options)[0]
  x = layer('Conv2d_1a_3x3', x, stride=2, padding='VALID')
  x = layer('Conv2d_2a_3x3', x, padding='VALID')
  x = layer('Conv2d_2b_3x3', x)
  x = _max_pool(x, 2)
  x = layer('Conv2d_3b_1x1', x)
  x = layer('Conv2d_4a_3x3', x, padding='VALID')
  x = _max_pool(x, 2)
  # TensorFlow's mixed_6/conv is taken before the channels are joined: branch 0
  # begins with it. Rows, columns, channels, in this order, as one vector.
  spatial = None
  for block, shapes in _BLOCKS.items():
    inner = {name: params[f'{block}.{name}'] for name in shapes}
    branches = _RUN[block](inner, x)
    if block == 'Mixed_6d':
      spatial = branches[0][..., :_SPATIAL_CHANNELS].reshape(len(x), -1)
    x = jnp.concatenate(branches, axis=-1)
  pool = x.mean(axis=(1, 2))
  unbiased = jnp.matmul(pool, params['fc']['kernel'], precision='highest')
  return Outputs(pool, spatial, unbiased, unbiased + params['fc']['bias'])


def _layer(layers: Sequence[Mapping[str, jax.Array]], x: jax.Array,
           stride: int = 1, padding: str = 'SAME') -> list[jax.Array]:
  """Computes convolutions of one kernel size, with their ReLUs, as one."""
  # Branches that begin alike on one input: one larger product is faster.
  kernel = jnp.concatenate([layer['kernel'] for layer in layers], axis=-1)
  bias = jnp.concatenate([layer['bias'] for layer in layers])
  x = jax.nn.relu(_convolve(x, kernel, stride, padding) + bias)
  return _split(x, layers)


def _split(x, layers):
  ends, end = [], 0
  for layer in layers[:-1]:
    end += layer['bias'].shape[0]
    ends.append(end)
  return jnp.split(x, ends, axis=-1)


def _convolve(x, kernel, stride, padding):
  # Full precision: a distance must not depend on the device that it is
  # measured on, and TPU and GPU round the inputs by default.
  run = lambda padding: convolution.conv_general_dilated(
      x, kernel, (stride, stride), padding,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      precision=jax.lax.Precision.HIGHEST)
  height, width = kernel.shape[:2]
  if padding == 'VALID' and stride > 1:
    return run(padding)
  around = run([(height // 2, height // 2), (width // 2, width // 2)])
  if padding == 'SAME':
    return around
  # On the CPU, XLA takes twice as long for the same without padding.
  return around[:, 1:-1, 1:-1]


def _max_pool(x: jax.Array, stride: int, margin: int = 0) -> jax.Array:
  """Maximum over 3x3 pixels, with `margin` pixels of nothing around."""
  return _pool(x, jnp.maximum, stride, margin, -jnp.inf)


def _mean_pool(x: jax.Array) -> jax.Array:
  """Mean over the 3x3 pixels around each, of those that are there."""
  # Sums over counts: at the border, fewer than 9 are there.
  ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
  return (_pool(x, jnp.add, 1, 1, 0.0) / _pool(ones, jnp.add, 1, 1, 0.0))


def _pool(x, combine, stride, margin, nothing):
  """Pools by slices, several times as fast on CPUs as `lax.reduce_window`."""
  # Maxima and sums over 3x3 are those over 3 rows, then over 3 columns.
  for axis in (1, 2):
    sides = [(margin, margin) if i == axis else (0, 0) for i in range(4)]
    padded = jnp.pad(x, sides, constant_values=nothing)
    last = stride * ((padded.shape[axis] - 3) // stride)
    x, second, third = (
        jax.lax.slice_in_dim(padded, i, i + last + 1, stride, axis)
        for i in range(3))
    x = combine(combine(x, second), third)
  return x


def _entries(p, x, names):
  """Computes the 1x1 convolutions of x and of its mean pool as one product.

  Pooling and a 1x1 convolution commute, and after it there are fewer channels.
  """
  layers = [p[name] for name in (*names, 'branch_pool')]
  kernel = jnp.concatenate([layer['kernel'] for layer in layers], axis=-1)
  *found, pooled = _split(_convolve(x, kernel, 1, 'SAME'), layers)
  *biases, pool_bias = [layer['bias'] for layer in layers]
  found = [jax.nn.relu(y + b) for y, b in zip(found, biases, strict=True)]
  return *found, jax.nn.relu(_mean_pool(pooled) + pool_bias)


def _chain(p, x, *names):
  for name in names:
    x, = _layer([p[name]], x)
  return x


def _run_a(p, x):
  one, five, three, pooled = _entries(
      p, x, ('branch1x1', 'branch5x5_1', 'branch3x3dbl_1'))
  return [one, _chain(p, five, 'branch5x5_2'),
          _chain(p, three, 'branch3x3dbl_2', 'branch3x3dbl_3'), pooled]


# Blocks b and d halve the sides: by strides on two ways, by a pool on a third.
def _run_b(p, x):
  three, = _layer([p['branch3x3']], x, 2, 'VALID')
  double = _chain(p, x, 'branch3x3dbl_1', 'branch3x3dbl_2')
  double, = _layer([p['branch3x3dbl_3']], double, 2, 'VALID')
  return [three, double, _max_pool(x, 2)]


# Block c: 7x7 windows as 1x7 and 7x1, once on one way, twice on another.
def _run_c(p, x):
  one, seven, double, pooled = _entries(
      p, x, ('branch1x1', 'branch7x7_1', 'branch7x7dbl_1'))
  return [one, _chain(p, seven, 'branch7x7_2', 'branch7x7_3'),
          _chain(p, double, *(f'branch7x7dbl_{i}' for i in range(2, 6))),
          pooled]


def _run_d(p, x):
  three, seven = _layer([p['branch3x3_1'], p['branch7x7x3_1']], x)
  three, = _layer([p['branch3x3_2']], three, 2, 'VALID')
  seven = _chain(p, seven, 'branch7x7x3_2', 'branch7x7x3_3')
  seven, = _layer([p['branch7x7x3_4']], seven, 2, 'VALID')
  return [three, seven, _max_pool(x, 2)]


# Block e, in the order in which its channels are joined:
#
#   1x1                               320
#   1x1 -> 1x3, and 3x1 beside it     384 + 384
#   1x1 -> 3x3 -> 1x3, and 3x1        384 + 384
#   pool -> 1x1                       192
def _run_e(p, x):
  one, three, double, pooled = _entries(
      p, x, ('branch1x1', 'branch3x3_1', 'branch3x3dbl_1'))
  return [*_forks(p, one, three, double), pooled]


def _run_last(p, x):
  """Runs the last block: `_run_e` with the original graph's maximum pool."""
  one, three, double = _layer(
      [p[name] for name in ('branch1x1', 'branch3x3_1', 'branch3x3dbl_1')], x)
  pooled = _chain(p, _max_pool(x, 1, 1), 'branch_pool')
  return [*_forks(p, one, three, double), pooled]


def _forks(p, one, three, double):
  double = _chain(p, double, 'branch3x3dbl_2')
  return [one, *(_chain(p, three, f'branch3x3_2{i}') for i in 'ab'),
          *(_chain(p, double, f'branch3x3dbl_3{i}') for i in 'ab')]


_RUN = {
    'Mixed_5b': _run_a, 'Mixed_5c': _run_a, 'Mixed_5d': _run_a,
    'Mixed_6a': _run_b, 'Mixed_6b': _run_c, 'Mixed_6c': _run_c,
    'Mixed_6d': _run_c, 'Mixed_6e': _run_c, 'Mixed_7a': _run_d,
    'Mixed_7b': _run_e, 'Mixed_7c': _run_last}
