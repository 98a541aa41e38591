"""Around: smoothing, rotation and low-rank branch of a quantized product.

    y = Q_a(x') Q_w(W') + (x' A) B + bias
    x' = H (x / s),    W' = H^-1 (s W) - A B

so that without quantization y is the layer's own result. s is a factor for
every input channel (smoothing), H rotates blocks of channels (Hadamard), A B is
a branch of low rank in 16 bits. A recipe's `around` finds them before the
quantizers of what is left.
"""

from collections.abc import Callable, Collection
import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import functional


@flax.struct.dataclass
class Around:
  """Smoothing, rotation and low-rank branch of one layer; each may be absent.

  Attributes:
    smooth: s, float32 `[I]`.
    down: A, `[*window, I, R]`, 16-bit.
    up: B, `[R, O]`, 16-bit.
    rotation: channels that are rotated together, a power of two that divides
      I; 0 for none.
  """

  smooth: jax.Array | None = None
  down: jax.Array | None = None
  up: jax.Array | None = None
  rotation: int = flax.struct.field(pytree_node=False, default=0)

  @property
  def moves_input(self) -> bool:
    """Whether the product sees another input than the layer."""
    return self.smooth is not None or self.rotation > 0

  @property
  def nbits(self) -> int:
    """Bits that it takes in a file."""
    return sum(8 * np.dtype(part.dtype).itemsize * math.prod(part.shape)
               for part in (self.smooth, self.down, self.up)
               if part is not None)

  def flaws(self, channels: int | None = None) -> list[str]:
    """Lists the faults that no product can work with; checks what files hold.

    Args:
      channels: I, where it is known.
    """
    found = [f'{name} holds values that are not finite'
             for name in ('smooth', 'down', 'up')
             if (part := getattr(self, name)) is not None
             and not np.isfinite(np.asarray(part, np.float32)).all()]
    if self.smooth is not None and (np.asarray(self.smooth) <= 0).any():
      found.append('smooth holds values that are not positive')
    size = self.rotation
    if not isinstance(size, int) or size < 0 or size & (size - 1) or (
        size and channels and channels % size):
      found.append(f'rotation of {size!r} channels')
    return found

  def input(self, x: jax.Array) -> jax.Array:
    """x' of x `[..., I]`."""
    if self.moves_input:
      # A half-precision model's input is quantized as it comes, and so it is
      # smoothed and rotated.
      x = jnp.asarray(x, jnp.float32)
    if self.smooth is not None:
      x = functional.divide(x, self.smooth)
    return hadamard(x, self.rotation) if self.rotation else x

  def residual(self, kernel: jax.Array) -> jax.Array:
    """W' of W `[*window, I, O]`."""
    # The branch is taken off what smoothing and rotation leave, as it works on
    # x'.
    kernel = self.moved(kernel)
    return kernel if self.down is None else kernel - self.low_rank()

  def moved(self, kernel: jax.Array) -> jax.Array:
    """W' without the branch taken off."""
    if self.smooth is not None:
      # (x / s) (s W) = x W, and (x H) (H W) = x W, as H is its own inverse. On
      # axis -2, the input channels; a window in front is the same for each of
      # its taps.
      kernel = kernel * self.smooth[:, None]
    if self.rotation:
      kernel = jnp.swapaxes(kernel, -1, -2)
      kernel = jnp.swapaxes(hadamard(kernel, self.rotation), -1, -2)
    return kernel

  def low_rank(self) -> jax.Array:
    """A B, `[*window, I, O]`, float32."""
    return jnp.einsum('...r,ro->...o', jnp.float32(self.down),
                      jnp.float32(self.up), precision='highest')

  def seen(self, seen: fit_lib.Seen) -> fit_lib.Seen:
    """Observations of x', of those of the layer's input; None if not known.

    Where the input is moved, that is what whole vectors of it tell.
    """
    # A branch alone leaves the input as it is.
    if not self.moves_input:
      return seen
    gram = None if seen.gram is None else self._gram(seen.gram)
    if seen.rows is None:
      return fit_lib.Seen(gram=gram)
    # Values at random places cannot be smoothed or rotated: each needs its
    # channel, and its neighbours. Extremes are then of the sample alone.
    rows = np.asarray(self.input(seen.rows))
    minimum = float(rows.min())
    if seen.minimum is not None and seen.minimum < 0 and not self.rotation:
      # Signs outlast smoothing: where there were negative values, there are,
      # though the sample has none.
      minimum = min(minimum, seen.minimum / float(np.max(self.smooth)))
    return dataclasses.replace(
        seen, values=rows.ravel(), rows=rows, minimum=minimum,
        maximum=float(rows.max()), channel_maxima=np.abs(rows).max(0),
        gram=gram, by_step=None, weighted=None)

  def _gram(self, gram: np.ndarray) -> np.ndarray:
    """The Gram matrix `[K, K]` of x' from that of x, float64."""
    # x' = x M, so M^T G M. A window's taps are all moved alike.
    gram = np.asarray(gram, np.float64)
    if self.smooth is not None:
      smooth = np.asarray(self.smooth, np.float64)
      smooth = np.tile(smooth, len(gram) // len(smooth))
      gram = gram / smooth / smooth[:, None]
    if self.rotation:
      matrix = np.float64(hadamard(jnp.eye(self.rotation), self.rotation))
      number = len(gram) // self.rotation
      blocks = gram.reshape((number, self.rotation) * 2)
      gram = np.einsum('aibj,ik,jl->akbl', blocks, matrix, matrix,
                       optimize=True).reshape(gram.shape)
    return gram


@dataclasses.dataclass(frozen=True)
class Trial:
  """What a layer would lose with this or that around its product.

  Attributes:
    seen: of the layer's input, at least what the finder's `needs` names.
    kernel: W, `[*window, I, O]`.
    weights: a candidate for W' -> what is left of it once quantized.
    inputs: observations of x' -> their rows, quantized.
    bits: of the weights, 3 to 8.
  """

  seen: fit_lib.Seen
  kernel: np.ndarray
  weights: Callable[[np.ndarray], np.ndarray]
  inputs: Callable[[fit_lib.Seen], np.ndarray]
  bits: int = 4

  def error(self, around: Around) -> float:
    """Sum over the rows that were seen of the output's squared error.

    Every tap of a window by itself, as what was seen are vectors of channels:
    of a larger window it is the error without what its taps have in common.
    """
    return self.errors(around)(np.asarray(around.residual(self.kernel)))[0]

  def errors(self, around: Around
             ) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """W' -> its error, and W' once quantized: for trying many branches.

    Args:
      around: whose smoothing and rotation they share. Their input is moved and
        quantized once.
    """
    seen = around.seen(self.seen)
    rows = np.asarray(seen.rows, np.float32)
    both = np.concatenate([self.inputs(seen), rows], axis=1, dtype=np.float32)

    def error(residual: np.ndarray) -> tuple[float, np.ndarray]:
      residual = np.asarray(residual, np.float32)
      quantized = self.weights(residual).astype(np.float32)
      # Q(x') Q(W') - x' W', as one product: x' A B, which both the layer and
      # its quantized form have, is left out.
      loss = both @ np.concatenate([_flat(quantized), -_flat(residual)])
      return float(np.sum(np.square(loss), dtype=np.float64)), quantized
    return error


def _flat(kernel: np.ndarray) -> np.ndarray:
  """`[*window, I, O]` -> `[I, window O]`: what a row is multiplied with."""
  inner, outer = kernel.shape[-2:]
  taps = kernel.reshape(-1, inner, outer)
  return taps.swapaxes(0, 1).reshape(inner, -1)


class FindAround:
  """Finds the Around of a layer; subclasses define `__call__`, `needs`."""

  needs: Collection[str] = ()

  def __call__(self, trial: Trial) -> Around:
    """Finds smoothing, rotation and branch for one layer."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Rotation(FindAround):
  """Hadamard rotation of blocks of neighbouring channels (HQ-DM).

  It spreads what a channel holds over its block, so that inputs become
  symmetric and nearly normal: tails like SiLU's, for which MSFP has unsigned
  formats, are then gone.

  Attributes:
    size: of a block; where it does not divide the channels, the largest power
      of two that does.
    only_if_better: whether layers whose output has the smaller error without
      stay as they are.
  """

  size: int = 32
  only_if_better: bool = False
  needs = (fit_lib.ROWS,)

  def __post_init__(self):
    if self.size < 2 or self.size & (self.size - 1):
      raise ValueError(f'Rotation of size={self.size}: must be a power of two '
                       'of 2 or more')

  def __call__(self, trial):
    channels = trial.kernel.shape[-2]
    # The lowest bit that is set is the largest power of two that divides.
    size = min(self.size, channels & -channels)
    rotated = Around(rotation=size if size > 1 else 0)
    if self.only_if_better and trial.error(rotated) >= trial.error(Around()):
      return Around()
    return rotated


def hadamard(x: jax.Array, size: int) -> jax.Array:
  """Rotates blocks of `size` neighbours along the last axis; its own inverse.

  By the normalized Hadamard matrix of Sylvester's order, in log2(size) passes
  of sums and differences.

  Raises:
    ValueError: size is no power of two, or does not divide the axis.
  """
  if size < 1 or size & (size - 1) or x.shape[-1] % size:
    raise ValueError(f'rotation of {size} channels: must be a power of two '
                     f'that divides {x.shape[-1]}')
  # Four channels: passes over neighbours at a distance of 2, then 1.
  #
  #   a  a+c  (a+c) + (b+d)
  #   b  b+d  (a+c) - (b+d)
  #   c  a-c  (a-c) + (b-d)
  #   d  b-d  (a-c) - (b-d)
  #
  # n log n additions in place of a product with an n x n matrix. Every pass
  # lengthens a vector by sqrt 2, which is taken off once, at the end.
  shape = x.shape
  half = size // 2
  while half:
    pairs = x.reshape(*shape[:-1], -1, 2, half)
    a, b = pairs[..., 0, :], pairs[..., 1, :]
    x = jnp.stack([a + b, a - b], axis=-2).reshape(shape)
    half //= 2
  return x * np.float32(1 / math.sqrt(size))
