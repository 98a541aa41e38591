"""Codes in memory and in files: packed, unpacked, counted."""

import dataclasses

import jax
from kernel_cases import prepared
from kernel_cases import SOME
import numpy as np
import pytest

from msfp_jax.quant import layout as layout_lib
from msfp_jax.quant.numbers import formats_of_width
from msfp_jax.quant.numbers import FPFormat

ALL = [fmt for bits in range(3, 9) for signed in (True, False)
       for fmt in formats_of_width(bits, signed)]


@pytest.mark.parametrize('length', [1, 2, 7, 8])
def test_halves_are_unpacked_to_what_was_packed(length):
  rng = np.random.default_rng(length)
  codes = rng.integers(0, 16, (2, 3, length, 5), dtype=np.uint8)
  packed = layout_lib.pack_halves(codes)
  half = (length + 1) // 2
  assert packed.shape == (2, 3, half, 5) and packed.dtype == np.uint8
  np.testing.assert_array_equal(packed & 15, codes[..., :half, :])
  np.testing.assert_array_equal(
      (packed >> 4)[..., :length - half, :], codes[..., half:, :])
  assert not (packed >> 4)[..., length - half:, :].any()
  unpacked = layout_lib.unpack_halves(packed, length)
  assert isinstance(unpacked, np.ndarray)
  np.testing.assert_array_equal(unpacked, codes)
  by_jax = jax.jit(layout_lib.unpack_halves, static_argnums=1)(packed, length)
  np.testing.assert_array_equal(by_jax, codes)


def test_half_a_byte_holds_no_more_than_15():
  with pytest.raises(ValueError, match='codes go up to 16, but half a byte'):
    layout_lib.pack_halves(np.uint8([[3], [16]]))


@pytest.mark.parametrize('bits', range(3, 9))
@pytest.mark.parametrize('shape', [(1,), (7,), (3, 5), (2, 3, 4), (0, 3)])
@pytest.mark.parametrize('at_once', [layout_lib._AT_ONCE, 8])
def test_streams_are_the_bits_of_a_number(monkeypatch, bits, shape, at_once):
  """A stream is the integer sum of code_i 2^(bits i), its lowest byte first."""
  monkeypatch.setattr(layout_lib, '_AT_ONCE', at_once)
  codes = np.random.default_rng(bits).integers(0, 2**bits, shape, np.uint8)
  packed = layout_lib.pack_bits(codes, bits)
  number = sum(int(code) << bits * i for i, code in enumerate(codes.ravel()))
  size = -(-codes.size * bits // 8)
  assert packed.tobytes() == number.to_bytes(size, 'little')
  unpacked = layout_lib.unpack_bits(packed, bits, shape)
  assert (unpacked.dtype, unpacked.shape) == (np.uint8, shape)
  np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize('fmt', ALL, ids=str)
def test_packed_codes_are_levels_again(fmt):
  """Every code survives its layout; 4 bits and less lie two a byte."""
  codes = np.arange(2**fmt.bits, dtype=np.uint8)
  codes = np.stack([codes, codes[::-1]], axis=-1)[:-1]  # [odd, 2]
  layout = layout_lib.packed_layout(fmt)
  assert layout.name == ('nibbles' if fmt.bits <= 4 else 'bytes')
  data = layout_lib.pack_halves(codes) if fmt.bits <= 4 else codes
  length = len(codes)
  assert data.nbytes == 2 * (-(-length // 2) if fmt.bits <= 4 else length)
  assert layout.size(data, length) == codes.size
  np.testing.assert_array_equal(layout.codes(data, fmt, length), codes)
  np.testing.assert_array_equal(
      layout.levels(data, fmt, length), fmt.values()[codes])


def test_codes_of_levels():
  fmt = FPFormat.parse('E3M2')
  levels = np.float32(fmt.values())
  np.testing.assert_array_equal(
      layout_lib.LEVELS.codes(levels, fmt, len(levels)), np.arange(64))
  assert layout_lib.LEVELS.size(levels, 5) == 64


@pytest.mark.parametrize('kind', SOME)
@pytest.mark.parametrize('fmt', formats_of_width(4, True), ids=str)
def test_the_layout_for_hopper_holds_the_same(kind, fmt):
  """Padded to its kernels' tiles, it has the same levels, codes and size."""
  case = SOME[kind](fmt, 'E2M1')
  weight = case.packed.weight
  laid_out = prepared(case.packed, 'mosaic_gpu').weight
  assert laid_out.layout.name == 'hopper'
  assert (laid_out.size, laid_out.nbits) == (weight.size, weight.nbits)
  np.testing.assert_array_equal(laid_out.levels(), weight.levels())
  # -0 is stored as +0.
  codes = np.where(weight.codes() == 8, 0, weight.codes())
  np.testing.assert_array_equal(laid_out.codes(), codes)


def test_layouts_are_equal_where_they_read_alike():
  """Layouts are part of a tensor's structure, by which JAX caches."""
  hopper = prepared(SOME['dense']('E2M1', 'E2M1').packed, 'mosaic_gpu'
                    ).weight.layout
  assert hopper == dataclasses.replace(hopper)
  assert hash(hopper) == hash(dataclasses.replace(hopper))
  assert hopper != dataclasses.replace(hopper, outputs=hopper.outputs + 1)
  assert layout_lib.Bytes() == layout_lib.BYTES != layout_lib.NIBBLES
