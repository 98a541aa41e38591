"""Conditional models with classifier-free guidance built in."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from msfp_jax.models import denoiser


class _Guidance(nn.Module):
  """What guidance by labels and by texts have in common.

  Both predictions come from one batch, first that which is led away from; so
  what is calibrated, distilled and sampled is the guided model. Parameters and
  layer names are the inner model's.

  Attributes:
    inner: a model of (x, t, condition).
  """

  inner: nn.Module

  def setup(self):
    # The UNet's parameters and layer names stay as they are, without a prefix.
    nn.share_scope(self, self.inner)

  @property
  def sample_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of what it denoises."""
    return self.inner.sample_shape

  def _lead(self, predict, scale, x, t, away, toward):
    """p(away) + scale * (p(toward) - p(away)), p = predict(x, t, condition)."""
    twice = lambda a: jnp.concatenate([a, a])
    both = predict(twice(x), twice(t), jnp.concatenate([away, toward]))
    without, within = jnp.split(both, 2)
    return without + scale * (within - without)


class Guided(_Guidance):
  """A UNet with classifier-free guidance, as one model of (x, t, labels).

  Attributes:
    inner: a model of (x, t, labels).
    scale: s.
    null_label: the class that stands for none.
  """

  scale: float
  null_label: int

  @property
  def conditions(self) -> tuple[denoiser.Condition, ...]:
    """The labels below that of none."""
    return (denoiser.Condition('labels', classes=self.null_label),)

  def __call__(self, x: jax.Array, t: jax.Array, labels: jax.Array
               ) -> jax.Array:
    null = jnp.full_like(labels, self.null_label)
    return self._lead(self.inner, self.scale, x, t, null, labels)


class GuidedByText(_Guidance):
  """A model of a context with guidance, as one of two contexts.

  As `Guided`, where what it is led away from is a context too: that of an
  empty or of a negative prompt, for each image its own.

  Attributes:
    inner: a model of (x, t, context).
    text_scale: s; 1 for no guidance.
  """

  text_scale: float

  @property
  def conditions(self) -> tuple[denoiser.Condition, ...]:
    """The inner model's context, and the one to be led away from."""
    context, = self.inner.conditions
    return context, dataclasses.replace(
        context, name=f'negative_{context.name}')

  def __call__(self, x: jax.Array, t: jax.Array, context: jax.Array,
               negative_context: jax.Array) -> jax.Array:
    predict = lambda x, t, context: self.inner(x, t, context=context)
    return self._lead(
        predict, self.text_scale, x, t, negative_context, context)
