"""Suppressed: QuaRTZ, 8 bits of which a group's leading zeros are left out.

After "Post-Training Quantization via Residual Truncation and Zero Suppression
for Diffusion Models" (Kim et al., arXiv 2509.26436). A first stage quantizes to
8-bit integers. Of a group of neighbours along the contraction the largest then
says how many leading bits all of them have at 0; of each, the 4 bits from there
on are kept, and of the group how far they are shifted, its FLAG.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.quant import numbers
from msfp_jax.quant.block import Block
from msfp_jax.quant.block import grouped
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qtensor import QTensor
from msfp_jax.quant.quantizers import compiled
from msfp_jax.quant.quantizers import Quantizer
from msfp_jax.quant.quantizers import Static

_static = lambda **options: flax.struct.field(pytree_node=False, **options)
ROUNDINGS = (
    'nearest',  # half away from zero, then at most the largest code
    'truncate',  # as the paper has it: what is shifted out is dropped
)


# The codes -100, 22, 7, 3 of 8 bits: a sign and 7 bits of magnitude. 4 bits
# keep the sign and 3 of magnitude:
#
#   magnitude   1100100  0010110  0000111  0000011   the largest has 7 bits
#   FLAG        7 - 3 = 4
#   truncated   110      001      000      000       times 16: 96 16  0  0
#   nearest     6.25: 6  1.375: 1 0.44: 0  0.19: 0   here the same
#
# Without the first of them the largest has 5 bits, FLAG is 2, and 22, 7, 3
# become 6, 2, 1 times 4 (truncated 5, 1, 0). A group whose largest is at most
# 7 has FLAG 0 and loses nothing.
@flax.struct.dataclass
class Suppressed(Quantizer):
  """The integers of a first stage without their group's leading zeros.

  A signed first stage gives sign and magnitude, and the sign is kept; of an
  unsigned one all bits are magnitude, from its zero point on.

  Attributes:
    inner: the first stage, of integers of more bits, usually 8: a `Block` or
      `Static` whose format has one exponent bit.
    group: neighbours along the contraction that share a FLAG; a power of two.
    bits: of what is kept, the sign included.
    rounding: of ROUNDINGS.
  """

  inner: Block | Static
  group: int = _static(default=16)
  bits: int = _static(default=4)
  rounding: str = _static(default='nearest')

  def __post_init__(self):
    if self.group < 1 or self.group & (self.group - 1):
      raise ValueError(f'group={self.group}: must be a power of two, such as '
                       '16 or 32')
    if self.rounding not in ROUNDINGS:
      raise ValueError(f'rounding={self.rounding!r}: must be one of '
                       f'{ROUNDINGS}')
    # JAX puts other things than quantizers in the place of its leaves.
    if not isinstance(self.inner, Quantizer):
      return
    if not (isinstance(self.inner, Block | Static)
            and self.inner.fmt.exponent_bits == 1):
      raise ValueError(
          f'a first stage that is {self.inner}: must be a Block or Static of '
          'integers, such as E1M6 or UE1M7')
    wide = self.inner.fmt
    if wide.signed and self.inner.zero_point is not None:
      raise ValueError(f'a first stage of {wide} with a zero point: its sign '
                       'and magnitude are counted from 0')
    if (scaled := getattr(self.inner, 'group', 0)) % self.group:
      raise ValueError(
          f'group={self.group}: must divide the {scaled} neighbours that share '
          'a scale of the first stage')
    if not numbers.MIN_BITS <= self.bits < wide.bits:
      raise ValueError(f'{self.bits} bits of {wide}: must be '
                       f'{numbers.MIN_BITS} to {wide.bits - 1}')

  @compiled
  def quantize(self, x, axis=-1):
    x = jnp.asarray(x, jnp.float32)
    whole = self.inner.quantize(x, axis)
    # Rounding is monotonic, and alike on both sides of 0: a group's largest
    # integer is that of its largest x. To look for this one needs no integers
    # in memory, which are then made where they are used.
    groups, at = grouped(x, axis, self.group, 'edge'), x.ndim + axis + 1
    largest = groups.max(at)
    if whole.fmt.signed:
      largest = jnp.maximum(largest, -groups.min(at))
    largest = whole.replace(
        length=largest.shape[axis], group=whole.group // self.group
    ).with_levels_of(largest).data
    flags = flags_of(largest / whole.fmt.step, whole.fmt, self.bits)
    return suppress(whole, flags, self.bits, self.group, self.rounding)

  @property
  def nbits(self):
    return self.inner.nbits

  @property
  def cuts(self):
    return self.inner.cuts

  def offsets(self):
    return self.inner.offsets()

  def moved(self, offsets):
    return self.replace(inner=self.inner.moved(offsets))

  @property
  def num_steps(self):
    return self.inner.num_steps

  def at(self, step):
    return self.replace(inner=self.inner.at(step))

  def describe(self):
    shown = self.inner.describe()
    return shown | {
        'format': str(kept_format(self.inner.fmt, self.bits)),
        'scale': f'{shown["scale"]}, of {self.inner.fmt} shifted by '
                 f'{self.group}'}


def kept_format(wide: FPFormat, bits: int) -> FPFormat:
  """The integers of `bits` bits, the sign included, of wider ones' signedness.
  """
  return FPFormat(1, bits - 1 - int(wide.signed), wide.signed)


def flags_of(largest: jax.Array, wide: FPFormat, bits: int) -> jax.Array:
  """FLAGs: max(bit length - bits of magnitude that are kept, 0), uint8.

  Args:
    largest: of every group, integers in float32; NaN has the highest FLAG.
    wide: of what they are.
    bits: that are kept, the sign included.
  """
  # (The paper takes the bitwise "or" of a group, which has the length of its
  # largest.) A float32 n >= 1 has its bit length - 1 in its exponent field,
  # which of 0 is the lowest and of NaN the highest.
  length = (jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23) - 126
  return jnp.clip(length - (bits - int(wide.signed)), 0,
                  wide.bits - bits).astype(jnp.uint8)


def suppress(tensor: QTensor, flags: jax.Array, bits: int, group: int,
             rounding: str) -> QTensor:
  """Integers shifted right by their group's FLAG.

  Args:
    tensor: of integers, not packed, without shifts.
    flags: of `flags_of`, one a group along the contraction.
    bits: of what is kept, the sign included.
    group: neighbours that share a FLAG.
    rounding: of ROUNDINGS.

  Returns:
    The tensor with FLAGs as `shift` and its former format as `wide`; NaN
    stays NaN.
  """
  fmt, wide, data = kept_format(tensor.fmt, bits), tensor.fmt, tensor.data
  tensor = tensor.replace(shift=flags, shift_group=group, fmt=fmt, wide=wide)
  # 2^-FLAG by its exponent: exact, and so is the product.
  factor = jax.lax.bitcast_convert_type(
      (127 - flags.astype(jnp.int32)) << 23, jnp.float32)
  kept = (jnp.abs(data) * np.float32(1 / wide.step)
          * tensor.spread(factor, group))
  kept = jnp.floor(kept + 0.5 if rounding == 'nearest' else kept)
  # 127 is 7.94 x 16, nearest to 8, which takes a fourth bit. A comparison and
  # not a minimum: NaN stays.
  largest = np.float32(fmt.max / fmt.step)
  kept = jnp.where(kept > largest, largest, kept)
  return tensor.replace(data=jnp.copysign(kept * np.float32(fmt.step), data))


def first_stage(signed: bool = True, shared: str = 'token', group: int = 0
                ) -> Block:
  """Integers of 8 bits with scales, and zero points, from the data.

  Args:
    signed: by the largest magnitude; else from the minimum to the maximum.
    shared: what shares a scale, see `Block`.
    group: of 'group'.
  """
  fmt = FPFormat(1, 6) if signed else numbers.int_format(8)
  # 16 bits where there are many scales; one of a token costs next to nothing.
  return Block(fmt, shared, group, 'bf16' if shared == 'group' else 'f32')


def quartz(bits: int, inner: Block | None = None, group: int = 16,
           rounding: str = 'nearest') -> Quantizer:
  """QuaRTZ at some width; at 8 bits its first stage alone.

  Args:
    bits: of an element.
    inner: the first stage, of 8 bits; None for `first_stage()`.
    group: see `Suppressed`.
    rounding: of ROUNDINGS.
  """
  inner = first_stage() if inner is None else inner
  if bits == inner.bits:
    return inner
  return Suppressed(inner, group, bits, rounding)
