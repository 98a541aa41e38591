"""Block: scales, and zero points, taken from the data themselves.

A scale may serve a tensor, an image, an output channel, a token (all of the
contraction at one place) or a group of neighbours along the contraction. With
scales in e4m3 below one of the tensor it is NVFP4, with powers of two MXFP4
(OCP Microscaling Formats 1.0, 2023).
"""

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from msfp_jax.quant import functional
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qtensor import QTensor
from msfp_jax.quant.quantizers import compiled
from msfp_jax.quant.quantizers import FULL_BITS
from msfp_jax.quant.quantizers import Quantizer

_static = lambda **options: flax.struct.field(pytree_node=False, **options)
# `quantize` of inputs x [2, 6] in groups of 4, as of E2M1 with maximum 6:
#
#   x            [a b c d e f]             two rows of these
#   _grouped     [a b c d] [e f f f]       padded by its end: same extremes
#   _extremes    max |abcd|, max |ef|      [2, 2]
#   _scales      those / 6, in their type  [2, 2]
#   levels       x / spread(scales)        [2, 6], to the nearest level
#
# What shares a scale -> the axes over which it is taken, of inputs and of
# weights; None: not for these.
_SHARED = {
    'tensor': (lambda axes: range(axes), lambda axes: range(axes)),
    'image': (lambda axes: range(1, axes), None),
    'channel': (None, lambda axes: range(axes - 1)),
    'token': (lambda axes: [axes - 1], lambda axes: [axes - 2]),
    'group': (lambda axes: [axes - 1], lambda axes: [axes - 2]),
}
SCALE_TYPES = {'f32': np.float32, 'bf16': ml_dtypes.bfloat16,
               'e4m3': ml_dtypes.float8_e4m3fn,
               'e8m0': ml_dtypes.float8_e8m0fnu}
