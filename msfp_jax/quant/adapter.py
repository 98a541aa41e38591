"""Adapter: what LoRAs of a user add to a quantized layer.

    y = Q_a(x') Q_w(W') + (x' A) B + bias + ((x down) gain) up

A branch of low rank like a recipe's own (`around`), and apart from it: weights
are not quantized anew, and LoRAs come, change and go without touching them. It
sees the layer's input x, before smoothing and rotation, for which the LoRA was
trained.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np


@flax.struct.dataclass
class Adapter:
  """A branch of one layer, of as many LoRAs as there are.

  Their ranks stand beside each other: two products for all of them.

  Attributes:
    down: `[*window, I, R]`, float16 or bfloat16; float32 of LoRAs in both.
    up: `[R, O]`, likewise.
    gain: float32 `[R]`, a LoRA's strength times its scale for each of its
      ranks. The only part that changes with strengths, and it may be traced.
  """

  down: jax.Array
  up: jax.Array
  gain: jax.Array


def join(parts: Sequence[tuple[np.ndarray, np.ndarray, jax.Array | float]]
         ) -> Adapter:
  """One adapter of several.

  Args:
    parts: (down `[*window, I, R]`, up `[R, O]`, factor) each, the arrays of any
      float type; what is of 16 bits stays as it is, all other becomes bfloat16.
  """
  down, up = (_joined([part[i] for part in parts], axis)
              for i, axis in ((0, -1), (1, 0)))
  gains = [(factor, part.shape[-1]) for part, _, factor in parts]
  # On the host, like the codes: before anything is sampled, a device holds
  # nothing. A traced factor is where its trace is.
  if any(isinstance(factor, jax.core.Tracer) for factor, _ in gains):
    return Adapter(down, up, jnp.concatenate(
        [jnp.full(rank, factor, jnp.float32) for factor, rank in gains]))
  return Adapter(down, up, np.concatenate(
      [np.full(rank, factor, np.float32) for factor, rank in gains]))


def _joined(arrays, axis):
  halves = [array if array.dtype.itemsize == 2
            else array.astype(ml_dtypes.bfloat16) for array in arrays]
  if len({half.dtype for half in halves}) > 1:
    # Neither of float16 and bfloat16 holds the other; this loses nothing.
    halves = [half.astype(np.float32) for half in halves]
  return np.concatenate(halves, axis) if halves[1:] else halves[0]
