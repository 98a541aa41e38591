"""Quantized layers by every implementation, against float64."""

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
from kernel_cases import Case
from kernel_cases import conv_case
from kernel_cases import jit
from kernel_cases import packed
from kernel_cases import prepared
from kernel_cases import SOME
import marks
import numpy as np
import pytest

from msfp_jax import kernels
from msfp_jax.quant import geometry as geometry_lib
from msfp_jax.quant import numbers as numbers_lib

pytestmark = pytest.mark.gpu

WEIGHTS = numbers_lib.formats_of_width(4, signed=True)
ACTS = WEIGHTS + numbers_lib.formats_of_width(4, signed=False)


@pytest.mark.slow
@pytest.mark.parametrize('weight', WEIGHTS, ids=str)
def test_every_pair_of_4_bits(weight):
  """All pairs of 4-bit formats agree; not jitted, to share compilations."""
  eager = lambda function: function
  for act in ACTS:
    for case in [
        Case((5, 37), (37, 6), weight, act),
        Case((5, 37), (37, 6), weight, act, act_zero=-0.3, bias=False),
        conv_case((2, 7, 6, 5), (3, 3, 5, 4), weight, act, act_zero=0.2,
                  strides=2, padding=(0, 1))]:
      case.assert_agree(compile_=eager)


# Zero points as of SiLU's outputs, and of the whole range's asymmetric INT.
_SILU, _RANGE = -0.278, -1.25


@pytest.mark.parametrize('bits', marks.slow([3, 4, 5], range(3, 9)))
def test_every_pair_of_a_width_is_as_good_as_float32(bits):
  """Layers are within 1e-6 of float64, zero points on both sides.

  A plain float32 product of the same values has 3e-7, INT without its offset
  1.6e-4.
  """
  formats = (*numbers_lib.formats_of_width(bits, signed=True),
             *numbers_lib.formats_of_width(bits, signed=False))
  for weight, act in itertools.product(formats, repeat=2):
    options = {'zero': None if weight.signed else -1.5}
    if not act.signed:
      options['act_zero'] = _RANGE if act.exponent_bits == 1 else _SILU
    for case in [
        Case((5, 37), (37, 6), weight, act, **options),
        conv_case((1, 5, 6, 8), (3, 3, 8, 4), weight, act, padding=1,
                  **options)]:
      found = np.float64(case.apply(
          case.x, case.layer, implementation='reference'))
      error = np.abs(found - case.expected).max()
      assert error <= 1e-6 * np.abs(case.expected).max(), (
          weight, act, case.geometry)


@pytest.mark.parametrize('weight, act', [
    ('E3M2', 'UE3M3'), ('E1M6', 'UE1M7'), ('E4M3', 'E4M3'), ('E4M0', 'UE2M4'),
    ('E1M1', 'E2M0'), ('E5M2', 'E2M5')])
def test_other_widths(weight, act):
  """Formats of other widths agree: some fit int8, some fp8, some neither."""
  case = Case((5, 37), (37, 6), weight, act, act_zero=-0.3)
  case.assert_agree()
  assert case.packed.weight.layout.name == (
      'nibbles' if weight == 'E1M1' else 'bytes')


CONVS = {
    '3x3': ((2, 5, 6, 3), (3, 3, 3, 4), {'padding': 1}),
    '3x3, strides': ((1, 7, 6, 3), (3, 3, 3, 4), {'strides': 2, 'padding': 1}),
    '3x3, no borders': ((1, 5, 6, 3), (3, 3, 3, 4), {}),
    'below and right': (
        (1, 6, 5, 3), (3, 3, 3, 4), {'strides': 2, 'padding': (0, 1)}),
    '1x1': ((2, 3, 4, 5), (1, 1, 5, 3), {}),
    '1x1, strides, borders': (
        (2, 5, 4, 5), (1, 1, 5, 3), {'strides': 2, 'padding': 1}),
    '5x5': ((1, 6, 7, 2), (5, 5, 2, 3), {'padding': 2}),
    '2x3': ((1, 6, 7, 2), (2, 3, 2, 3), {'padding': (1, 0)}),
    'dilation': ((1, 7, 8, 3), (3, 3, 3, 2), {'padding': 2, 'dilation': 2}),
    'groups': ((2, 5, 6, 6), (3, 3, 2, 9), {'padding': 1, 'groups': 3}),
    'depthwise': ((2, 5, 6, 4), (3, 3, 1, 4), {'padding': 1, 'groups': 4}),
    '1-D': ((2, 9, 5), (3, 5, 4), {'padding': (2, 0), 'dilation': 1}),
    '3-D': ((1, 3, 4, 5, 2), (3, 1, 2, 2, 3), {'padding': 1}),
}


