"""Inputs, products by hand and a deep model, for tests of packed models."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np


def noise(shape, seed=0):
  return jnp.asarray(
      np.random.default_rng(seed).normal(size=shape), jnp.float32)


def conv(x, w):
  """A convolution with zeros around, float64, a tap at a time."""
  rows, columns = x.shape[1:3]
  edge = [(k // 2, k // 2) for k in w.shape[:2]]
  x = np.pad(np.float64(x), [(0, 0), *edge, (0, 0)])
  return sum(x[:, i:i + rows, j:j + columns] @ w[i, j]
             for i, j in np.ndindex(*w.shape[:2]))


class Deep(nn.Module):
  """A deep model of convolutions wide enough for Winograd's algorithm."""

  @nn.compact
  def __call__(self, x, t):
    for i in range(6):
      x = nn.Conv(64, (3, 3), padding=((1, 1), (1, 1)), name=f'conv_{i}')(x)
      x = nn.silu(x)
    return x
