"""Conditional models with classifier-free guidance built in."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from msfp_jax.models import denoiser


class Guided(nn.Module):
  """A UNet with classifier-free guidance, as one model of (x, t, labels).

  Both predictions come from one batch, first that without condition; so what
  is calibrated, distilled and sampled is the guided model. Parameters and
  layer names are the inner model's.

  Attributes:
    inner: a model of (x, t, labels).
    scale: s.
    null_label: the class that stands for none.
  """

  inner: nn.Module
  scale: float
  null_label: int

  def setup(self):
    # The UNet's parameters and layer names stay as they are, without a prefix.
    nn.share_scope(self, self.inner)

  @property
  def sample_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of what it denoises."""
    return self.inner.sample_shape

  @property
  def conditions(self) -> tuple[denoiser.Condition, ...]:
    """The labels below that of none."""
    return (denoiser.Condition('labels', classes=self.null_label),)

  def __call__(self, x: jax.Array, t: jax.Array, labels: jax.Array
               ) -> jax.Array:
    twice = lambda a: jnp.concatenate([a, a])
    null = jnp.full_like(labels, self.null_label)
    both = self.inner(
        twice(x), twice(t), jnp.concatenate([null, labels]))
    without, within = jnp.split(both, 2)
    return without + self.scale * (within - without)


class GuidedByText(nn.Module):
  """A model of a context with guidance, as one of two contexts.

  As `Guided`, where what it is led away from is a context too: that of an
  empty or of a negative prompt, for each image its own.

  Attributes:
    inner: a model of (x, t, context).
    text_scale: s; 1 for no guidance.
  """

  inner: nn.Module
  text_scale: float

  def setup(self):
    nn.share_scope(self, self.inner)

  @property
  def sample_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of what it denoises."""
    return self.inner.sample_shape

  @property
  def conditions(self) -> tuple[denoiser.Condition, ...]:
    """The inner model's context, and the one to be led away from."""
    context, = self.inner.conditions
    return context, dataclasses.replace(
        context, name=f'negative_{context.name}')

  def __call__(self, x: jax.Array, t: jax.Array, context: jax.Array,
               negative_context: jax.Array) -> jax.Array:
    twice = lambda a: jnp.concatenate([a, a])
    both = self.inner(twice(x), twice(t), context=jnp.concatenate(
        [negative_context, context]))
    without, within = jnp.split(both, 2)
    return without + self.text_scale * (within - without)
