"""What the TPU kernels do not take, and why."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from msfp_jax.kernels import checks
from msfp_jax.kernels.mosaic_tpu import blocks as blocks_lib
from msfp_jax.kernels.mosaic_tpu import conv as mosaic_tpu_conv
from msfp_jax.kernels.mosaic_tpu import decode as decode_lib
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qtensor import QTensor

# What they add to the significant bits of a level; a product has no more than
# both its sides together.
_SHORT_SCALES = {np.dtype(jnp.float8_e4m3fn): 4,
                 np.dtype(jnp.float8_e8m0fnu): 0}
_BF16_DIGITS = 8


def why_not(op: str, x, codes, *, fmt: FPFormat, out_dtype=jnp.float32,
            strides=(1, 1), padding=((0, 0), (0, 0)), group=0, flag_group=0,
            wide: FPFormat | None = None, blocks=None,
            chip: str | None = None) -> str | None:
  """Why the kernels do not take an operation; None if they do.

  Args:
    op: 'matmul' or 'conv'.
    x, codes: as for the operation; only shapes and dtypes are looked at.
    fmt, out_dtype, strides, padding, group, flag_group, wide, blocks: as for
      the operation.
    chip: a key of `blocks.CHIPS`; else that of the default device.
      Where this is no TPU, what no TPU does is left to the caller.

  Returns:
    The reason and the way out, for an error message.
  """
  chip = chip or blocks_lib.generation()
  if chip is None and jax.default_backend() == 'tpu':
    return (f'{jax.devices()[0].device_kind} is none of the TPUs '
            f'{", ".join(blocks_lib.CHIPS)}; use the XLA implementation')
  if group and x.dtype != jnp.bfloat16:
    return (f'x is {x.dtype}: weights with scales of groups are multiplied in '
            f'bfloat16; carry the activations in bf16')
  return (_why_not_types(x, codes, fmt, out_dtype, chip, wide)
          or _why_not_shapes(op, x, codes, strides, padding)
          or _why_not_flags(codes, flag_group)
          or _why_not_sums(x, codes, wide or fmt)
          or _why_not_vmem(op, x, codes, strides, padding, out_dtype, blocks,
                           chip, beside(group, flag_group)))


def why_not_groups(weight: QTensor) -> str | None:
  """Why weights with scales of groups are not taken; None if they are."""
  # They are scaled as they are decoded, once for all rows of x. A sum for each
  # group would fill a fraction of the matrix unit, 128 or 256 deep.
  if np.dtype(weight.scale.dtype) not in _SHORT_SCALES:
    return (f'it multiplies weights by their scales of groups in bfloat16, '
            f'which has no room for the digits of {weight.scale.dtype}; those '
            f'of e4m3 and e8m0 fit')
  half = weight.data.shape[-2]
  if weight.group % decode_lib.LEAST_GROUP or half % weight.group:
    return (f'it reads the two halves of the inputs, {half} each, in whole '
            f'groups of {decode_lib.LEAST_GROUP}, 32 or more, not of '
            f'{weight.group}; use the XLA implementation')
  return None


def why_not_input_groups(tensor: QTensor) -> str | None:
  """Why inputs with scales of groups are not taken; None if they are."""
  # XLA multiplies them by their scales in the fusion that quantizes them.
  digits = tensor.numbers.mantissa_bits + 1 + _SHORT_SCALES.get(
      np.dtype(tensor.scale.dtype), _BF16_DIGITS)
  if tensor.zero_point is not None or digits > _BF16_DIGITS:
    return (f'it multiplies inputs by their scales of groups in bfloat16, '
            f'which holds {tensor.numbers} times scales in e8m0 or e4m3 '
            f'without zero points, not {tensor.scale.dtype}')
  return None


def _why_not_types(x, codes, fmt, out_dtype, chip, wide):
  if np.dtype(x.dtype) not in decode_lib.CARRIERS:
    return (f'x is {x.dtype}: the TPU kernels multiply int8, float8_e4m3fn '
            f'and bfloat16; see carriers.DTYPES')
  carrier = decode_lib.CARRIERS[np.dtype(x.dtype)]
  if reason := checks.format_of_weights(fmt, carrier, 'TPU', wide):
    return reason
  if codes.dtype != jnp.uint8:
    return f'codes are {codes.dtype}, not uint8; see layout.pack_halves'
  if reason := checks.out_dtype(out_dtype):
    return reason
  if chip and carrier not in blocks_lib.CHIPS[chip].carriers:
    return (f'TPU {chip} does not multiply {carrier}; carry activations in '
            f'{" or ".join(blocks_lib.CHIPS[chip].carriers)}')
  return None


def _why_not_shapes(op, x, codes, strides, padding):
  if reason := checks.axes(op, x, codes):
    return reason
  # Of a grouped convolution, codes have the channels of one group only.
  length = x.shape[-1]
  if codes.shape[-2] != -(-length // 2):
    return (f'{length} channels of x {x.shape} need {-(-length // 2)} packed '
            f'rows, codes {codes.shape} have {codes.shape[-2]}; grouped '
            f'convolutions are left to XLA')
  if op == 'conv':
    size = mosaic_tpu_conv.output_size(
        x.shape[1:3], codes.shape[:2], strides, padding)
    return checks.window(size, codes.shape[:2], strides, padding, x)
  return None


def _why_not_flags(codes, group):
  half = codes.shape[-2]
  if group and decode_lib.shared_by(
      group, half) % decode_lib.LEAST_SHIFTED:
    return (f'it shifts the levels of {decode_lib.LEAST_SHIFTED} inputs at '
            f'once, and FLAGs of {group} are of fewer in one half of the '
            f'inputs, {half}; use the XLA implementation')
  return None


def _why_not_sums(x, codes, fmt):
  length = x.shape[-1] * int(np.prod(codes.shape[:-2]))
  return checks.sums(x, length, fmt)


def _why_not_vmem(op, x, codes, strides, padding, out_dtype, blocks, chip,
                  beside):
  # A 1x1 convolution may run as either (its shift decides, which is not known
  # here), so that both must fit; blocks are then those of the convolution.
  cuts = []
  if op == 'conv':
    cuts.append(cut_conv(
        x, codes, strides, padding, out_dtype, blocks, chip, beside))
    blocks = None
  if op == 'matmul' or is_matmul(codes, padding):
    cuts.append(cut(x, codes, out_dtype, blocks, chip, beside))
  if all(cuts):
    return None
  return (f'{op} of x {x.shape} and codes {codes.shape} needs more than '
          f'{blocks_lib.budget(chip) >> 20} MiB of vector memory; use the XLA '
          f'implementation')


def is_matmul(codes, padding) -> bool:
  """Whether a convolution is a product of its pixels."""
  return codes.shape[:2] == (1, 1) and not np.any(padding)


def beside(group, flag_group) -> int:
  """Bytes that lie beside a packed byte in vector memory."""
  return (bool(group) * blocks_lib.SCALING
          + bool(flag_group) * blocks_lib.SHIFTING)


def cut(x, codes, out_dtype, blocks, chip, beside
        ) -> blocks_lib.Matmul | None:
  """How a product is cut; None if no cut fits the vector memory."""
  return blocks_lib.matmul(
      math.prod(x.shape[:-1]), *codes.shape[-2:], np.dtype(x.dtype).itemsize,
      np.dtype(out_dtype).itemsize, chip, blocks, beside)


def cut_conv(x, codes, strides, padding, out_dtype, blocks, chip, beside
             ) -> blocks_lib.Conv | None:
  """How a convolution is cut; None if no cut fits the vector memory."""
  size = mosaic_tpu_conv.output_size(
      x.shape[1:3], codes.shape[:2], strides, padding)
  return blocks_lib.conv(
      size, codes.shape[:2], strides, *codes.shape[2:],
      np.dtype(x.dtype).itemsize, np.dtype(out_dtype).itemsize, chip, blocks,
      beside)
