"""Rematerialisation: activations computed twice instead of being kept.

Gradients need what every layer saw. With it computed again, block by block on
the way back, a step keeps less and takes longer:

    none       all of it is kept
    products   of a block what convolutions, dense layers and attention
               multiplied; norms, activations and quantizers run again
    blocks     what goes into each block; all of it runs again
"""

from collections.abc import Iterator
import contextlib
from typing import Any

import flax.linen as nn
import jax
from jax import lax
import numpy as np

NONE = 'none'
# What is kept of the inside of a block. Products cost the most time, and a
# norm, an activation and a quantizer each would keep as much memory as one.
_KEPT = {
    'products': lambda primitive, *unused, **unused_more: primitive in (
        lax.dot_general_p, lax.conv_general_dilated_p),
    'blocks': jax.checkpoint_policies.nothing_saveable,
}
WAYS = (NONE, *_KEPT)


class NoBlocksError(ValueError):
  """The model has no blocks, by which it would be rematerialised."""


@contextlib.contextmanager
def blocks(how: str) -> Iterator[None]:
  """While open, blocks of models that are differentiated are rematerialised.

  A block is a module whose class has `is_block = True` (`models.denoiser`),
  and lies in no other.

  Args:
    how: one of WAYS.

  Raises:
    NoBlocksError: at its end, if no block was called.
  """
  if how == NONE:
    yield
    return
  # The block that is being traced; what it calls runs as it would.
  inside, seen = [], []

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    if (inside or context.method_name != '__call__'
        or not getattr(type(module), 'is_block', False)):
      return next_fun(*args, **kwargs)
    seen.append(module.path)
    leaves, structure = jax.tree.flatten((args, kwargs))
    # What is no array is no argument of a function that is traced: `train`.
    arrays = {i: leaf for i, leaf in enumerate(leaves) if _is_array(leaf)}

    def run(module, arrays):
      args, kwargs = jax.tree.unflatten(
          structure, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
      inside.append(module)
      try:
        return module(*args, **kwargs)
      finally:
        inside.pop()

    return nn.remat(run, policy=_KEPT[how])(module, arrays)

  with nn.intercept_methods(interceptor):
    yield
  if not seen:
    raise NoBlocksError(
        f'rematerialisation {how!r}: the model has no blocks; give the class '
        "of its blocks `is_block = True`, or take 'none'")


def _is_array(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array | np.ndarray)
