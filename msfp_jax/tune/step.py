"""A training step as the loop calls it: state -> (state, scalars)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax


class Step:
  """A jitted update and what it takes beside the state.

  Compiled when it is first called; or before, by `compile`, so that what it
  needs is known before anything of it is there.

  Attributes:
    update: (state, *given) -> (state, scalars).
    shapes: of what is given: arrays, or their abstract forms.
  """

  def __init__(self, update: Any, given: Callable[[Any], Sequence[Any]],
               shapes: Sequence[Any]):
    """Keeps them.

    Args:
      update: jitted.
      given: state -> what the update of that state takes beside it.
      shapes: see above.
    """
    self.update, self.shapes = update, tuple(shapes)
    self._given = given

  def __call__(self, state: Any) -> tuple[Any, dict[str, jax.Array]]:
    return self.update(state, *self._given(state))

  @property
  def held(self) -> list[jax.Array]:
    """Arrays on the devices that it works on, which are there already."""
    return [leaf for leaf in jax.tree.leaves(self.shapes)
            if isinstance(leaf, jax.Array)]

  def compile(self, state: Any) -> jax.stages.Compiled:
    """Compiles the update for states like this one, and keeps the program.

    Args:
      state: its abstract form, with its sharding.
    """
    self.update = self.update.lower(state, *self.shapes).compile()
    return self.update
