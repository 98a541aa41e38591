"""A module around a layer, an input, and the layers of a model by name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.quant import interception


class Wrapped(nn.Module):
  """`inner` under a name, next to a Dense."""

  inner: nn.Module

  @nn.compact
  def __call__(self, x):
    return self.inner.copy(name='other')(nn.Dense(4, name='dense')(x))


X = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), jnp.float32)


def list_of(model, x=X):
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  return interception.list_layers(model, shapes, x)
