"""Flax models on packed layers equal Flax's own on quantized values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest

from msfp_jax.kernels import apply as apply_lib
from msfp_jax.kernels import cpu
from msfp_jax.quant import interception
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Static

pytestmark = pytest.mark.gpu

IMAGE, SEQUENCE = (2, 9, 8, 4), (2, 9, 4)
CONVS = {  # the shape of the input, the layer
    'same': (IMAGE, (5, (3, 3)), {}),
    'strides': (IMAGE, (5, (3, 3)), {'strides': 2}),
    'strides_of_each': (IMAGE, (5, (3, 3)), {'strides': (1, 3)}),
    'valid': (IMAGE, (5, (3, 2)), {'padding': 'VALID'}),
    'padding': (IMAGE, (5, (3, 3)), {'padding': 2, 'strides': 2}),
    'padding_of_each': (IMAGE, (5, (3, 3)), {'padding': (1, 0)}),
    'padding_of_sides': (
        IMAGE, (5, (3, 3)), {'padding': ((0, 1), (0, 1)), 'strides': 2}),
    'circular': (IMAGE, (5, (3, 4)), {'padding': 'CIRCULAR'}),
    'circular_dilation': (
        IMAGE, (5, (3, 3)),
        {'padding': 'CIRCULAR', 'kernel_dilation': 2, 'strides': 2}),
    'reflect': (IMAGE, (5, (5, 3)), {'padding': 'REFLECT'}),
    'dilation': (IMAGE, (5, (3, 3)), {'kernel_dilation': (2, 1)}),
    'groups': (IMAGE, (6, (3, 3)), {'feature_group_count': 2}),
    'depthwise': (IMAGE, (4, (3, 3)), {'feature_group_count': 4}),
    'no_bias': (IMAGE, (5, (1, 1)), {'use_bias': False}),
    'batches': ((1, *IMAGE), (5, (3, 3)), {}),
    'no_batch': (IMAGE[1:], (5, (3, 3)), {}),
    'window': (SEQUENCE, (5, 3), {}),
    'sequence': (SEQUENCE, (5, (3,)), {'strides': 2}),
    'causal': (SEQUENCE, (5, (3,)),
               {'padding': 'CAUSAL', 'kernel_dilation': 2}),
    'no_sequences': (SEQUENCE[1:], (5, (3,)), {}),
}
DENSES = {'dense': (IMAGE, {}), 'dense_vector': ((4,), {}),
          'dense_no_bias': (SEQUENCE, {'use_bias': False})}


class One(nn.Module):
  """A model of one layer, called `layer`."""

  make: type
  options: dict

  @nn.compact
  def __call__(self, x):
    return self.make(**self.options, name='layer')(x)


class Zoo(nn.Module):
  """A model of one layer of every kind."""

  @nn.compact
  def __call__(self, inputs):
    out = {name: nn.Conv(*args, **options, name=name)(inputs[name])
           for name, (_, args, options) in CONVS.items()}
    return out | {name: nn.Dense(3, **options, name=name)(inputs[name])
                  for name, (_, options) in DENSES.items()}


def params_of(model, *inputs):
  """Draws random parameters, biases too."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)['params']
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


def weight_of(kernel):
  """Makes a kernel's quantizer, with a scale for each output channel."""
  return Static(FPFormat.parse('E2M1'), jnp.abs(kernel).max(
      tuple(range(kernel.ndim - 1)), keepdims=True) / 6)


ACTS = [
    Static(FPFormat.parse('E2M1'), jnp.float32(0.45)),
    Static(FPFormat.parse('UE3M1'), jnp.float32(0.11), jnp.float32(-1.1)),
    Block(FPFormat.parse('UE1M3'), 'token')]


def quantize(params, act):
  """Returns {layer: packed}, and the parameters with quantized kernels."""
  weights = interception.leaves(params, 'kernel')
  biases = interception.leaves(params, 'bias')
  # In one program each: not one for every layer's shape.
  tensors = kernel_cases.jit(lambda weights: {
      name: weight_of(kernel).quantize(kernel, axis=-2)
      for name, kernel in weights.items()})(weights)
  quantized = kernel_cases.jit(lambda weights: {
      name: weight_of(kernel).fake_quant(kernel, axis=-2)
      for name, kernel in weights.items()})(weights)
  packed = {name: kernel_cases.prepared(QLayer(
      tensor.packed(), act, biases.get(name)))
            for name, tensor in tensors.items()}
  return packed, interception.replace(params, 'kernel', quantized)


