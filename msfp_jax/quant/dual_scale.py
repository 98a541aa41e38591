"""DualScale: one scale for negative values, another for the others.

The answer of SegQuant (arXiv 2507.14811) to inputs that follow SiLU or GELU: a
short negative tail gets its own, finer steps. A product has then two sums, one
over the negative inputs and one over the others.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import functional
from msfp_jax.quant import numbers
from msfp_jax.quant import search
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qtensor import QTensor
from msfp_jax.quant.quantizers import Quantizer


@flax.struct.dataclass
class DualScale(Quantizer):
  """Static scales from calibration, one for each sign, for a whole input.

  Attributes:
    fmt: the number format, signed.
    scale: float32 `[]`, positive, of values from 0 on.
    negative: float32 `[]`, positive: the scale of negative values over `scale`.
  """

  fmt: FPFormat = flax.struct.field(pytree_node=False)
  scale: jax.Array
  negative: jax.Array

  def __post_init__(self):
    if not self.fmt.signed:
      raise ValueError(f'{self.fmt} has no negative values, which DualScale '
                       'has a scale for')

  @property
  def bits(self) -> int:
    return self.fmt.bits

  def quantize(self, x, axis=-1):
    if axis != -1:
      raise ValueError('DualScale is for inputs, not for weights')
    levels = functional.nearest_level(x, self.fmt, self._scales(x))
    return QTensor(
        levels, jnp.float32(self.scale), negative=jnp.float32(self.negative),
        fmt=self.fmt, length=x.shape[axis], axis=axis)

  def fake_quant(self, x, axis=-1):
    return functional.fake_quant(x, self.fmt, self._scales(x))

  def _scales(self, x):
    # By the product of both, which is also what comes back.
    scale = jnp.asarray(self.scale, jnp.float32)
    return jnp.where(x < 0, scale * self.negative, scale)

  def offsets(self):
    """{'log_scale', 'log_negative'}."""
    return {'log_scale': jnp.zeros_like(self.scale),
            'log_negative': jnp.zeros_like(self.negative)}

  def moved(self, offsets):
    """Both scales times the exponential of their offsets."""
    # Scales are normal numbers, and so is the product of both, with room for
    # its rounding.
    tiny = functional.TINY
    scale = jnp.maximum(self.scale * jnp.exp(offsets['log_scale']), tiny)
    return self.replace(scale=scale, negative=jnp.maximum(
        self.negative * jnp.exp(offsets['log_negative']),
        2 * tiny * jnp.maximum(1 / scale, 1.0)))

  def flaws(self):
    parts = {'scale': self.scale, 'negative': self.negative,
             'product of both': np.float32(self.scale) * self.negative}
    return [f'a {name} that is not positive, or below {functional.TINY:.3g}'
            for name, part in parts.items()
            if not np.asarray(part) >= functional.TINY]

  def describe(self):
    return {'format': str(self.fmt),
            'scale': f'{float(self.scale):.3g}, negative '
                     f'{float(self.scale * self.negative):.3g}'}


@dataclasses.dataclass(frozen=True)
class FitDualScale(fit_lib.Fit):
  """The signed format and the two scales of least mean squared error."""

  needs = (fit_lib.VALUES,)
  static = True

  def __call__(self, seen, bits, axis):
    if axis != -1:
      raise ValueError('DualScale is for inputs: weights have no tail on one '
                       'side')
    values = np.asarray(seen.values, np.float64).ravel()
    found = [self._search(values, fmt)
             for fmt in numbers.formats_of_width(bits, signed=True)]
    return min(found, key=lambda fitted: fitted.mse)

  def _search(self, values, fmt):
    # A sign's values go to levels of that sign or to 0, whatever the scale of
    # the other: two searches that know nothing of each other.
    scales, error = [], 0.0
    for part in (values[values >= 0], values[values < 0]):
      if not part.any():
        scales.append(None)
        continue
      found = search.search(part, (fmt,))
      scales.append(found.scale)
      error += found.mse * part.size
    # A sign without values takes the scale of the other; where there is none
    # any will do.
    known = [scale for scale in scales if scale is not None] or [1.0]
    one, other = (known[0] if scale is None else scale for scale in scales)
    ratio = np.float64(other) / np.float64(one)
    if not functional.TINY <= ratio <= np.finfo(np.float32).max:
      # So small beside the other that no float32 is the ratio: next to 0, and
      # at the other's scale 0.
      one, ratio = max(one, other), 1.0
    return fit_lib.Fitted(
        DualScale(fmt, np.float32(one), np.float32(ratio)),
        error / values.size)
