"""Checks that both chips' kernels share; each returns the reason, or None."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from msfp_jax.kernels import carriers
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qtensor import QTensor

_RANK = {'matmul': 2, 'conv': 4}
_OUT_DTYPES = (np.dtype(jnp.float32), np.dtype(jnp.bfloat16))


def format_of_weights(fmt: FPFormat, carrier: str, device: str,
                      wide: FPFormat | None = None) -> str | None:
  """Why weights of a format are refused: both decode 4 bits to 8 alone.

  Args:
    fmt: of the codes.
    carrier: a key of `carriers.DTYPES`.
    device: for the message.
    wide: what levels are once they are shifted; None where they are not.
  """
  if fmt.bits != 4:
    return (f'weights in {fmt}: the {device} kernels decode formats of 4 bits; '
            f'use the XLA implementation')
  # UE4M0, whose levels reach 2^14 steps. In bfloat16, too, they are decoded
  # by way of int8.
  if carrier != 'fp8' and carriers.carry(fmt, 'int8') is None:
    return (f'weights in {fmt}: the {device} kernels decode to int8, which '
            f'does not hold them; use the XLA implementation')
  if wide is not None and carriers.carry(wide, carrier) is None:
    return (f'weights in {fmt} shifted to {wide}, which {carrier} does not '
            f'hold; carry the activations in bf16, or use the XLA '
            f'implementation')
  return None


def shifts(weight: QTensor) -> str | None:
  """Why shifts of weights are refused: those of integers are decoded."""
  fmt, wide = weight.fmt, weight.wide
  if wide is None or {fmt.exponent_bits, wide.exponent_bits} != {1}:
    return (f'it shifts integers to wider ones, as QuaRTZ does, and those of '
            f'this layer are {fmt}, shifted to {wide or "no wider format"}')
  return None


def together(groups, group: int, flags, flag_group: int,
             wide: FPFormat | None) -> str | None:
  """Why arguments are refused: of those that belong together some are missing.

  Args:
    groups, group, flags, flag_group, wide: of an operation.
  """
  if (groups is None) != (not group):
    return (f'group={group} {"without" if groups is None else "with"} scales '
            'of groups: both, or neither')
  if len({flags is None, not flag_group, wide is None}) > 1:
    return (f'flag_group={flag_group}, wide={wide} '
            f'{"without" if flags is None else "with"} flags: all three, or '
            'none')
  return None


def out_dtype(dtype) -> str | None:
  """Why a result's dtype is refused: both write float32 and bfloat16."""
  if np.dtype(dtype) in _OUT_DTYPES:
    return None
  return f'out_dtype {np.dtype(dtype)}: must be float32 or bfloat16'


def axes(op: str, x, codes) -> str | None:
  """Why the operands' axes are refused: too few or many, or an empty one."""
  if x.ndim != _RANK[op] or codes.ndim != _RANK[op]:
    return (f'{op} of x {x.shape} and codes {codes.shape}: both must have '
            f'{_RANK[op]} axes')
  if 0 in x.shape or 0 in codes.shape:
    return f'{op} of x {x.shape} and codes {codes.shape}: nothing to multiply'
  return None


def window(size: Sequence[int], window: Sequence[int], strides: Sequence[int],
           padding: Sequence[tuple[int, int]], x) -> str | None:
  """Why a window is refused: the result, of this `size`, is empty."""
  # Negative padding crops, for which neither kernel is made.
  if min(size) < 1 or min(strides) < 1 or min(map(min, padding)) < 0:
    return (f'a window of {tuple(window)} with strides {strides} and '
            f'padding {padding} on x {x.shape}')
  return None


def sums(x, length: int, fmt: FPFormat) -> str | None:
  """Why sums are refused: of `length` products with int8, beyond int32."""
  # x may hold any int8, be it no level: -128 bounds them all. In float32 sums
  # are rounded beyond 2^24, which is no error to refuse.
  bound = length * 128 * carriers.magnitude(fmt)
  if x.dtype == jnp.int8 and bound > carriers.EXACT_INT32:
    return (f'sums of {length} products of int8 and {fmt} may leave int32; '
            f'carry the activations in bf16')
  return None
