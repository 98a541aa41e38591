"""Quantizers: small pytrees that turn tensors into QTensors.

- `Full` leaves a tensor as it is.
- `Static` has a scale and perhaps a zero point from calibration.
- `block.Block` takes its scales from the data, for every group or token.

A quantizer of one's own subclasses `Quantizer`, is a `flax.struct.dataclass`,
and defines `bits` and `quantize`; products, training, files and the report
take it as it is.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.quant import functional
from msfp_jax.quant import straight_through
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qtensor import QTensor

FULL_BITS = 32
_static = lambda **options: flax.struct.field(pytree_node=False, **options)

# For a `quantize` of many operations: called by itself, each of these would be
# compiled for every shape. In other programs it changes nothing.
compiled = functools.partial(jax.jit, static_argnames='axis', inline=True)


class Quantizer:
  """The base of all quantizers; subclasses define `bits` and `quantize`.

  KINDS holds the subclasses by name, by which files know them.
  """

  KINDS: ClassVar[dict[str, type['Quantizer']]] = {}

  def __init_subclass__(cls, **options: Any):
    super().__init_subclass__(**options)
    # A file names the class of a quantizer; to define or import it is to make
    # files with it loadable.
    Quantizer.KINDS[cls.__name__] = cls

  @property
  def bits(self) -> int:
    """Bits of an element, without its share of scales."""
    raise NotImplementedError

  @property
  def is_full(self) -> bool:
    """Whether the tensor stays in full precision."""
    return False

  @property
  def nbits(self) -> int:
    """Bits of its own parameters, which calibration found; files hold them."""
    return sum(FULL_BITS * np.size(leaf) for leaf in jax.tree.leaves(self))

  @property
  def cuts(self) -> tuple[bool, bool]:
    """Whether it cuts off what is below its range, and what is above.

    Not where that end of the range follows the data.
    """
    return False, False

  def quantize(self, x: jax.Array, axis: int = -1) -> QTensor:
    """The quantized tensor.

    Args:
      x: float; inputs `[..., I]`, weights `[*window, I, O]`.
      axis: of the contraction: -1 of inputs, -2 of weights.
    """
    raise NotImplementedError

  def fake_quant(self, x: jax.Array, axis: int = -1) -> jax.Array:
    """dequantize(quantize(x)), in x's dtype, with a straight-through gradient.

    With u = (x - zero point) / scale and q its level, the gradient is 1 for x,
    and 0 beyond an end of the range that `cuts` names. An end that follows the
    data cuts off little or nothing, only what the rounding of a scale leaves
    beyond it. The gradient of a quantizer's own parameters goes through scale
    and zero point, as in `functional.fake_quant`: q - u and 0 inside the range,
    q and 1 outside. What scale and zero point owe to x is left out.
    """
    tensor = self.quantize(jax.lax.stop_gradient(x), axis)
    zero = 0.0 if tensor.zero_point is None else tensor.spread(
        jnp.asarray(tensor.zero_point, jnp.float32))
    numbers = tensor.numbers
    levels = jax.lax.stop_gradient(tensor.levels())
    back = straight_through.with_gradient(
        (numbers.lowest, numbers.max), self.cuts, x, tensor.dequantize(),
        levels, tensor.element_scales(levels), zero)
    return back.astype(x.dtype)

  def quantize_banks(self, kernels: jax.Array) -> QTensor:
    """Weights `[h, *window, I, O]`, each of h sets by itself."""
    # One at a time: a scale from the data must not look at another bank's
    # weights.
    tensors = [quantize(self, kernel, -2) for kernel in kernels]
    # With all axes, so that a set's one scale is not taken for one that all
    # sets share.
    whole = lambda part: jnp.reshape(
        part, (1,) * (kernels.ndim - 1 - jnp.ndim(part)) + jnp.shape(part))
    return jax.tree.map(lambda *parts: jnp.stack([*map(whole, parts)]),
                        *tensors)

  def offsets(self) -> dict[str, jax.Array]:
    """Trainable parameters, all zero; empty where there is nothing to train."""
    return {}

  def moved(self, offsets: dict[str, jax.Array]) -> 'Quantizer':
    """The quantizer moved by trained `offsets`; zeros move nothing."""
    if offsets:
      raise ValueError(f'{type(self).__name__} has nothing to train, got '
                       f'{sorted(offsets)}')
    return self

  @property
  def num_steps(self) -> int | None:
    """The sampler's steps that it has a state for; None: they do not differ.

    A quantizer that differs by step defines this and `at`.
    """
    return None

  def at(self, step: Any) -> 'Quantizer':
    """The quantizer at a step of the sampler, where they differ by step."""
    del step
    return self

  def one_scale(self) -> tuple[FPFormat, Any, Any | None] | None:
    """(format, scale, zero point) of all that it quantizes, at any step.

    None where these depend on the data, or differ within a tensor.
    """
    return None

  def flaws(self) -> list[str]:
    """What of it no tensor can have; for what comes from files."""
    return []

  def describe(self) -> dict[str, str]:
    """For people: 'format', 'scale' and 'zero_point', those that it has."""
    return {'format': type(self).__name__}


@functools.partial(jax.jit, static_argnums=2)
def quantize(quantizer: Quantizer, x: jax.Array, axis: int) -> QTensor:
  """quantizer.quantize(x, axis), compiled as a whole.

  Called by itself, every one of a block format's operations would be compiled
  for every shape of weights.
  """
  return quantizer.quantize(x, axis)


@flax.struct.dataclass
class Full(Quantizer):
  """Full precision: nothing is quantized."""

  @property
  def bits(self) -> int:
    return FULL_BITS

  @property
  def is_full(self) -> bool:
    return True

  def quantize(self, x, axis=-1):
    raise TypeError('a tensor in full precision has no quantized form')

  def fake_quant(self, x, axis=-1):
    return x

  def describe(self):
    return {'format': 'full precision'}


@flax.struct.dataclass
class Static(Quantizer):
  """Scale and zero point from calibration.

  Attributes:
    fmt: the number format.
    scale: float32, positive, a normal number, broadcasts to the tensor: `[]`,
      or of weights `[1, ..., O]`. With `by_step` a first axis of the sampler's
      steps.
    zero_point: likewise, or None.
    by_step: whether scale and zero point differ by step.
  """

  fmt: FPFormat = _static()
  scale: jax.Array
  zero_point: jax.Array | None = None
  by_step: bool = _static(default=False)

  @property
  def bits(self) -> int:
    return self.fmt.bits

  @property
  def cuts(self):
    return True, True

  def quantize(self, x, axis=-1):
    # Before broadcasting: a scale of [S] might fit to the tensor by accident.
    self._check_step()
    return self._tensor(functional.nearest_level(
        x, self.fmt, self.scale, self.zero_point), axis)

  def _tensor(self, levels, axis):
    as_array = lambda part: None if part is None else jnp.asarray(
        part, jnp.float32)
    return QTensor(levels, as_array(self.scale), as_array(self.zero_point),
                   fmt=self.fmt, length=levels.shape[axis], axis=axis)

  def quantize_banks(self, kernels):
    # The sets share one scale.
    # Under jit the caller's program is compiled as a whole, and there is
    # nothing to save. Concrete weights go in pieces, one compilation for all
    # layers' shapes.
    if isinstance(kernels, jax.core.Tracer) or isinstance(
        self.scale, jax.core.Tracer):
      return self.quantize(kernels, axis=-2)
    levels = functional.nearest_level_in_pieces(
        kernels, self.fmt, self.scale, self.zero_point)
    return self._tensor(jnp.asarray(levels, jnp.float32), axis=-2)

  def fake_quant(self, x, axis=-1):
    self._check_step()
    return functional.fake_quant(x, self.fmt, self.scale, self.zero_point)

  def offsets(self):
    """{'log_scale'} and, where there is one, {'zero_point'} in scales."""
    # Both without a unit, so that one learning rate serves layers whose ranges
    # differ by orders of magnitude.
    zeros = {'log_scale': jnp.zeros_like(self.scale)}
    if self.zero_point is not None:
      zeros['zero_point'] = jnp.zeros_like(self.zero_point)
    return zeros

  def moved(self, offsets):
    """Scale times exp(log_scale); zero point plus offset, in old scales."""
    # The exponential keeps it positive, whatever the optimizer does, and the
    # bound normal: at the least scale of all the tensor is next to 0.
    scale = jnp.maximum(self.scale * jnp.exp(offsets['log_scale']),
                        functional.TINY)
    zero_point = self.zero_point
    if zero_point is not None:
      # Only where something is added to scale * level: an exact product is then
      # rounded once, with or without a fused multiply-add (see
      # `functional.snap_scale`). Calibration snapped it too, so an offset of 0
      # moves nothing.
      scale = functional.snap_scale(scale)
      zero_point = zero_point + self.scale * offsets['zero_point']
    return self.replace(scale=scale, zero_point=zero_point)

  @property
  def num_steps(self):
    return len(self.scale) if self.by_step else None

  def at(self, step):
    # By step, arrays are [S, ...]; `step` may be traced, as in a sampler's
    # scan.
    if not self.by_step:
      return self
    pick = lambda part: None if part is None else jnp.asarray(part)[step]
    return Static(self.fmt, pick(self.scale), pick(self.zero_point))

  def one_scale(self):
    if np.ndim(self.scale) > self.by_step:
      return None
    return self.fmt, self.scale, self.zero_point

  def flaws(self):
    return [] if (np.asarray(self.scale) >= functional.TINY).all() else [
        f'a scale that is not positive, or below {functional.TINY:.3g}']

  def describe(self):
    shown = {'format': str(self.fmt), 'scale': _range_of(self.scale)}
    if self.zero_point is not None:
      shown['zero_point'] = _range_of(self.zero_point)
    return shown

  def _check_step(self):
    if self.by_step:
      raise ValueError('a quantizer that differs by step: take at(step) first')


def _range_of(values: Any) -> str:
  low, high = np.min(values), np.max(values)
  return f'{low:.3g}' if low == high else f'{low:.3g} to {high:.3g}'


def fields_of(quantizer: Quantizer) -> dict[str, Any]:
  """The fields of a quantizer, by name; those at their default left out."""
  # Only plain values are compared with their default: of arrays == gives an
  # array.
  return {field.name: value for field in dataclasses.fields(quantizer)
          if (value := getattr(quantizer, field.name)) is not None
          and not (field.default is not dataclasses.MISSING
                   and isinstance(value, bool | int | str)
                   and value == field.default)}


def flaws_of(quantizer: Quantizer) -> list[str]:
  """What of it no tensor can have: its own flaws, and values not finite.

  Looked at where a quantizer is found, as well as where a file has one: what
  is saved can be loaded.
  """
  found = []
  for name, value in fields_of(quantizer).items():
    if isinstance(value, Quantizer):
      found += flaws_of(value)
    elif isinstance(value, jax.Array) and not np.isfinite(value).all():
      found.append(f'a {name} that is not finite')
  return found + quantizer.flaws()
