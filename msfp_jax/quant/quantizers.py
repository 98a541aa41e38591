"""Quantizers: small pytrees that turn tensors into QTensors.

- `Full` leaves a tensor as it is.
- `Static` has a scale and perhaps a zero point from calibration.
- `Block` takes its scales from the data, for every group, token or image.

A quantizer of one's own subclasses `Quantizer`, is a `flax.struct.dataclass`,
and defines `bits` and `quantize`; products, training, files and the report
take it as it is.
"""

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from msfp_jax.quant import functional
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qtensor import QTensor

FULL_BITS = 32
_static = lambda **options: flax.struct.field(pytree_node=False, **options)


class Quantizer:
  """What every quantizer has; subclasses define `bits` and `quantize`.

  KINDS holds the subclasses by name, by which files know them.
  """

  KINDS: ClassVar[dict[str, type['Quantizer']]] = {}

  def __init_subclass__(cls, **options: Any):
    super().__init_subclass__(**options)
    Quantizer.KINDS[cls.__name__] = cls

  @property
  def bits(self) -> int:
    """Bits of an element, without its share of scales."""
    raise NotImplementedError

  @property
  def is_full(self) -> bool:
    """Whether the tensor stays in full precision."""
    return False

  def quantize(self, x: jax.Array, axis: int = -1) -> QTensor:
    """The quantized tensor.

    Args:
      x: float; inputs `[..., I]`, weights `[*window, I, O]`.
      axis: of the contraction: -1 of inputs, -2 of weights.
    """
    raise NotImplementedError

  def fake_quant(self, x: jax.Array, axis: int = -1) -> jax.Array:
    """dequantize(quantize(x)), in x's dtype, with a straight-through gradient.

    The gradient is 1 everywhere: a quantizer whose scale follows the data
    saturates nowhere. `Static` has that of `functional.fake_quant`.
    """
    return _pass_through(x, self.quantize(x, axis).dequantize().astype(x.dtype))

  def quantize_banks(self, kernels: jax.Array) -> QTensor:
    """Weights `[h, *window, I, O]`, each of h sets by itself."""
    tensors = [self.quantize(kernel, axis=-2) for kernel in kernels]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *tensors)

  def offsets(self) -> dict[str, jax.Array]:
    """What training may move, all zero; empty where there is nothing."""
    return {}

  def moved(self, offsets: dict[str, jax.Array]) -> 'Quantizer':
    """The quantizer moved by trained `offsets`; zeros move nothing."""
    if offsets:
      raise ValueError(f'{type(self).__name__} has nothing to train, got '
                       f'{sorted(offsets)}')
    return self

  def at(self, step: Any) -> 'Quantizer':
    """The quantizer at a step of the sampler, where they differ by step."""
    del step
    return self

  def describe(self) -> dict[str, str]:
    """For people: 'format', 'scale' and 'zero_point', those that it has."""
    return {'format': type(self).__name__}


@jax.custom_jvp
def _pass_through(x, quantized):
  """quantized, with the gradient of x."""
  del x
  return quantized


_pass_through.defjvp(lambda primals, tangents: (primals[1], tangents[0]))


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
    scale: float32, positive, broadcasts to the tensor: `[]`, or of weights
      `[1, ..., O]`. With `by_step` a first axis of the sampler's steps.
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

  def quantize(self, x, axis=-1):
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
    if isinstance(kernels, jax.core.Tracer) or isinstance(
        self.scale, jax.core.Tracer):
      return self.quantize(kernels, axis=-2)
    levels = functional.nearest_level_in_pieces(
        kernels, self.fmt, self.scale, self.zero_point)
    return self._tensor(jnp.asarray(levels), axis=-2)

  def fake_quant(self, x, axis=-1):
    self._check_step()
    return functional.fake_quant(x, self.fmt, self.scale, self.zero_point)

  def offsets(self):
    """{'log_scale'} and, where there is one, {'zero_point'} in scales."""
    zeros = {'log_scale': jnp.zeros_like(self.scale)}
    if self.zero_point is not None:
      zeros['zero_point'] = jnp.zeros_like(self.zero_point)
    return zeros

  def moved(self, offsets):
    """Scale times exp(log_scale); zero point plus offset, in old scales."""
    scale = self.scale * jnp.exp(offsets['log_scale'])
    zero_point = self.zero_point
    if zero_point is not None:
      scale = functional.snap_scale(scale)
      zero_point = zero_point + self.scale * offsets['zero_point']
    return self.replace(scale=scale, zero_point=zero_point)

  def at(self, step):
    if not self.by_step:
      return self
    pick = lambda part: None if part is None else jnp.asarray(part)[step]
    return Static(self.fmt, pick(self.scale), pick(self.zero_point))

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


# What shares a scale -> the axes over which it is taken, of inputs and of
# weights; None: not for these.
_SHARED = {
    'tensor': (lambda axes: range(axes), lambda axes: range(axes)),
    'image': (lambda axes: range(1, axes), None),
    'channel': (None, lambda axes: range(axes - 1)),
    'token': (lambda axes: [axes - 1], lambda axes: [axes - 2]),
    'group': (lambda axes: [axes - 1], lambda axes: [axes - 2]),
}
SCALE_TYPES = {'f32': np.float32, 'e4m3': ml_dtypes.float8_e4m3fn,
               'e8m0': ml_dtypes.float8_e8m0fnu}


