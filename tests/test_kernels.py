"""Quantized layers by every implementation, against float64."""

import functools

import jax
import jax.numpy as jnp
import kernel_oracle
import numpy as np
import pytest

from msfp_jax import formats as formats_lib
from msfp_jax import kernels
from msfp_jax import quantizers
from msfp_jax.formats import FPFormat
from msfp_jax.kernels import carriers
from msfp_jax.kernels import dispatch

WEIGHTS = formats_lib.formats_of_width(4, signed=True)
ACTS = WEIGHTS + formats_lib.formats_of_width(4, signed=False)
E2M1 = FPFormat.parse('E2M1')

# Compiling takes longer than running.
_jit = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0})


class Case:
  """A layer at random, its input, and what it returns, in float64.

  Attributes:
    layer: not packed.
    packed: the same, packed.
    x: its input.
    expected: its output.
    span: of every output, the sum of |x| |w| were all x the largest, as
      carried: what a relative error of every product and sum is of.
    length: of the sums.
  """

  def __init__(self, x_shape, w_shape, weight, act, zero=None, act_zero=None,
               bias=True, **geometry):
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)
    weight, act = FPFormat.parse(weight), act and FPFormat.parse(act)
    outputs = w_shape[-1]
    self.geometry = geometry
    self.x, w = draw(x_shape), draw(w_shape)
    scale = np.float32(3 / weight.max * np.exp2(rng.uniform(-1, 0, outputs)))
    zeros = None if zero is None else np.float32(zero + 0.1 * draw(outputs))
    bias = draw(outputs) if bias else None
    act_scale = act and np.float32(2.5 / act.max)
    act_zero = None if act_zero is None else np.float32(act_zero)
    self.layer = kernels.make_layer(
        w, quantizers.Quantizer(weight, scale, zeros),
        act and quantizers.Quantizer(act, act_scale, act_zero), bias)
    self.packed = kernels.pack(self.layer)
    w = kernel_oracle.fake_quant(w, weight, scale, zeros)
    self.weights = w
    inputs, largest = np.float64(self.x), np.abs(self.x).max()
    if act:
      inputs = kernel_oracle.fake_quant(self.x, act, act_scale, act_zero)
      largest = act.max * act_scale + abs(act_zero or 0)
    bias = 0 if bias is None else bias
    self.expected = self.product(inputs, w) + bias
    self.span = self.product(
        np.full(x_shape, largest), np.abs(w)) + np.abs(bias)
    self.length = np.prod(w_shape[:-1])

  def product(self, x, w):
    if not self.geometry:
      return x @ w
    return kernel_oracle.conv(x, w, **self.geometry)

  def apply(self, x, layer, **options):
    """Operation by operation, unless it is jitted."""
    if not self.geometry:
      return kernels.matmul(x, layer, **options)
    return kernels.conv(x, layer, **self.geometry, **options)

  def run(self, layer=None, **options):
    layer = self.packed if layer is None else layer
    return _jit(lambda x, layer: self.apply(x, layer, **options))(
        self.x, layer)

  def assert_close(self, actual, rtol=1e-6):
    """To the largest output."""
    np.testing.assert_allclose(
        actual, self.expected, rtol=rtol, atol=rtol * np.abs(
            self.expected).max())

  def outputs(self, x, layer):
    """{'reference': its own, carrier: of XLA}."""
    fmts = self.layer.fmt, self.layer.act_fmt
    expected = self.apply(x, layer, implementation='reference')
    return {'reference': expected} | {
        carrier: self.apply(x, layer, implementation='xla', carrier=carrier)
        for carrier in ('int8', 'fp8', 'bf16')
        if all(carriers.carry(fmt, carrier) for fmt in fmts)}

  def assert_agree(self, layer=None, jit=None):
    """The reference, and XLA in every carrier that holds the formats.

    Bit for bit where sums are exact. Else every product and sum rounds once,
    and so do scale, shift and what they are applied to.
    """
    layer = self.packed if layer is None else layer
    outputs = (jit or _jit)(self.outputs)(self.x, layer)
    expected = outputs.pop('reference')
    self.assert_close(expected)
    assert outputs
    is_exact = functools.partial(
        carriers.is_exact, layer.fmt, layer.act_fmt, self.length)
    bound = 2.0**-24 * (2 * self.length + 8) * self.span
    for carrier, actual in outputs.items():
      if is_exact(carrier) and is_exact('f32'):
        np.testing.assert_array_equal(actual, expected, carrier)
      else:
        assert (np.abs(actual - self.expected) <= bound).all(), carrier


