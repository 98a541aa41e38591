"""Block: scales, and zero points, taken from the data themselves.

A scale may serve a tensor, an image, an output channel, a token (all of the
contraction at one place) or a group of neighbours along the contraction. With
scales in e4m3 below one of the tensor it is NVFP4, with powers of two MXFP4.
"""

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from msfp_jax.quant import functional
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qtensor import QTensor
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
    # The minimum of a group is its zero point: level 0, which comes back
    # exactly.
    zero = 0 if zero_point is None else tensor.spread(zero_point)
    # A group of zeros, or one whose scale rounds to 0, has levels of 0.
    # By the scales as they are stored, rounded to their type: the levels make
    # up for what the rounding of the scale did.
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
    # Devices differ in whether they flush subnormal numbers; none is left to
    # flush.
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
    # Beyond its maximum of 448 e4m3fn has no infinity, only NaN.
    return jnp.minimum(scale, largest).astype(SCALE_TYPES['e4m3']), outer

  def describe(self):
    sharing = f'{self.group}' if self.shared == 'group' else self.shared
    return {'format': str(self.fmt),
            'scale': f'{self.scale_type} by {sharing}'}


def _floor_log2(x: jax.Array) -> jax.Array:
  """floor(log2(x)) of normal x > 0, int32; exact, where a logarithm rounds."""
  # The exponent field is the logarithm; the sign bit is 0.
  return (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


def _exp2(power: jax.Array) -> jax.Array:
  """2^power of int32 from -126 to 127; XLA's exp2 is off by some bits."""
  return jax.lax.bitcast_convert_type((power + 127) << 23, jnp.float32)
