"""Convolutions by fewer products are convolutions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unet_oracle

from msfp_jax.models import convolution

pytestmark = pytest.mark.gpu


def reference(x, kernel):
  """Convolves in float64 NumPy: a sum over the nine shifts."""
  height, width = x.shape[1:3]
  x = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
  return sum(x[:, i:i + height, j:j + width] @ np.float64(kernel[i, j])
             for i in range(3) for j in range(3))


def operands(shape, out, seed=0):
  rng = np.random.default_rng(seed)
  kernel = rng.standard_normal((3, 3, shape[-1], out)) / 3
  return (rng.standard_normal(shape).astype(np.float32),
          kernel.astype(np.float32))


@pytest.mark.parametrize('shape, out', [
    ((2, 8, 8, 128), 128), ((1, 4, 6, 5), 3), ((3, 7, 5, 4), 6),
    ((1, 1, 1, 2), 2), ((2, 1, 9, 3), 4)])
def test_winograd_is_a_convolution(shape, out):
  x, kernel = operands(shape, out)
  expected = reference(x, kernel)
  actual = jax.jit(convolution.winograd)(x, kernel)
  assert actual.shape == expected.shape
  assert unet_oracle.rel_l2(actual, expected) < 1e-6


def test_batches_that_are_taken_in_parts(monkeypatch):
  x, kernel = operands((6, 4, 4, 128), 128)
  monkeypatch.setattr(convolution, '_AT_ONCE', 2 * 16 * 4 * 128)
  run = lambda x: convolution.conv_general_dilated(
      x, kernel, (1, 1), [(1, 1), (1, 1)],
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  assert 'scan' in str(jax.make_jaxpr(run)(x))
  assert unet_oracle.rel_l2(run(x), reference(x, kernel)) < 1e-6


def conv(features, **fields):
  return nn.Conv(features, (3, 3), **fields)


def both(features, x, **fields):
  """Runs a layer with our convolution, and with Flax's, on the same weights."""
  ours = conv(features, conv_general_dilated=convolution.conv_general_dilated,
              **fields)
  params = ours.init(jax.random.key(0), x)
  return (lambda p, x: ours.apply(p, x),
          lambda p, x: conv(features, **fields).apply(p, x), params)


@pytest.mark.slow
def test_gradients_are_the_plain_convolutions():
  x = jax.random.normal(jax.random.key(1), (2, 6, 4, 128))
  ours, theirs, params = both(128, x, padding=((1, 1), (1, 1)))
  loss = lambda f: lambda p, x: jnp.sum(jnp.sin(f(p, x)))
  actual = jax.jit(jax.grad(loss(ours), (0, 1)))(params, x)
  expected = jax.jit(jax.grad(loss(theirs), (0, 1)))(params, x)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected),
                  strict=True):
    assert unet_oracle.rel_l2(a, b) < 1e-5


@pytest.mark.parametrize('fields', [
    {'strides': (2, 2), 'padding': ((0, 1), (0, 1))},
    {'padding': ((1, 1), (0, 2))}, {'padding': 'SAME'},
    {'padding': ((1, 1), (1, 1)), 'kernel_dilation': (2, 2)},
    {'padding': ((1, 1), (1, 1)), 'feature_group_count': 128},
    {'padding': ((1, 1), (1, 1)), 'dtype': jnp.bfloat16}])
def test_other_convolutions_stay_what_they_are(fields):
  x = jax.random.normal(jax.random.key(1), (1, 6, 6, 128))
  ours, theirs, params = both(128, x, **fields)
  np.testing.assert_array_equal(ours(params, x), theirs(params, x))


def test_on_accelerators_it_is_one_convolution():
  x = jnp.zeros((1, 6, 6, 128))
  ours, _, params = both(128, x, padding=((1, 1), (1, 1)))
  for platform, count in (('tpu', 1), ('cuda', 1), ('cpu', 0)):
    text = jax.jit(ours).trace(params, x).lower(
        lowering_platforms=(platform,)).as_text()
    assert text.count('stablehlo.convolution') == count