@flax.struct.dataclass
class Block(Quantizer):
  """Scales, and zero points for unsigned formats, from the data themselves.

  Attributes:
    fmt: the number format. A signed one takes the largest magnitude of a
      group, an unsigned one its minimum (as zero point) and its range.
    shared: what shares a scale: 'tensor', 'image' (inputs), 'channel'
      (weights: an output channel), 'token' (all of the contraction at one
      place) or 'group'.
    group: neighbours along the contraction, of 'group'.
    scale_type: in which scales are kept: 'f32', 'e4m3' or 'e8m0' (the largest
      magnitude's power of two over that of the format's maximum, OCP MX).
    two_level: whether a scale of the tensor stands before them, so that the
      largest of them is the type's maximum (NVFP4).
  """

  fmt: FPFormat = _static()
  shared: str = _static(default='group')
  group: int = _static(default=0)
  scale_type: str = _static(default='f32')
  two_level: bool = _static(default=False)

  def __post_init__(self):
    if self.shared not in _SHARED:
      raise ValueError(
          f'shared={self.shared!r}: must be one of {sorted(_SHARED)}')
    if (self.shared == 'group') != (self.group > 0):
      raise ValueError(f'group={self.group} and shared={self.shared!r}: a '
                       "group has a size of 1 or more, and shared='group'")
    if self.scale_type not in SCALE_TYPES:
      raise ValueError(f'scale_type={self.scale_type!r}: must be one of '
                       f'{sorted(SCALE_TYPES)}')

  @property
  def bits(self) -> int:
    return self.fmt.bits

  def quantize(self, x, axis=-1):
    x = jnp.asarray(x, jnp.float32)
    axes = _SHARED[self.shared][0 if axis == -1 else 1]
    if axes is None:
      raise ValueError(f'shared={self.shared!r} is not for '
                       f'{"inputs" if axis == -1 else "weights"}')
    groups = self._grouped(x, axis)
    low, high = self._extremes(groups, tuple(axes(x.ndim)), axis)
    zero_point = None if self.fmt.signed else low
    reach = jnp.maximum(high, -low) if self.fmt.signed else high - low
    scale, outer = self._scales(reach)
    tensor = QTensor(
        x, scale, zero_point, None, outer, fmt=self.fmt, length=x.shape[axis],
        axis=axis, group=self.group)
    zero = 0 if zero_point is None else tensor.spread(zero_point)
    # A group of zeros, or one whose scale rounds to 0, has levels of 0.
    divisor = tensor.spread(tensor.scales())
    empty = divisor == 0
    levels = functional.nearest_level(
        jnp.where(empty, 0.0, x - zero), self.fmt,
        jnp.where(empty, 1.0, divisor))
    return tensor.replace(data=levels)

  def _grouped(self, x, axis):
    """x with the contraction in groups, padded with repeats of its end."""
    if self.shared != 'group':
      return x
    missing = -x.shape[axis] % self.group
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    x = jnp.pad(x, widths, mode='edge')
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], -1, self.group, *x.shape[at + 1:])

  def _extremes(self, x, axes, axis):
    """Minimum and maximum of what shares a scale."""
    if self.shared == 'group':
      return x.min(axis), x.max(axis)
    return x.min(axes, keepdims=True), x.max(axes, keepdims=True)

  def _scales(self, reach):
    """(scale, outer) so that the largest element is the format's maximum."""
    tiny = np.finfo(np.float32).tiny
    normal = lambda scale: jnp.where(scale < tiny, 0.0, scale)
    scale = normal(functional.divide(reach, self.fmt.max))
    if self.scale_type == 'f32':
      # Like a static one: exact products leave nothing to round differently.
      return (scale if self.fmt.signed
              else functional.snap_scale(scale)), None
    if self.scale_type == 'e8m0':
      top = int(np.floor(np.log2(self.fmt.max)))
      power = _floor_log2(jnp.maximum(reach, tiny)) - top
      # 2^-127 is subnormal, flushed to 0, for which e8m0 has NaN.
      scale = _exp2(jnp.clip(power, -126, 127))
      return scale.astype(SCALE_TYPES['e8m0']), None
    largest = float(ml_dtypes.finfo(SCALE_TYPES['e4m3']).max)
    outer = None
    if self.two_level:
      outer = normal(functional.divide(scale.max(keepdims=True), largest))
      scale = functional.divide(scale, jnp.where(outer > 0, outer, 1.0))
    return jnp.minimum(scale, largest).astype(SCALE_TYPES['e4m3']), outer

  def describe(self):
    sharing = f'{self.group}' if self.shared == 'group' else self.shared
    return {'format': str(self.fmt),
            'scale': f'{self.scale_type} by {sharing}'}


def _floor_log2(x: jax.Array) -> jax.Array:
  """Of normal numbers above 0, int32; exact where a logarithm would round."""
  return (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


def _exp2(power: jax.Array) -> jax.Array:
  """2^power of int32 from -126 to 127; XLA's exp2 is off by some bits."""
  return jax.lax.bitcast_convert_type((power + 127) << 23, jnp.float32)


def fields_of(quantizer: Quantizer) -> dict[str, Any]:
  """The fields of a quantizer, by name; those at their default left out."""
  return {field.name: value for field in dataclasses.fields(quantizer)
          if (value := getattr(quantizer, field.name)) is not None
          and not (field.default is not dataclasses.MISSING
                   and isinstance(value, bool | int | str)
                   and value == field.default)}
