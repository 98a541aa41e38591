"""Decodes weights in a warpgroup's registers, as wgmma's left operand."""

from jax import lax
from jax.experimental.mosaic import gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import llvm
import numpy as np

from msfp_jax.kernels import carriers
from msfp_jax.kernels.mosaic_gpu import decode as decode_lib
from msfp_jax.quant.numbers import FPFormat

# What there is one of for each channel, the first axis of y^T.
BY_CHANNEL = plgpu.Layout.WGMMA.reduce(1)
_TILE = decode_lib.LEAST_GROUP  # columns of a register's tile


def decoder(shape: tuple[int, int], fmt: FPFormat, carrier: str, base: int):
  """Makes the decoder: packed bytes `shape` to levels `[rows, 2 columns]`.

  Args:
    shape: of the bytes.
    fmt: of the codes.
    carrier: of the levels.
    base: as for `decode_lib.shifted`.

  Returns:
    decode(packed, flags, group): flags is empty, or has FLAGs `[rows]` of
    neighbouring groups of equal size; of group (first, size) alone levels are
    not 0, and of all where it is None.
  """
  # Written in MLIR, as Pallas has neither prmt nor arithmetic of 8-bit vectors.
  # Bytes are loaded in the layout of an 8-bit operand, 4 to a register.
  rows, columns = shape
  dtype = carriers.DTYPES[carrier][0]
  words = decode_lib.tables(fmt, carrier)
  layout = plgpu.Layout.WGMMA_8BIT
  i32 = ir.IntegerType.get_signless

  def constant(value):
    signed = int(np.uint32(value).astype(np.int32))
    return arith.constant(i32(32), ir.IntegerAttr.get(i32(32), signed))

  ops = decode_lib.Ops(
      xor=arith.xori, both=arith.andi, less=arith.subi,
      shift_right=lambda word, n: arith.shrui(word, constant(n)),
      shift_left=arith.shli,
      permute=lambda low, high, selector: llvm.inline_asm(
          i32(32), [low, high, selector], 'prmt.b32 $0, $1, $2, $3;',
          '=r,r,r,r'),
      constant=constant)

  def by_register(packed, flags, group):
    """(where, levels) of the registers of the result, in words of 4 levels."""
    for index, register in np.ndenumerate(packed.registers):
      halves = decode_lib.decode(
          mgpu.utils.bitcast(register, i32(32)), words, ops)
      for half, levels in enumerate(halves):
        # The second axis counts tiles of 16 columns, 32 once decoded. Row and
        # lane stay: `decode_lib.prepare` has ordered the codes for that.
        column = 2 * index[1] + half
        if group and column * _TILE // group[1] != group[0]:
          levels = constant(0)
        elif flags:
          # A thread has two rows of a tile, and the FLAGs of both.
          flag = flags[column * len(flags) // (2 * columns // _TILE)]
          flag = mgpu.utils.bitcast(
              flag.registers[0, 0, index[4], 0, 0], i32(32))
          levels = decode_lib.shifted(levels, flag, ops, base)
        yield (index[0], column, *index[2:]), levels

  def decode(packed, flags=(), group=None):

    @plgpu.inline_mgpu(
        arg_types=(layout, *[BY_CHANNEL] * len(flags)),
        return_type=plgpu.ShapeDtypeStruct(
            (rows, 2 * columns), dtype, layout=layout))
    def in_registers(ctx, packed, *flags):
      del ctx
      vector = ir.VectorType.get((4,), mgpu.utils.dtype_to_ir_type(dtype))
      shape = packed.layout.registers_shape((rows, 2 * columns))
      registers = np.empty(shape, dtype=object)
      for where, levels in by_register(packed, flags, group):
        registers[where] = mgpu.utils.bitcast(levels, vector)
      return mgpu.FragmentedArray(
          _registers=registers, _layout=packed.layout,
          _is_signed=True if carrier == 'int8' else None)

    return in_registers(packed, *flags)

  return decode


def interpreted(fmt: FPFormat, carrier: str, base: int):
  """The same for the interpreter, which has no registers."""

  def decode(packed, flags=(), group=None):
    if flags:
      each = 2 * packed.shape[1] // len(flags) // _TILE
      flags = jnp.repeat(jnp.stack(flags, -1), each, axis=-1)
    else:
      flags = None
    levels = decode_lib.decode_array(packed, fmt, carrier, flags, base)
    if group is None:
      return levels
    mine = lax.broadcasted_iota(
        jnp.int32, levels.shape, 1) // group[1] == group[0]
    return jnp.where(mine, levels, jnp.zeros((), levels.dtype))

  return decode
