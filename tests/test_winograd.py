"""3x3 convolutions of integers by `winograd`, against int64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import kernel_cases
import kernel_oracle
import numpy as np
import pytest

from msfp_jax import kernels
from msfp_jax.kernels import carriers
from msfp_jax.kernels import winograd
from msfp_jax.quant import geometry as geometry_lib
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.quantizers import Static

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


def run(x, w, parts):
  return winograd.conv(
      jnp.asarray(x), jnp.asarray(w, jnp.float32), parts,
      lambda x: x.astype(jnp.float32), lambda sums: sums)


@pytest.mark.parametrize('size', [(7, 9), (8, 8), (1, 6)])
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
      np.testing.assert_array_equal(
          np.asarray(one_part(x.astype(np.float32), w), np.int64),
          expected_of(x, w), f'{weight} {act} {kind}')


def largest_sums(w, act, parts):
  """Computes the largest sum of magnitudes over all tiles, int64.

  At every position of the transform the input of 6x6 that makes its value
  largest, or smallest, in every channel.
  """
  levels = integers(act)
  transform = lambda matrix, x: np.einsum(
      'ai,bj,ij...->ab...', matrix, matrix, x)
  positions = np.abs(transform(winograd._WEIGHTS, w))
  positions = positions.reshape(6, 6, parts, -1, w.shape[-1]).sum(3)
  found = 0
  for a, b, sign in itertools.product(range(6), range(6), (1, -1)):
    signs = np.outer(winograd._INPUTS[a], winograd._INPUTS[b]) * sign
    tile = np.where(signs > 0, levels.max(), levels.min())
    value = abs(transform(winograd._INPUTS, tile)[a, b])
    found = max(found, value * positions[a, b].max())
  return found


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
  worst = np.where(
      np.outer(winograd._INPUTS[2], winograd._INPUTS[2]) > 0,
      levels.max(), levels.min())
  convolve = jax.jit(lambda x, w: run(x, w, parts))
  for x in (inputs('random', levels, (1, 6, 6, channels)),
            np.broadcast_to(worst[None, ..., None], (1, 6, 6, channels))):
    np.testing.assert_array_equal(
        np.asarray(convolve(x.astype(np.float32), w), np.int64),
        expected_of(x, w))


@pytest.mark.parametrize('at_once', [1, 2 * 36 * 4 * 8, 3 * 36 * 4 * 8])
def test_images_a_few_at_a_time(monkeypatch, at_once):
  monkeypatch.setattr(winograd, '_AT_ONCE', at_once)
  w = inputs('random', integers('E2M1'), (3, 3, 8, 5))
  x = inputs('random', integers('UE2M2'), (6, 7, 8, 8))
  convolve = jax.jit(lambda x, w: run(x, w, 1))
  np.testing.assert_array_equal(
      np.asarray(convolve(x.astype(np.float32), w), np.int64),
      expected_of(x, w))


def test_nan_spoils_its_image_alone():
  w = inputs('random', integers('E2M1'), (3, 3, 8, 5))
  x = inputs('random', integers('UE2M2'), (2, 7, 9, 8))
  expected = expected_of(x, w).astype(np.float32)
  x = x.astype(np.float32)
  x[1, 3, 4, 0] = expected[1] = np.nan
  np.testing.assert_array_equal(one_part(x, w), expected)


def wide_layer(weight, act, zero_point=None):
  """Makes a layer of 64 to 64 channels, not packed and prepared."""
  rng = np.random.default_rng(3)
  weights = Static(FPFormat.parse(weight), jnp.linspace(0.1, 0.3, 64).reshape(
      1, 1, 1, -1))
  layer = QLayer(
      weights.quantize(np.float32(rng.normal(size=(3, 3, 64, 64))), axis=-2),
      Static(FPFormat.parse(act), np.float32(0.3), zero_point),
      np.float32(rng.normal(size=64)))
  return layer, kernel_cases.prepared(kernel_cases.packed(layer))


def convolve(x, layer, implementation=None, carrier=None, strides=1,
             padding='SAME', dilation=1):
  geometry = geometry_lib.resolve(x.shape, (3, 3), strides, padding, dilation)
  return kernels.run(layer, x, geometry, implementation=implementation,
                     carrier=carrier)


@pytest.fixture
def calls(monkeypatch):
  """Records the number of parts at every call of `winograd.conv`."""
  found, conv = [], winograd.conv

  def record(x, weights, parts, *functions):
    found.append(parts)
    return conv(x, weights, parts, *functions)

  monkeypatch.setattr(winograd, 'conv', record)
  return found


@pytest.mark.usefixtures('on_cpu')
@pytest.mark.parametrize('weight, act, zero_point, parts', [
    ('E2M1', 'E2M1', None, [1]),
    ('E2M1', 'UE3M1', np.float32(-0.5), [4]),
    # Levels that are no integers in float32, or too large.
    ('E5M2', 'E2M1', None, []), ('E3M0', 'UE4M0', None, [])])
def test_prepared_layers_equal_the_reference(
    calls, weight, act, zero_point, parts):
  """Prepared layers equal the reference bit for bit."""
  layer, prepared = wide_layer(weight, act, zero_point)
  x = jnp.asarray(
      np.random.default_rng(4).normal(size=(16, 16, 16, 64)), jnp.float32)
  expected = jax.jit(functools.partial(
      convolve, implementation='reference'))(x, layer)
  assert not calls
  actual = jax.jit(convolve)(x, prepared)
  assert calls == parts
  np.testing.assert_array_equal(actual, expected)


@pytest.mark.usefixtures('on_cpu')
@pytest.mark.parametrize('options', [
    {'strides': 2}, {'padding': 'VALID'}, {'padding': ((0, 2), (1, 1))},
    {'dilation': 2, 'padding': ((1, 1), (1, 1))}, {'carrier': 'bf16'},
    {'implementation': 'reference'}], ids=str)
def test_other_convolutions_are_plain(calls, options):
  _, prepared = wide_layer('E2M1', 'E2M1')
  jax.eval_shape(lambda x: convolve(x, prepared, **options),
                 jax.ShapeDtypeStruct((64, 8, 8, 64), jnp.float32))
  assert not calls


@pytest.mark.usefixtures('on_cpu')
@pytest.mark.parametrize('images, is_taken', [(16, True), (15, False)])
def test_few_pixels_do_not_pay_for_the_weights(calls, images, is_taken):
  _, prepared = wide_layer('E2M1', 'E2M1')
  jax.eval_shape(lambda x: convolve(x, prepared),
                 jax.ShapeDtypeStruct((images, 8, 8, 64), jnp.float32))
  assert bool(calls) == is_taken
