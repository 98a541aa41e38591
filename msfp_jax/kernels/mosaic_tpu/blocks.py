"""Chooses the blocks of the TPU kernels by what a chip has."""

import dataclasses
import math

import jax

_MIB = 2**20
# Bytes of a row of the epilogue (see terms.py), 128 lanes of 32 bits, twice.
_TERMS = 2 * 4 * 128
# Bytes for a packed byte where scales of groups multiply weights: those of 16
# rows in each half, twice, and float32 of both levels and their scales.
SCALING = 1 + 2 * (4 + 4)
# The same where levels are shifted by FLAGs: those of 4 rows in each half,
# twice, and both as int32, one a group and one for every four rows.
SHIFTING = 1 + 2 * (1 + 1)
# All sizes below follow from a register's: 8 sublanes x 128 lanes of 32 bits.
# Of 8-bit values it holds [32, 128]. The last axis of an array is padded to 128
# in vector memory, whatever a kernel does; the one before is cut at multiples
# of 32, so that blocks are whole registers of any carrier (those of bf16 hold
# [16, 128]).


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU generation.

  Attributes:
    carriers: that its matrix unit multiplies natively.
    vmem: bytes of vector memory of a core.
  """

  carriers: tuple[str, ...]
  vmem: int


CHIPS = {
    'v5e': Chip(('int8', 'bf16'), 128 * _MIB),
    'v5p': Chip(('int8', 'bf16'), 64 * _MIB),
    'v6e': Chip(('int8', 'bf16'), 128 * _MIB),
    '7x': Chip(('fp8', 'bf16'), 64 * _MIB),
}
KINDS = {
    'TPU v5e': 'v5e', 'TPU v5 lite': 'v5e', 'TPU v5': 'v5p', 'TPU v5p': 'v5p',
    'TPU v6e': 'v6e', 'TPU v6 lite': 'v6e', 'TPU7x': '7x'}

# Most rows of x, columns of the weights and packed rows of them in a step, from
# `python -m benchmarks.tpu_cost`; None is for unknown chips. More rows share
# one decoding; of the widths of Stable Diffusion's UNet, 320, 640 and 1280,
# tiles of 640 columns leave no remainder; with 1280 packed rows K to 2560 is
# one step.
MATMUL = {
    None: (512, 640, 1280),
    'v5e': (512, 640, 1280),
    'v5p': (512, 640, 1280),
    'v6e': (1024, 640, 1280),
    '7x': (1024, 640, 1280),
}
# Most pixels and channels of the result in a step.
CONV = {
    None: (1024, 640),
    'v5e': (1024, 640),
    'v5p': (1024, 640),
    'v6e': (1024, 640),
    '7x': (1024, 640),
}


def generation() -> str | None:
  """A key of CHIPS, if the default device is such a chip; else None."""
  return KINDS.get(jax.devices()[0].device_kind)


def budget(chip: str | None) -> int:
  """The bytes of vector memory that a kernel may take: half of what there is.

  The rest is XLA's, which keeps there what passes between operations.
  """
  if chip is None:
    return min(c.vmem for c in CHIPS.values()) // 2
  return CHIPS[chip].vmem // 2


def _round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def _share(n: int, most: int, multiple: int) -> int:
  """The length of each of the fewest even blocks that cover n."""
  # Even, as 600 rows in blocks of 512 would be 1024 rows of work, and in two of
  # 320 (300 rounded up) are 640. A block may always be the whole axis.
  share = _round_up(-(-n // -(-n // most)), multiple)
  return min(share, n)


@dataclasses.dataclass(frozen=True)
class Matmul:
  """How a product is cut: steps of `[rows, 2 * half] x [2 * half, columns]`.

  Attributes:
    rows: of x and of the result.
    columns: of the weights and of the result.
    half: packed rows of a step.
    steps: along the contraction; with one, x is not cut in halves.
  """

  rows: int
  columns: int
  half: int
  steps: int

  def vmem(self, itemsize: int, out_itemsize: int, beside: int = 0) -> int:
    """The bytes of vector memory, with two buffers of what moves."""
    columns = _round_up(self.columns, 128)
    x = self.rows * _round_up(2 * self.half, 128) * itemsize
    decoded = 2 * self.half * self.steps * columns * itemsize
    out = self.rows * columns
    # Of an element of y: 4 bytes of the sum so far, 4 of the product that is
    # added to it, and two buffers of the result.
    packed = self.half * columns
    return (2 * x + 2 * packed + decoded + self.rows * _TERMS
            + packed * beside
            + out * (8 + 2 * out_itemsize))


def matmul(m: int, half: int, n: int, itemsize: int, out_itemsize: int,
           chip: str | None, blocks=None, beside: int = 0
           ) -> Matmul | None:
  """Cuts a product of m rows, n columns, and `half` packed rows.

  Args:
    itemsize: bytes of an element of the carrier.
    out_itemsize: of the result.
    blocks: in place of the table's.
    beside: bytes for a packed byte that its scales and FLAGs take, a sum of
      SCALING and SHIFTING.

  Returns:
    The cut, which covers both halves with `half * steps` rows each or, padded,
    with more; None if none fits the vector memory.
  """
  rows, columns, most = blocks or MATMUL[chip]
  # Part of K is an axis of lanes in x: several parts begin at multiples of 128.
  steps = -(-half // most)
  step = _round_up(-(-half // steps), 32 if steps == 1 else 128)
  cut = Matmul(_share(m, rows, 32), _share(n, columns, 128), step, steps)
  # Rows are given up first, down to 128: more tiles of columns would each read
  # all of x once more.
  while cut.vmem(itemsize, out_itemsize, beside) > budget(chip):
    if cut.rows > 128:
      cut = dataclasses.replace(cut, rows=_round_up(cut.rows // 2, 32))
    elif cut.columns > 128:
      cut = dataclasses.replace(cut, columns=_round_up(cut.columns // 2, 128))
    else:
      return None
  return cut


@dataclasses.dataclass(frozen=True)
class Conv:
  """How a convolution is cut.

  Attributes:
    rows: of the result in a step.
    width: of the result, a multiple of 8.
    columns: output channels of a step.
    lanes: channels of a tap in vector memory, a multiple of 128.
  """

  rows: int
  width: int
  columns: int
  lanes: int

  def patch_rows(self, window, strides) -> int:
    """Rows of pixels whose taps are put side by side at a time.

    Where a row fills registers, the next row of the window is had from the
    same patches by an offset, which asks for the rows below as well.
    """
    shared = strides[0] == 1 and self.width % 32 == 0
    return self.rows + (window[0] - 1 if shared else 0)

  def vmem(self, window, strides, itemsize: int, out_itemsize: int,
           beside: int = 0) -> int:
    """The bytes of vector memory, with two buffers of what moves."""
    pixels, columns = self.rows * self.width, _round_up(self.columns, 128)
    taps = window[1] * self.lanes
    # x as `conv._phases` lays it out: every phase of the strides.
    read = (math.prod(strides) * (self.rows + (window[0] - 1) // strides[0])
            * _round_up(self.width + (window[1] - 1) // strides[1], 32)
            * self.lanes)
    packed = window[1] * self.lanes // 2 * columns
    # Then x and codes twice, the decoded weights, the patches, and of an
    # element of y sum and product, two of the shift map, and two of the result.
    return (2 * read * itemsize + 2 * packed + packed * beside
            + window[0] * taps * columns * itemsize
            + self.patch_rows(window, strides) * _round_up(self.width, 32)
            * taps * itemsize
            + pixels * (columns * (16 + 2 * out_itemsize) + _TERMS))


def conv(out_size, window, strides, half: int, n: int, itemsize: int,
         out_itemsize: int, chip: str | None, blocks=None,
         beside: int = 0) -> Conv | None:
  """Cuts a convolution; None if no cut fits the vector memory.

  Args:
    out_size: height and width of the result.
    window: height and width.
    strides: of the window.
    half: packed input channels.
    n: output channels.
    itemsize, out_itemsize, chip, beside, blocks: as for `matmul`; blocks are
      the output pixels and channels of a step.
  """
  pixels, columns = blocks or CONV[chip]
  # A block has whole rows of y, whose pixels are joined in one axis: a width of
  # whole groups of 8 sublanes keeps that a matter of indices.
  width = _round_up(out_size[1], 8)
  cut = Conv(0, width, _share(n, columns, 128),
             _round_up(2 * _round_up(half, 32), 128))
  while True:
    # Even shares of the height, so that few rows are computed in vain.
    shares = -(-out_size[0] * width // pixels)
    rows = -(-out_size[0] // min(shares, out_size[0]))
    cut = dataclasses.replace(cut, rows=rows)
    if cut.vmem(window, strides, itemsize, out_itemsize, beside) <= budget(
        chip):
      return cut
    # Down to 256 pixels, then fewer channels, then any number of rows.
    if pixels > 256 and rows > 1:
      pixels //= 2
    elif cut.columns > 128:
      cut = dataclasses.replace(cut, columns=_round_up(cut.columns // 2, 128))
    elif rows > 1:
      pixels //= 2
    else:
      return None
