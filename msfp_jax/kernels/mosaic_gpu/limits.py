"""What Hopper's kernel does not take, and why."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.kernels import carriers
from msfp_jax.kernels import checks
from msfp_jax.kernels.mosaic_gpu import blocks as blocks_lib
from msfp_jax.kernels.mosaic_gpu import decode as decode_lib
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qtensor import QTensor

CARRIERS = {np.dtype(carriers.DTYPES[name][0]): name
            for name in ('int8', 'fp8')}
_INTERPRETED_SINCE = (0, 11)  # the first jax whose interpreter runs the kernel


def output_size(size: tuple[int, int], window: tuple[int, int], strides,
                padding) -> tuple[int, int]:
  """Height and width of a convolution's result."""
  return tuple((s + sum(p) - w) // stride + 1 for s, w, stride, p in zip(
      size, window, strides, padding, strict=True))


def groups_of(group: int, input_group: int, flag_group: int
              ) -> blocks_lib.Groups:
  """The groups of an operation."""
  return blocks_lib.Groups(math.gcd(group, input_group), flag_group,
                           group > 0, input_group > 0)


def why_not(op: str, x, codes, *, fmt: FPFormat, out_dtype=jnp.float32,
            strides=(1, 1), padding=((0, 0), (0, 0)), group: int = 0,
            input_group: int = 0, flag_group: int = 0,
            wide: FPFormat | None = None,
            blocks: blocks_lib.Blocks | None = None,
            interpret=False) -> str | None:
  """Why the kernels do not take an operation; None if they do.

  Args:
    op: 'matmul' or 'conv'.
    x, codes: as for the operation; only shapes and dtypes are looked at.
    fmt, out_dtype, strides, padding, group, input_group, flag_group, wide,
      blocks, interpret: as for the operation.

  Returns:
    The reason and the way out, for an error message. Where the default device
    is no GPU, what no GPU does is left to the caller.
  """
  return (_why_not_device(interpret)
          or _why_not_types(x, codes, fmt, wide, out_dtype)
          or _why_not_shapes(op, x, codes, strides, padding)
          or _why_not_sums(x, codes, wide or fmt)
          or _why_not_blocks(x, codes, strides, out_dtype, blocks,
                             groups_of(group, input_group, flag_group)))


def why_not_groups(weight: QTensor) -> str | None:
  """Why weights with scales of groups are not taken; None if they are."""
  # Sums of a group leave the tensor cores before they are scaled.
  return _why_not_size(weight.group, 'scales of these weights')


def why_not_input_groups(tensor: QTensor) -> str | None:
  """Why inputs with scales of groups are not taken; None if they are."""
  # A zero of a group would meet that group's sum of weights.
  carried = carriers.carry(tensor.numbers, 'int8')
  if tensor.zero_point is not None or carried and carried.lowest_offset:
    return (f'it scales the sums of a group of inputs, to which it does not '
            f'add what their zeros make, and those of this layer, '
            f'{tensor.numbers}, have such; use the XLA implementation')
  return _why_not_size(tensor.group, 'scales of these inputs')


def why_not_shifts(weight: QTensor) -> str | None:
  """Why QuaRTZ's weights are not taken; None if they are."""
  return checks.shifts(weight) or _why_not_size(
      weight.shift_group, 'FLAGs of these weights')


def _why_not_size(group, what):
  if not group or group % decode_lib.LEAST_GROUP:
    return (f'a register has levels of {decode_lib.LEAST_GROUP} neighbours, '
            f'and {what} change every {group or "tap"}; take a multiple of '
            f'{decode_lib.LEAST_GROUP}, or the XLA implementation')
  return None


def _why_not_device(interpret):
  if interpret:
    if jax.__version_info__ < _INTERPRETED_SINCE:
      return (f'jax {jax.__version__} does not interpret the GPU kernels; use '
              f'jax 0.11 or later, or the XLA implementation')
    return None
  capability = getattr(jax.devices()[0], 'compute_capability', None)
  if capability and capability != '9.0':
    return (f'{jax.devices()[0].device_kind} has compute capability '
            f'{capability}: the kernels are made of the instructions of 9.0 '
            f'(H100, H200), which later GPUs dropped; use the XLA '
            f'implementation')
  return None


def _why_not_types(x, codes, fmt, wide, out_dtype):
  if np.dtype(x.dtype) not in CARRIERS:
    return (f'x is {x.dtype}: the GPU kernels multiply int8 and '
            f'float8_e4m3fn; carry the activations in one of these, or use '
            f'the XLA implementation')
  if wide and x.dtype != jnp.int8:
    return (f'x is {x.dtype}: weights in {fmt} with FLAGs are shifted in int8; '
            f'carry the activations in that too')
  if reason := checks.format_of_weights(
      fmt, CARRIERS[np.dtype(x.dtype)], 'GPU', wide):
    return reason
  if codes.dtype != jnp.uint8:
    return f'codes are {codes.dtype}, not uint8; see mosaic_gpu.prepare'
  return checks.out_dtype(out_dtype)


def _why_not_shapes(op, x, codes, strides, padding):
  if reason := checks.axes(op, x, codes):
    return reason
  length = x.shape[-1]
  padded = length + -length % decode_lib.DEPTH
  if 2 * codes.shape[-1] != padded or codes.shape[0] % decode_lib.CHANNELS:
    return (f'{length} channels of x {x.shape} need codes of shape [N, ..., '
            f'{padded // 2}], N a multiple of {decode_lib.CHANNELS}, but they '
            f'are {codes.shape}; see mosaic_gpu.prepare; grouped convolutions '
            f'are left to XLA')
  if op == 'conv':
    size = output_size(x.shape[1:3], codes.shape[1:3], strides, padding)
    return checks.window(size, codes.shape[1:3], strides, padding, x)
  return None


def _why_not_sums(x, codes, fmt):
  length = x.shape[-1] * math.prod(codes.shape[1:-1])
  return checks.sums(x, length, fmt)


def _why_not_blocks(x, codes, strides, out_dtype, blocks, groups):
  if blocks is None:
    return None
  # As `_lay_out` will cut K: into rows of the window, where they are walked.
  window = codes.shape[1:-1]
  taps = window[0] if window and tuple(strides) == (1, 1) else 1
  row_length = 2 * math.prod(codes.shape[1:]) // taps
  return blocks_lib.why_not(blocks, row_length, taps, out_dtype, groups)
