"""3x3 convolutions of integers by `winograd`, against int64."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import kernel_oracle
import marks
import numpy as np
import pytest

from msfp_jax.kernels import carriers
from msfp_jax.kernels import winograd
from msfp_jax.quant.numbers import FPFormat

pytestmark = pytest.mark.optimized

PAIRS = [('E1M2', 'UE1M3'), ('E2M1', 'UE2M2'), ('E2M1', 'UE3M1'),
         ('E3M0', 'E2M1')]


def integers(name):
  """The values that a format has in the carrier, int64, ascending."""
  carried = carriers.carry(FPFormat.parse(name), 'f32')
  values = carried.values(carried.lowest_offset)
  return np.unique(values.astype(np.int64))


def splits(w, act):
  """Finds the parts for inputs in a format."""
  levels = integers(act)
  return winograd.splits(w, levels.min(), levels.max())


def inputs(kind, levels, shape):
  """Draws integers `[B, H, W, C]`."""
  if kind == 'random':
    return np.random.default_rng(0).choice(levels, shape)
  highest, lowest = levels.max(), levels.min()
  if kind == 'largest':
    return np.full(shape, highest)
  if kind == 'smallest':
    return np.full(shape, lowest)
  row, column = np.ogrid[:shape[1], :shape[2]]
  period = {'alternating': 2, 'in pairs': 4}[kind]
  sign = (row + column) % period < period // 2
  return np.broadcast_to(np.where(sign, highest, lowest)[..., None], shape)


def expected_of(x, w):
  return kernel_oracle.conv(x, w, (1, 1), ((1, 1), (1, 1)), (1, 1))


@jax.jit
def one_part(x, w):
  return run(x, w, 1)


def run(x, w, parts, algorithm=winograd.FLOAT):
  return winograd.conv(
      algorithm, jnp.asarray(x), jnp.asarray(w, jnp.float32), parts,
      lambda x: x.astype(jnp.float32), lambda sums: sums)


@jax.jit
def in_bytes(x, w):
  return run(x, w, 1, winograd.BYTES)


@pytest.mark.parametrize('size', marks.quick(
    [(7, 9)], [(7, 9), (8, 8), (1, 6)]))
def test_equals_the_convolution_of_integers(size):
  for weight, act in PAIRS:
    levels = integers(weight)
    rng = np.random.default_rng(1)
    for kind, w in itertools.product(
        ['random', 'largest', 'smallest', 'alternating', 'in pairs'],
        [rng.choice(levels, (3, 3, 8, 5)),
         rng.choice(levels[[0, -1]], (3, 3, 8, 5)),
         np.full((3, 3, 8, 5), levels.max())]):
      assert splits(w, act) == 1
      x = inputs(kind, integers(act), (2, *size, 8))
      ways = [one_part]
      if winograd.fits(w, x.min(), x.max()):
        ways.append(in_bytes)
      for way in ways:
        np.testing.assert_array_equal(
            np.asarray(way(x.astype(np.float32), w), np.int64),
            expected_of(x, w), f'{weight} {act} {kind}')


def largest_sums(w, act, parts):
  """Computes the largest sum of magnitudes over all tiles, int64.

  At every position of the transform the input of 6x6 that makes its value
  largest, or smallest, in every channel.
  """
  levels = integers(act)
  matrices = winograd.FLOAT
  positions = np.abs(transform(matrices.weights, w))
  positions = positions.reshape(6, 6, parts, -1, w.shape[-1]).sum(3)
  found = 0
  for a, b, sign in itertools.product(range(6), range(6), (1, -1)):
    tile = worst_tile(matrices, levels, a, b, sign)
    value = abs(transform(matrices.inputs, tile)[a, b])
    found = max(found, value * positions[a, b].max())
  return found


def transform(matrix, x):
  """A transform of both axes of a tile."""
  return np.einsum('ai,bj,ij...->ab...', matrix, matrix, x)


def worst_tile(algorithm, levels, a, b, sign):
  """The inputs of a tile that make its value at a, b the largest of a sign."""
  signs = np.outer(algorithm.inputs[a], algorithm.inputs[b]) * sign
  return np.where(signs > 0, levels.max(), levels.min())


@pytest.mark.parametrize('weight, act, expected', [
    ('E2M1', 'E2M1', True), ('E1M2', 'UE1M3', True), ('E2M1', 'UE2M2', True),
    # 4 x 33 and 9 x 15 are beyond 127.
    ('E2M1', 'UE3M1', False), ('E3M0', 'E2M1', False),
    ('E2M1', 'E3M0', False)])
def test_what_fits_in_bytes(weight, act, expected):
  """By every value that a transform can have, of weights and of inputs."""
  levels, matrices = integers(act), winograd.BYTES
  w = np.random.default_rng(1).choice(
      integers(weight)[[0, -1]], (3, 3, 256, 4))
  largest = max(
      abs(transform(matrices.inputs, worst_tile(matrices, levels, a, b, sign))
          [a, b])
      for a, b, sign in itertools.product(range(4), range(4), (1, -1)))
  largest = max(largest, np.abs(transform(matrices.weights, w)).max())
  assert (largest <= 127) == expected
  assert winograd.fits(w, levels.min(), levels.max()) == expected
  # One bank that does not fit is enough.
  banks = np.stack([np.zeros_like(w), w])
  assert winograd.fits(banks, levels.min(), levels.max()) == expected


def test_the_largest_values_of_bytes_are_exact():
  """127 in weights and inputs, over many channels."""
  matrices = winograd.BYTES
  w = np.full((3, 3, 64, 2), 14)
  assert np.abs(transform(matrices.weights, w)).max() == 126
  x = np.full((1, 6, 6, 64), 31)
  assert winograd.fits(w, -31, 31)
  for sign in (1, -1):
    np.testing.assert_array_equal(
        np.asarray(in_bytes((sign * x).astype(np.float32), w), np.int64),
        expected_of(sign * x, w))


def test_sums_beyond_int32_do_not_fit():
  w = np.full((3, 3, 2**18, 1), 14)
  assert not winograd.fits(w, -31, 31)
  assert winograd.fits(w[:, :, :2**10], -31, 31)


SPLITS = [
    ('E2M1', 'E2M1', 64, 'random', 1), ('E2M1', 'UE3M1', 64, 'random', 2),
    ('E3M0', 'UE2M2', 128, 'random', 4), ('E2M1', 'UE2M2', 256, 'largest', 8)]


@pytest.mark.parametrize('weight, act, channels, fill, parts', SPLITS)
def test_splits_keep_every_sum_in_float32(weight, act, channels, fill, parts):
  w = inputs(fill, integers(weight), (3, 3, channels, 4))
  assert splits(w, act) == parts
  assert largest_sums(w, act, parts) <= 2**24
  assert parts == 1 or largest_sums(w, act, parts // 2) > 2**24


@pytest.mark.parametrize('weight, act, fill', [
    ('E2M1', 'UE3M1', 'largest'), ('E3M0', 'UE4M0', 'random'),
    ('E2M1', 'E5M2', 'random')])
def test_splits_finds_none_where_sums_are_too_large(weight, act, fill):
  w = inputs(fill, integers(weight), (3, 3, 512, 4))
  assert splits(w, act) == 0


def test_splits_looks_at_every_bank():
  small = np.ones((3, 3, 256, 4))
  banks = np.stack([small, 12 * small])
  assert splits(small, 'UE2M2') == 1
  assert splits(banks, 'UE2M2') == splits(banks[1], 'UE2M2') == 8


@pytest.mark.parametrize('weight, act, channels, fill, parts', SPLITS[1:])
def test_sums_in_parts_are_exact(weight, act, channels, fill, parts):
  w = inputs(fill, integers(weight), (3, 3, channels, 4))
  levels = integers(act)
  worst = worst_tile(winograd.FLOAT, levels, 2, 2, 1)
  convolve = jax.jit(lambda x, w: run(x, w, parts))
  for x in (inputs('random', levels, (1, 6, 6, channels)),
            np.broadcast_to(worst[None, ..., None], (1, 6, 6, channels))):
    np.testing.assert_array_equal(
        np.asarray(convolve(x.astype(np.float32), w), np.int64),
        expected_of(x, w))


@pytest.mark.parametrize('algorithm', [winograd.FLOAT, winograd.BYTES],
                         ids=['float', 'bytes'])
@pytest.mark.parametrize('images', [0, 2, 3])
def test_images_a_few_at_a_time(algorithm, images):
  """One at least, however little room there is."""
  m, n = algorithm.outputs.shape
  each = n**2 * -(-7 // m) * (8 // m) * 8 * (
      4 if algorithm is winograd.FLOAT else 1)
  few = dataclasses.replace(algorithm, at_once=images * each)
  w = inputs('random', integers('E2M1'), (3, 3, 8, 5))
  x = inputs('random', integers('UE2M2'), (6, 7, 8, 8))
  convolve = jax.jit(lambda x, w: run(x, w, 1, few))
  loops = convolve.lower(x.astype(np.float32), w).as_text().count('while')
  assert loops  # a few images at a time
  np.testing.assert_array_equal(
      np.asarray(convolve(x.astype(np.float32), w), np.int64),
      expected_of(x, w))


@pytest.mark.parametrize('way', [one_part, in_bytes])
def test_nan_spoils_its_image_alone(way):
  w = inputs('random', integers('E2M1'), (3, 3, 8, 5))
  x = inputs('random', integers('UE2M2'), (2, 7, 9, 8))
  expected = expected_of(x, w).astype(np.float32)
  x = x.astype(np.float32)
  x[1, 3, 4, 0] = expected[1] = np.nan
  np.testing.assert_array_equal(way(x, w), expected)
