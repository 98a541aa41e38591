"""Denoiser: the interface through which runs use models of any family."""

from collections.abc import Mapping
import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Condition:
  """One input of a model beside x and t: labels, or vectors such as a text's.

  Attributes:
    name: of the argument.
    classes: labels are int32 `[B]` below this number; None of vectors.
    shape: vectors are float32 `[B, *shape]`; 1 stands for an axis of any
      length.
  """

  name: str
  classes: int | None = None
  shape: tuple[int, ...] = ()

  def abstract(self, batch: int) -> jax.ShapeDtypeStruct:
    """Its shape and type for a batch."""
    if self.classes is not None:
      return jax.ShapeDtypeStruct((batch,), jnp.int32)
    return jax.ShapeDtypeStruct((batch, *self.shape), jnp.float32)


def shape_of(config: Any) -> tuple[int, int, int]:
  """(H, W, C) by the fields of a configuration that all families share.

  Args:
    config: has image_size, image_width (None: as high as wide), in_channels.
  """
  return (config.image_size, config.image_width or config.image_size,
          config.in_channels)


class Denoiser(Protocol):
  """A linen module, called as model(x, t, *conditions), with a name in files.

  x is `[B, *sample_shape]` float32, t `[B]`, and so is the result like x.

  A module of it whose class has `is_block = True` can be computed twice in
  training, to save memory (see `tune.remat`): one of the many that follow each
  other, not the whole.
  """

  @property
  def sample_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of what it denoises."""

  @property
  def conditions(self) -> tuple[Condition, ...]:
    """The model's inputs after x and t, in the order of its arguments."""

  def to_dict(self) -> dict[str, Any]:
    """Its configuration, JSON-able."""

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> 'Denoiser':
    """The inverse. Raises TypeError or ValueError for what does not fit."""

  def init(self, rngs: Any, x: jax.Array, t: jax.Array, *conditions: jax.Array
           ) -> Any:
    """linen's: {'params': ...} at random."""

  def apply(self, variables: Any, x: jax.Array, t: jax.Array,
            *conditions: jax.Array) -> jax.Array:
    """linen's: the prediction."""