@pytest.mark.parametrize('name', marks.quick(
    ('1x1, strides, borders', '2x3', 'dilation', 'groups', '1-D'), CONVS))
def test_geometries(name):
  """Convolutions of all shapes agree, with zero point, offset and bias."""
  x, w, options = CONVS[name]
  conv_case(x, w, 'E2M1', 'UE3M1', act_zero=0.3, **options).assert_agree()


@pytest.mark.parametrize('weight, act, name', [
    ('UE1M3', 'UE1M3', '3x3, strides'), ('UE1M3', 'UE1M3', 'groups'),
    ('UE1M3', 'UE1M3', 'dilation'), ('UE1M3', 'UE1M3', '1-D'),
    ('UE1M7', 'UE1M7', '3x3, strides'), ('UE3M1', 'E2M1', '3x3, strides')])
def test_zero_points_of_weights(weight, act, name):
  """Weights with zero points agree, though large sums nearly cancel."""
  x, w, options = CONVS[name]
  case = conv_case(x, w, weight, act, zero=-1.5, act_zero=-1.2, **options)
  outputs = jit(lambda x, layers: [
      case.outputs(x, layer) for layer in layers])(
          case.x, [case.packed, case.layer])
  for carrier in ('reference', 'int8', 'bf16'):
    for each in outputs:
      case.assert_close(each[carrier], rtol=3e-6)


def test_zero_points_of_weights_alone():
  conv_case((1, 5, 6, 3), (3, 3, 3, 4), 'UE1M3', 'E2M1', zero=-1.0,
            padding=1).assert_agree()
  Case((5, 37), (37, 6), 'UE1M3', 'E2M1', zero=-1.0).assert_agree()


@pytest.mark.parametrize('weight', ['E2M1', 'E4M3'])
@pytest.mark.parametrize('zero', [None, -1.0])
def test_inputs_in_full_precision(weight, zero):
  for case in [Case((5, 37), (37, 6), weight, None, zero=zero),
               conv_case((1, 5, 6, 4), (3, 3, 2, 4), weight, None, zero=zero,
                         padding=1, groups=2)]:
    case.assert_close(case.run(case.layer))
    case.assert_close(case.run(prepared(case.packed)))


@pytest.mark.parametrize('kind, weight, act, act_zero', [
    ('dense', 'E2M1', 'UE3M1', None), ('conv', 'E2M1', 'UE2M2', -0.3),
    # fp8 has another unit, or no offset where float32 has one.
    ('conv', 'E4M0', 'UE2M2', -0.3), ('conv', 'UE3M1', 'UE2M2', -0.3)])
def test_prepared_layers_agree_too(kind, weight, act, act_zero):
  case = SOME[kind](weight, act, act_zero=act_zero)
  found = prepared(case.packed)
  assert found.prepared.tap_sums is not None
  case.assert_agree(found)


@pytest.mark.parametrize('kind', ['dense', 'conv'])
def test_sums_some_columns_at_a_time_are_the_same(monkeypatch, kind):
  packed = SOME[kind]('E2M1', 'UE2M2', act_zero=-0.3).packed
  expected = prepared(packed).prepared.tap_sums
  monkeypatch.setattr(
      importlib.import_module('msfp_jax.kernels.prepare'), '_AT_ONCE', 16)
  np.testing.assert_array_equal(prepared(packed).prepared.tap_sums, expected)


def test_what_is_not_packed_is_not_prepared():
  case = SOME['conv']('E2M1', 'UE2M2')
  assert kernels.prepare(case.layer) is case.layer


@pytest.mark.parametrize('kind', SOME)
def test_the_layout_for_hopper_runs_by_xla_too(kind):
  case = SOME[kind]('E3M0', 'UE3M1', act_zero=0.2)
  laid_out = prepared(case.packed, 'mosaic_gpu')
  assert laid_out.weight.layout.name == 'hopper'
  case.assert_agree(laid_out)
  with pytest.raises(ValueError, match='laid out for hopper'):
    case.run(laid_out, implementation='mosaic_tpu')