def by_flax(model, params, act, *inputs):
  """Runs Flax's own layers, each on its input as quantized."""

  def quantize_input(next_, args, kwargs, context):
    if not isinstance(context.module, (nn.Conv, nn.Dense)):
      return next_(*args, **kwargs)
    (x,) = (*args, *kwargs.values())
    quantizer = act
    if isinstance(act, dict):
      quantizer = act[context.module.name]
    return next_(quantizer.fake_quant(x))

  with nn.intercept_methods(quantize_input):
    return model.apply({'params': params}, *inputs)


@pytest.mark.parametrize('act', [
    pytest.param(act, id=name, marks=[pytest.mark.slow] * (name != 'token'))
    for act, name in zip(ACTS, ['E2M1', 'UE3M1', 'token'], strict=True)])
def test_every_kind_of_layer(act):
  rng = np.random.default_rng(1)
  inputs = {name: jnp.asarray(rng.normal(size=shape), jnp.float32)
            for name, (shape, *_) in (CONVS | DENSES).items()}
  params = params_of(Zoo(), inputs)
  packed, quantized = quantize(params, act)
  assert set(packed) == set(inputs)
  expected = kernel_cases.jit(lambda inputs: by_flax(
      Zoo(), quantized, act, inputs))(inputs)
  actual = kernel_cases.jit(lambda inputs, packed: apply_lib.apply(
      Zoo(), {}, packed, inputs))(inputs, packed)
  for name, y in expected.items():
    assert actual[name].dtype == jnp.float32
    np.testing.assert_allclose(
        actual[name], y, rtol=1e-5, atol=1e-5 * np.abs(y).max(), err_msg=name)


def one(make, *inputs, **options):
  """Returns a model of one layer, its packed layer and quantized parameters."""
  model = One(make, options)
  return model, *quantize(params_of(model, *inputs), ACTS[1])


KINDS = {'conv': (nn.Conv, IMAGE, {'features': 5, 'kernel_size': (3, 3)}),
         'dense': (nn.Dense, (7, 4), {'features': 5})}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype, of_input, expected', [
    (jnp.bfloat16, jnp.float32, jnp.bfloat16),
    (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    (jnp.float32, jnp.bfloat16, jnp.float32),
    (None, jnp.bfloat16, jnp.float32)])
def test_dtypes_are_those_of_flax(kind, dtype, of_input, expected):
  """Results have Flax's dtypes; inputs are quantized before any rounding."""
  make, shape, options = KINDS[kind]
  x = jnp.asarray(np.random.default_rng(1).normal(size=shape), of_input)
  model, packed, quantized = one(make, x, **options, dtype=dtype)
  run = lambda x, model: kernel_cases.jit(
      lambda x: apply_lib.apply(model, {}, packed, x))(x)
  actual = run(x, model)
  wanted = by_flax(model, quantized, ACTS[1], x)
  assert actual.dtype == wanted.dtype == expected
  np.testing.assert_allclose(
      actual.astype(jnp.float32), wanted.astype(jnp.float32), rtol=0.02,
      atol=0.02 * np.abs(wanted).max())
  exact = run(x.astype(jnp.float32), One(make, options))
  np.testing.assert_array_equal(actual, exact.astype(expected))


class Pair(nn.Module):
  """A model whose two layers are also called with keywords."""

  @nn.compact
  def __call__(self, x):
    h = nn.Dense(4, name='first')(inputs=x)
    return nn.Dense(3, name='second')(nn.LayerNorm(name='norm')(h))