def conv_case(x_shape, w_shape, *formats, strides=1, padding=0, dilation=1,
              groups=1, **options):
  axes = len(x_shape) - 2
  if isinstance(padding, int):
    padding = (padding, padding)
  return Case(x_shape, w_shape, *formats, **options, strides=(strides,) * axes,
              padding=(padding,) * axes, dilation=(dilation,) * axes,
              groups=groups)


@pytest.mark.parametrize('weight', WEIGHTS, ids=str)
def test_every_pair_of_4_bits(weight):
  """Operation by operation, so that they share compilations."""
  eager = lambda function: function
  for act in ACTS:
    for case in [
        Case((5, 37), (37, 6), weight, act),
        Case((5, 37), (37, 6), weight, act, act_zero=-0.3, bias=False),
        conv_case((2, 7, 6, 5), (3, 3, 5, 4), weight, act, act_zero=0.2,
                  strides=2, padding=(0, 1))]:
      case.assert_agree(jit=eager)


@pytest.mark.parametrize('weight, act', [
    ('E3M2', 'UE3M3'), ('E1M6', 'UE1M7'), ('E4M3', 'E4M3'), ('E4M0', 'UE2M4'),
    ('E1M1', 'E2M0'), ('E5M2', 'E2M5')])
def test_other_widths(weight, act):
  """Two that int8 holds, one of them with an offset; two that fp8 does."""
  case = Case((5, 37), (37, 6), weight, act, act_zero=-0.3)
  case.assert_agree()
  assert case.packed.packing == ('nibbles' if weight == 'E1M1' else 'bytes')


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


@pytest.mark.parametrize('name', CONVS)
def test_geometries(name):
  """With all that the shift is made of."""
  x, w, options = CONVS[name]
  conv_case(x, w, 'E2M1', 'UE3M1', act_zero=0.3, **options).assert_agree()


@pytest.mark.parametrize('weight, act, name', [
    ('UE1M3', 'UE1M3', '3x3, strides'), ('UE1M3', 'UE1M3', 'groups'),
    ('UE1M3', 'UE1M3', 'dilation'), ('UE1M3', 'UE1M3', '1-D'),
    ('UE1M7', 'UE1M7', '3x3, strides'), ('UE3M1', 'E2M1', '3x3, strides')])