@pytest.mark.parametrize('kind', SOME)
def test_banks(kind):
  """One compiled program runs every bank, in every layout."""
  case = SOME[kind]('E2M1', 'UE3M1', act_zero=0.2)
  levels = case.layer.weight.data
  sets = [case.layer.replace(weight=case.layer.weight.replace(data=data))
          for data in (levels, -levels, levels[..., ::-1, :])]
  reference = jit(functools.partial(case.apply, implementation='reference'))
  expected = [np.asarray(reference(case.x, layer)) for layer in sets]
  assert not np.allclose(expected[0], expected[1], atol=0.1)
  banked = case.layer.replace(weight=case.layer.weight.replace(
      data=jnp.stack([layer.weight.data for layer in sets])))
  codes = packed(banked)
  for layer in (banked, codes, kernels.prepare(codes),
                kernels.prepare(codes, 'mosaic_gpu')):
    run = jit(lambda layer, index: case.apply(case.x, layer.at(0, index)))
    for index, each in enumerate(expected):
      np.testing.assert_allclose(
          run(jax.tree.map(jnp.asarray, layer), index), each, rtol=1e-6,
          atol=1e-6 * np.abs(each).max())


def test_banks_with_scales_of_their_own():
  """A scale with an axis of banks is taken with its bank, with its sums."""
  case = SOME['conv']('E2M1', 'UE3M1', act_zero=0.2)
  weight = case.layer.weight
  factors = np.float32([1, 0.5])[:, None, None, None, None]
  banked = case.layer.replace(weight=weight.replace(
      data=jnp.stack([weight.data, -weight.data]),
      scale=factors * weight.scale))
  assert (banked.num_banks, case.packed.weight.layout.name) == (2, 'nibbles')
  run = jit(lambda layer, index: case.apply(case.x, layer.at(0, index)))
  bias = case.layer.bias
  for layer in (banked, kernels.prepare(packed(banked))):
    layer = jax.tree.map(jnp.asarray, layer)
    case.assert_close(run(layer, 0))
    case.assert_close(bias - 2 * (run(layer, 1) - bias))


@pytest.mark.parametrize('kind', SOME)
def test_nan_reaches_what_it_is_part_of(kind):
  case = SOME[kind]('E2M1', 'UE3M1', act_zero=0.2)
  case.x[0, ..., 1] = np.nan
  spoilt = np.zeros(case.expected.shape, bool)
  spoilt[0] = True
  outputs = jit(case.outputs)(case.x, case.packed)
  for carrier in ('reference', 'bf16', 'fp8'):
    y = outputs[carrier]
    np.testing.assert_array_equal(np.isnan(y), spoilt)


@pytest.mark.parametrize('kind', SOME)
def test_bfloat16_is_rounded_once(kind):
  """A bfloat16 input is quantized as it is, and the result is rounded once."""
  case = SOME[kind]('E2M1', 'UE3M1', act_zero=0.2)
  case.x = jnp.asarray(case.x, jnp.bfloat16)
  y = case.run()
  assert y.dtype == jnp.bfloat16
  case.x = case.x.astype(jnp.float32)
  np.testing.assert_array_equal(y, case.run().astype(jnp.bfloat16))


def test_axes_before_the_inputs():
  case = Case((6, 37), (37, 6), 'E2M1', 'UE2M2')
  expected, x = case.run(), case.x
  for case.x in [x.reshape(2, 3, 37), x.reshape(2, 1, 3, 37), x[5]]:
    np.testing.assert_array_equal(
        case.run(), np.reshape(expected if case.x.ndim > 1 else expected[5],
                               (*case.x.shape[:-1], 6)))


@pytest.mark.parametrize('padding, strides, dilation', [
    ('SAME', 1, 1), ('SAME', 2, 1), ('SAME_LOWER', 1, 2), ('VALID', 2, 2)])
def test_padding_by_name(padding, strides, dilation):
  x, w = (1, 6, 7, 3), (3, 2, 3, 4)
  pads = jax.lax.padtype_to_pads(
      x[1:3], [(n - 1) * dilation + 1 for n in w[:2]], (strides,) * 2, padding)
  case = Case(x, w, 'E2M1', 'UE2M2', strides=(strides,) * 2, padding=pads,
              dilation=(dilation,) * 2)
  case.resolved = geometry_lib.resolve(x, w[:2], strides, padding, dilation)
  case.assert_close(case.run())