# By which the power of two of a group follows from its largest magnitude; in
# brackets where that then lies on E2M1's scale of 0 to 6.
RULES = (
    'floor',    # OCP's: cut off what exceeds the format's maximum; [4, 8)
    'ceil',     # the power of two above; (2, 4]
    'rceil',    # the smallest that cuts nothing off; (3, 6]
    'even',     # the magnitude first rounded to the format's digits; [3.5, 7)
    'optimal',  # of 'rceil' and half of it, that of least squared error
)


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
    scale_type: in which scales are kept: 'f32', 'bf16' (zero points as well),
      'e4m3' or 'e8m0', a power of two.
    two_level: whether a scale of the tensor, of inputs one of each image,
      stands before them, so that the largest of them is the type's maximum
      (NVFP4).
    rule: of RULES, for 'e8m0'.
    zero_point: of an unsigned format, one for all groups; None for each
      group's minimum. Below it everything is level 0, and the gradient is 0.
  """

  fmt: FPFormat = _static()
  shared: str = _static(default='group')
  group: int = _static(default=0)
  scale_type: str = _static(default='f32')
  two_level: bool = _static(default=False)
  rule: str = _static(default='floor')
  zero_point: float | None = _static(default=None)

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
    if self.rule not in RULES:
      raise ValueError(f'rule={self.rule!r}: must be one of {RULES}')
    if self.zero_point is not None and self.fmt.signed:
      raise ValueError(f'zero_point={self.zero_point} of {self.fmt}: it is for '
                       'unsigned formats')

  @property
  def bits(self) -> int:
    return self.fmt.bits

  @property
  def nbits(self):
    # Static, as programs differ by whether there is one, it is no leaf. One of
    # 0 is none: nothing is added.
    return FULL_BITS if self.zero_point else 0

  @property
  def cuts(self):
    return self.zero_point is not None, False

  @compiled
  def quantize(self, x, axis=-1):
    x = jnp.asarray(x, jnp.float32)
    axes = _SHARED[self.shared][0 if axis == -1 else 1]
    if axes is None:
      raise ValueError(f'shared={self.shared!r} is not for '
                       f'{"inputs" if axis == -1 else "weights"}')
    # 'edge': no new extremes in the last group.
    if self.shared == 'image' and x.ndim < 2:
      raise ValueError(f"shared='image': an input {list(x.shape)} has no axis "
                       'of images')
    low, high = self._extremes(
        self._grouped(x, axis, 'edge'), tuple(axes(x.ndim)), axis)
    zero_point = None
    if not self.fmt.signed:
      # The minimum of a group as its zero point: level 0, which comes back
      # exactly.
      zero_point = low if self.zero_point is None else jnp.float32(
          self.zero_point)
      if self.zero_point is None and self.scale_type == 'bf16':
        zero_point = zero_point.astype(jnp.bfloat16)
    reach = (jnp.maximum(high, -low) if zero_point is None and self.fmt.signed
             else jnp.maximum(high - zero_point, 0.0))
    scale, outer = self._scales(reach, axis)
    if self.zero_point == 0:
      zero_point = None
    tensor = QTensor(
        x, scale, zero_point, None, outer, fmt=self.fmt, length=x.shape[axis],
        axis=axis, group=self.group).with_levels_of(x)
    if self.scale_type == 'e8m0' and self.rule == 'optimal':
      return self._better(
          x, tensor, tensor.replace(scale=_half(scale)).with_levels_of(x))
    return tensor

  def _better(self, x, one, other):
    """Of two tensors, group by group, that of the smaller squared error."""
    axis = one.axis
    axes = tuple(_SHARED[self.shared][0 if axis == -1 else 1](x.ndim))

    def errors(tensor):
      squares = (tensor.dequantize() - x)**2
      if self.shared != 'group':
        return squares.sum(axes, keepdims=True)
      return self._grouped(squares, axis, 'constant').sum(axis)

    less = errors(other) < errors(one)
    # float8 types have no select on every back end.
    wide = lambda scale: scale.astype(jnp.float32)
    pick = lambda new, old: jnp.where(
        less, wide(new), wide(old)).astype(new.dtype)
    return one.replace(
        scale=pick(other.scale, one.scale),
        data=jnp.where(one.spread(less), other.data, one.data))

  def _grouped(self, x, axis, mode):
    """x with the contraction in groups, padded as np.pad's mode says."""
    return (grouped(x, axis, self.group, mode) if self.shared == 'group'
            else x)

  def _extremes(self, x, axes, axis):
    """Minimum and maximum of what shares a scale."""
    if self.shared == 'group':
      return x.min(axis), x.max(axis)
    return x.min(axes, keepdims=True), x.max(axes, keepdims=True)

  def _scales(self, reach, axis):
    """(scale, outer) so that the largest element is the format's maximum."""
    tiny = np.finfo(np.float32).tiny
    # Devices differ in whether they flush subnormal numbers; none is left to
    # flush.
    normal = lambda scale: jnp.where(scale < tiny, 0.0, scale)
    scale = normal(functional.divide(reach, self.fmt.max))
    if self.scale_type == 'f32':
      # Like a static one: exact products leave nothing to round differently.
      return (scale if self.fmt.signed
              else functional.snap_scale(scale)), None
    if self.scale_type == 'bf16':
      # 8 digits: times a level's 8 they are exact already.
      return scale.astype(SCALE_TYPES['bf16']), None
    if self.scale_type == 'e8m0':
      # 2^-127 is subnormal, flushed to 0, for which e8m0 has NaN.
      power = _power(jnp.maximum(reach, tiny), self.fmt, self.rule)
      return _exp2(jnp.clip(power, -126, 127)).astype(
          SCALE_TYPES['e8m0']), None
    largest = float(ml_dtypes.finfo(SCALE_TYPES['e4m3']).max)
    outer = None
    if self.two_level:
      # Of inputs for each image: no sample depends on others in its batch.
      whole = (tuple(range(1, scale.ndim))
               if axis == -1 and scale.ndim > 1 else None)
      outer = normal(functional.divide(
          scale.max(whole, keepdims=True), largest))
      scale = functional.divide(scale, jnp.where(outer > 0, outer, 1.0))
    # Beyond its maximum of 448 e4m3fn has no infinity, only NaN.
    return jnp.minimum(scale, largest).astype(SCALE_TYPES['e4m3']), outer

  def flaws(self):
    zero_point = self.zero_point
    return [] if zero_point is None or np.isfinite(zero_point) else [
        f'a zero point of {zero_point}']

  def describe(self):
    sharing = f'{self.group}' if self.shared == 'group' else self.shared
    shown = {'format': str(self.fmt),
             'scale': f'{self.scale_type} by {sharing}'}
    if not self.fmt.signed and self.zero_point != 0:
      shown['zero_point'] = ('minimum' if self.zero_point is None
                             else f'{self.zero_point:.3g}')
    return shown