def test_zero_points_of_weights(weight, act, name):
  """INT; the sums are large and their difference small."""
  x, w, options = CONVS[name]
  case = conv_case(x, w, weight, act, zero=-1.5, act_zero=-1.2, **options)
  outputs = _jit(lambda x, layers: [
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
    case.assert_close(case.run(kernels.prepare(case.packed)))


SOME = {
    'dense': functools.partial(Case, (5, 7), (7, 6)),
    'conv': functools.partial(conv_case, (1, 5, 6, 3), (3, 3, 3, 4), padding=1),
}


@pytest.mark.parametrize('kind, weight, act, act_zero', [
    ('dense', 'E2M1', 'UE3M1', None), ('conv', 'E2M1', 'UE2M2', -0.3),
    # fp8 has another unit, or no offset where float32 has one.
    ('conv', 'E4M0', 'UE2M2', -0.3), ('conv', 'UE3M1', 'UE2M2', -0.3)])
def test_prepared_layers_agree_too(kind, weight, act, act_zero):
  case = SOME[kind](weight, act, act_zero=act_zero)
  prepared = kernels.prepare(case.packed)
  assert prepared.tap_sums is not None
  case.assert_agree(prepared)
  assert kernels.prepare(case.layer) is case.layer


@pytest.mark.parametrize('kind', SOME)
def test_the_layout_for_hopper_runs_by_xla_too(kind):
  case = SOME[kind]('E3M0', 'UE3M1', act_zero=0.2)
  laid_out = kernels.prepare(case.packed, 'mosaic_gpu')
  assert laid_out.packing == 'hopper'
  case.assert_agree(laid_out)
  np.testing.assert_array_equal(laid_out.dequantized(), case.weights.astype(
      np.float32))
  with pytest.raises(ValueError, match='laid out for mosaic_gpu'):
    case.run(laid_out, implementation='mosaic_tpu')


@pytest.mark.parametrize('kind', SOME)
def test_banks(kind):
  """One compilation for all of them; in every packing."""
  case = SOME[kind]('E2M1', 'UE3M1', act_zero=0.2)
  banked = case.layer.replace(
      banked=True, weights=jnp.stack([
          case.layer.weights, -case.layer.weights, 2 * case.layer.weights]))
  reference = _jit(functools.partial(
      case.apply, implementation='reference'))
  expected = [
      np.asarray(reference(case.x, case.layer.replace(weights=weights)))
      for weights in banked.weights]
  assert not np.allclose(expected[0], expected[1], atol=0.1)
  packed = kernels.pack(banked)
  for layer in (banked, packed, kernels.prepare(packed),
                kernels.prepare(packed, 'mosaic_gpu')):
    run = _jit(lambda layer, index: case.apply(case.x, layer.bank(index)))
    for index, each in enumerate(expected):
      np.testing.assert_allclose(
          run(jax.tree.map(jnp.asarray, layer), index), each, rtol=1e-5,
          atol=1e-5)


@pytest.mark.parametrize('kind', SOME)
def test_nan_reaches_what_it_is_part_of(kind):
  case = SOME[kind]('E2M1', 'UE3M1', act_zero=0.2)
  case.x[0, ..., 1] = np.nan
  spoilt = np.zeros(case.expected.shape, bool)
  spoilt[0] = True
  outputs = _jit(case.outputs)(case.x, case.packed)
  for carrier in ('reference', 'bf16', 'fp8'):
    y = outputs[carrier]
    np.testing.assert_array_equal(np.isnan(y), spoilt)


@pytest.mark.parametrize('kind', SOME)
def test_bfloat16_is_rounded_once(kind):
  """In, and out."""
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
  convolve = _jit(lambda x, layers: [
      kernels.conv(x, layer, strides=strides, padding=padding,
                   dilation=dilation) for layer in layers])
  for y in convolve(case.x, [
      case.packed, kernels.prepare(case.packed, 'mosaic_gpu')]):
    case.assert_close(y)


def test_values_are_simulated_and_codes_are_run():
  case = Case((5, 37), (37, 6), 'E2M1', 'UE2M2')
  assert dispatch.pick(case.x.shape, case.layer) == 'reference'
  if jax.default_backend() == 'cpu':
    assert dispatch.pick(case.x.shape, case.packed) == 'xla'
    assert dispatch.pick_carrier(case.packed, 'xla') == 'f32'
  assert dispatch.pick_carrier(case.packed, 'reference') == 'f32'


@pytest.mark.parametrize('implementation', ['mosaic_tpu', 'mosaic_gpu'])
@pytest.mark.parametrize('act, carrier', [
    ('E2M1', 'int8'), ('UE3M1', 'int8'), ('UE4M0', 'bf16')])
def test_carriers_of_kernels(implementation, act, carrier):
  case = Case((5, 37), (37, 6), 'E2M1', act)
  assert dispatch.pick_carrier(case.packed, implementation) == carrier


REFUSED = {
    'zero point': (SOME['conv']('UE1M3', 'E2M1', zero=-1.0),
                   'its weights have no zero point'),
    'unquantized inputs': (SOME['dense']('E2M1', None),
                           'it multiplies quantized inputs'),
    '8 bits': (SOME['dense']('E4M3', 'E4M3'),
               'weights of 4 bits, and those of this layer are E4M3'),
    'unsigned': (SOME['dense']('UE2M2', 'E2M1'), 'weights in UE2M2'),
    'groups': (conv_case((1, 5, 6, 4), (3, 3, 2, 4), 'E2M1', 'E2M1', groups=2),
               'without groups and dilation'),
    'dilation': (conv_case((1, 5, 6, 4), (3, 3, 4, 4), 'E2M1', 'E2M1',
                           dilation=2), 'without groups and dilation'),
    '1-D': (conv_case((1, 5, 4), (3, 4, 4), 'E2M1', 'E2M1'),
            '2-D convolutions'),
}


@pytest.mark.parametrize('implementation', ['mosaic_tpu', 'mosaic_gpu'])
@pytest.mark.parametrize('name', REFUSED)
def test_kernels_say_what_they_do_not_take(name, implementation):
  case, reason = REFUSED[name]
  with pytest.raises(
      ValueError, match=f"implementation '{implementation}': .*{reason}"):
    case.run(implementation=implementation)


def test_kernels_do_not_take_values():
  case = SOME['dense']('E2M1', 'E2M1')
  with pytest.raises(ValueError, match='E2M1, stored as values'):
    case.run(case.layer, implementation='mosaic_tpu')


@pytest.mark.parametrize('implementation', [None, 'xla', 'reference'])
def test_carriers_that_do_not_hold_a_format(implementation):
  case = SOME['conv']('E2M1', 'UE4M0')
  with pytest.raises(ValueError, match='int8 does not hold weights in E2M1 and '
                     'inputs in UE4M0; choose another carrier, such as bf16'):
    case.run(implementation=implementation, carrier='int8')
  case = SOME['dense']('E2M1', None)
  with pytest.raises(ValueError, match='bf16 does not hold .* full precision'):
    case.run(implementation=implementation, carrier='bf16')


def test_unknown_names():
  case = SOME['dense']('E2M1', 'E2M1')
  with pytest.raises(ValueError, match="implementation 'nonsense': must be"):
    case.run(implementation='nonsense')
  with pytest.raises(ValueError, match="carrier 'nonsense': must be one of"):
    case.run(carrier='nonsense')


@pytest.mark.parametrize('fmt, packing', [
    ('E2M1', 'nibbles'), ('E1M1', 'nibbles'), ('UE2M2', 'nibbles'),
    ('E3M1', 'bytes'), ('E4M3', 'bytes')])
def test_packed_weights(fmt, packing):
  """Their size, codes and values."""
  case = SOME['conv'](fmt, 'E2M1')
  packed = case.packed
  assert (packed.packing, packed.in_features) == (packing, 3)
  assert packed.weights.dtype == np.uint8
  assert packed.weights.shape == (3, 3, 2 if packing == 'nibbles' else 3, 4)
  values = FPFormat.parse(fmt).values()
  levels = values[np.asarray(packed.codes())]
  np.testing.assert_allclose(levels * packed.scale, case.weights, rtol=1e-6)
  for layer in (packed, case.layer):
    np.testing.assert_allclose(layer.dequantized(), case.weights, rtol=1e-6)
    for carrier in ('f32', 'bf16'):
      carried = carriers.carry(FPFormat.parse(fmt), carrier)
      np.testing.assert_array_equal(
          np.asarray(layer.values(carrier), np.float64),
          levels / carried.unit - carried.offset)
  assert kernels.pack(packed) is packed


@pytest.mark.parametrize('shape, channels', [
    ((), 1), ((1,), 1), ((1, 1, 1, 1), 1), ((4,), 4), ((1, 1, 1, 4), 4)])
def test_scales_of_a_channel_or_of_all(shape, channels):
  scale = jnp.arange(1.0, 1 + channels).reshape(shape)
  layer = kernels.make_layer(
      jnp.ones((3, 3, 2, 4)), quantizers.Quantizer(E2M1, scale), None)
  np.testing.assert_array_equal(
      layer.scale, np.broadcast_to(np.arange(1.0, 1 + channels), 4))


@pytest.mark.parametrize('shape', [(1, 1, 2, 1), (2,), (2, 1, 1, 4)])
def test_other_scales_of_weights_are_refused(shape):
  quantizer = quantizers.Quantizer(E2M1, jnp.ones(shape))
  with pytest.raises(ValueError, match=r'weights of 4 output channels'):
    kernels.make_layer(jnp.ones((3, 3, 2, 4)), quantizer, None)


@pytest.mark.parametrize('scale, zero_point, message', [
    (jnp.ones(2), None, r'a scale of shape \(2,\) for the input'),
    (jnp.float32(1), jnp.ones((2, 1)), r'a zero point of shape \(2, 1\)')])
def test_inputs_have_one_scale_and_one_zero_point(scale, zero_point, message):
  act = quantizers.Quantizer(E2M1, scale, zero_point)
  with pytest.raises(ValueError, match=message):
    kernels.make_layer(
        jnp.ones((2, 4)), quantizers.Quantizer(E2M1, jnp.float32(1)), act)


def test_nan_has_no_code():
  layer = kernels.make_layer(
      jnp.full((2, 4), jnp.nan), quantizers.Quantizer(E2M1, jnp.float32(1)),
      None)
  with pytest.raises(ValueError, match='8 of 8 weights are NaN'):
    kernels.pack(layer)
