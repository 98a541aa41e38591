"""A conditional UNet with classifier-free guidance built in."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from msfp_jax.models import unet


class Guided(nn.Module):
  """A UNet with classifier-free guidance, as one model of (x, t, labels).

  Both predictions come from one batch, first that without condition; so what
  is calibrated, distilled and sampled is the guided model. Parameters and
  layer names are the UNet's own.

  Attributes:
    inner: a class-conditional UNet.
    scale: s.
    null_label: the class that stands for none.
  """

  inner: unet.UNet
  scale: float
  null_label: int

  def setup(self):
    # The UNet's parameters and layer names stay as they are, without a prefix.
    nn.share_scope(self, self.inner)

  @property
  def config(self) -> unet.UNetConfig:
    return self.inner.config

  def __call__(self, x: jax.Array, t: jax.Array, labels: jax.Array
               ) -> jax.Array:
    twice = lambda a: jnp.concatenate([a, a])
    null = jnp.full_like(labels, self.null_label)
    both = self.inner(
        twice(x), twice(t), jnp.concatenate([null, labels]))
    without, within = jnp.split(both, 2)
    return without + self.scale * (within - without)