def grouped(x: jax.Array, axis: int, group: int, mode: str) -> jax.Array:
  """x with the contraction in groups, on two axes: how many, and of `group`.

  Args:
    x: inputs `[..., I]` or weights `[..., I, O]`.
    axis: of the contraction, -1 or -2.
    group: neighbours.
    mode: of np.pad, by which the last group is filled up.
  """
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % group)
  x, at = jnp.pad(x, widths, mode=mode), x.ndim + axis
  return x.reshape(*x.shape[:at], -1, group, *x.shape[at + 1:])


def _power(reach: jax.Array, fmt: FPFormat, rule: str) -> jax.Array:
  """Power of two of a scale, int32, by the largest magnitude, normal and > 0.

  See RULES.
  """
  # All formats here have the largest mantissa in their top binade, so that
  # fmt.max is (2 - 2^-M) 2^top.
  top = int(np.floor(np.log2(fmt.max)))
  if rule == 'ceil':
    return _ceil_log2(reach) - top
  if rule in ('rceil', 'optimal'):
    # reach / max <= 2^power, as a comparison of mantissas: no division.
    power = _floor_log2(reach) - top
    return power + jnp.where(_mantissa(reach) > fmt.max / 2.0**top, 1, 0)
  if rule == 'even':
    # Half a unit of the last digit carries into the exponent from
    # 2 - 2^-(M + 1) on.
    half = np.int32(1 << (22 - fmt.mantissa_bits))
    bits = jax.lax.bitcast_convert_type(reach, jnp.int32) + half
    return (bits >> 23) - 127 - top
  return _floor_log2(reach) - top


def _half(scale: jax.Array) -> jax.Array:
  """scale / 2 of e8m0; its smallest normal power stays."""
  wide = scale.astype(jnp.float32)
  return jnp.maximum(wide * 0.5, np.finfo(np.float32).tiny).astype(scale.dtype)


def _floor_log2(x: jax.Array) -> jax.Array:
  """floor(log2(x)) of normal x > 0, int32; exact, where a logarithm rounds."""
  # The exponent field is the logarithm; the sign bit is 0.
  return (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


def _ceil_log2(x: jax.Array) -> jax.Array:
  """ceil(log2(x)), likewise."""
  return _floor_log2(x) + jnp.where(_mantissa(x) > 1, 1, 0)


def _mantissa(x: jax.Array) -> jax.Array:
  """x / 2^floor(log2(x)), in [1, 2)."""
  digits = jax.lax.bitcast_convert_type(x, jnp.int32) & ((1 << 23) - 1)
  return jax.lax.bitcast_convert_type(digits | 127 << 23, jnp.float32)


def _exp2(power: jax.Array) -> jax.Array:
  """2^power of int32 from -126 to 127; XLA's exp2 is off by some bits."""
  return jax.lax.bitcast_convert_type((power + 127) << 23, jnp.float32)