@pytest.mark.parametrize('act', [Full(), ACTS[1]], ids=['full', 'UE3M1'])
def test_layers_without_weights_keep_their_own(act):
  x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)
  params = params_of(Pair(), x)
  packed, quantized = quantize(params, ACTS[0])
  packed['second'] = QLayer(None, act)
  rest = {name: params[name] for name in ('second', 'norm')}
  expected = by_flax(Pair(), {**rest, 'first': quantized['first']},
                     {'first': ACTS[0], 'second': act}, x)
  actual = apply_lib.apply(Pair(), rest, packed, x)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_every_layer_is_named_once():
  x = jnp.ones((5, 4))
  params = params_of(Pair(), x)
  packed, _ = quantize(params, ACTS[0])
  first = {'first': packed['first']}
  with pytest.raises(ValueError, match="no rule covers layer 'second'"):
    apply_lib.apply(Pair(), params, first, x)
  for extra in (packed | {'third': packed['first']},
                packed | {'third': QLayer(None)}):
    with pytest.raises(ValueError, match=r"the model lacks: \['third'\]"):
      apply_lib.apply(Pair(), params, extra, x)


@pytest.mark.parametrize('options, message', [
    ({'mask': np.ones((3, 3, 4, 5), np.float32)}, 'a masked convolution'),
    ({'input_dilation': 2}, 'input_dilation 2: a transposed'),
    ({'input_dilation': (1, 2)}, r'input_dilation \(1, 2\): a transposed')])
def test_convolutions_that_cannot_be_packed(options, message):
  x = jnp.ones(IMAGE)
  model, packed, _ = one(nn.Conv, x, features=5, kernel_size=(3, 3))
  model = One(nn.Conv, model.options | options)
  with pytest.raises(ValueError, match=f'^layer layer: {message}'):
    apply_lib.apply(model, {}, packed, x)


def test_input_dilation_of_1_is_none():
  x = jnp.ones(IMAGE)
  model, packed, _ = one(
      nn.Conv, x, features=5, kernel_size=(3, 3), input_dilation=(1, 1))
  assert apply_lib.apply(model, {}, packed, x).shape == (*IMAGE[:-1], 5)


@pytest.mark.parametrize('implementation, message', [
    ('mosaic_tpu', "implementation 'mosaic_tpu': it takes 2-D convolutions "
     'without groups'), ('nonsense', "implementation 'nonsense': must be")])
def test_implementations_that_do_not_take_a_layer(implementation, message):
  x = jnp.ones(IMAGE)
  model, packed, _ = one(nn.Conv, x, features=6, kernel_size=(3, 3),
                         feature_group_count=2)
  with pytest.raises(ValueError, match=f'^layer layer: {message}'):
    apply_lib.apply(model, {}, packed, x, implementation=implementation)


def test_a_format_that_the_kernels_lack():
  x = jnp.ones((5, 4))
  model = One(nn.Dense, {'features': 3})
  kernel = params_of(model, x)['layer']['kernel']
  weight = Static(FPFormat.parse('E4M3'), jnp.float32(0.01))
  packed = {'layer': QLayer(weight.quantize(kernel, axis=-2).packed(), ACTS[0])}
  with pytest.raises(
      ValueError, match="^layer layer: implementation 'mosaic_tpu': it reads "
      'weights of 4 bits, and those of this layer are E4M3'):
    apply_lib.apply(model, {}, packed, x, implementation='mosaic_tpu')


def test_a_convolution_of_the_models_own_is_used(monkeypatch):
  """A model's own convolution is used, for products in float32."""
  monkeypatch.setattr(cpu, 'carrier', lambda products: 'f32')
  calls = []

  def double(*args, **options):
    calls.append(options.keys())
    return 2 * jax.lax.conv_general_dilated(*args, **options)

  double.is_convolution = True
  x = jnp.ones(IMAGE)
  options = {'features': 5, 'kernel_size': (3, 3), 'use_bias': False}
  model, _, quantized = one(nn.Conv, x, **options)
  kernel = quantized['layer']['kernel']
  packed = {'layer': QLayer(
      weight_of(kernel).quantize(kernel, axis=-2).packed(), ACTS[0])}
  run = lambda model: apply_lib.apply(model, {}, packed, x)
  doubled = run(One(nn.Conv, options | {'conv_general_dilated': double}))
  assert len(calls) == 1
  np.testing.assert_allclose(doubled, 2 * run(model), rtol=1e-6)
