"""Models that cannot be quantized: each gets one sentence that is true."""

import functools
from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax.models import convolution
from msfp_jax.quant import interception

X = jnp.asarray(
    np.random.default_rng(0).normal(size=(2, 4, 6, 3)), jnp.float32)
RNGS = {name: jax.random.key(0) for name in ('params', 'dropout', 'noise')}


class Model(nn.Module):
  """`make` under the name 'odd', after a Dense of 4."""

  make: Any

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4, name='dense')(x)
    return self.make(name='odd')(x)


def list_of(model, x=X):
  params = jax.eval_shape(model.init, RNGS, x)['params']
  return interception.list_layers(model, params, x)


def refused(model, message, x=X):
  """One sentence: neither lines nor addresses."""
  with pytest.raises(ValueError, match=message) as error:
    list_of(model, x)
  assert '\n' not in str(error.value) and 'http' not in str(error.value)
  return str(error.value)


class Standardized(nn.Conv):
  """Weight standardization, on its own product."""

  @nn.compact
  def __call__(self, x):
    kernel = self.param(
        'kernel', self.kernel_init,
        (*self.kernel_size, x.shape[-1], self.features))
    kernel = kernel - kernel.mean((0, 1, 2))
    return lax.conv_general_dilated(
        x, kernel / kernel.std((0, 1, 2)), (1, 1), 'SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


class Scaled(nn.Dense):

  def __call__(self, x):
    return 2 * super().__call__(x)


class RawWeight(nn.Module):

  @nn.compact
  def __call__(self, x):
    return x @ self.param('matrix', nn.initializers.ones, (x.shape[-1], 3))


@pytest.mark.parametrize('make, what', [
    (functools.partial(Standardized, 2, (3, 3)),
     r'odd\.kernel \(of a Standardized, a subclass of nn\.Conv\)'),
    (functools.partial(Scaled, 2),
     r'odd\.kernel \(of a Scaled, a subclass of nn\.Dense\)'),
    (functools.partial(nn.ConvTranspose, 2, (3, 3)),
     r'odd\.kernel \(of a ConvTranspose\)'),
    (functools.partial(nn.ConvLocal, 2, (3, 3)),
     r'odd\.kernel \(of a ConvLocal\)'),
    (functools.partial(nn.DenseGeneral, 2),
     r'odd\.kernel \(of a DenseGeneral\)'),
    (functools.partial(nn.Einsum, (4, 2), '...a,ab->...b'),
     r'odd\.kernel \(of a Einsum\)'),
    (functools.partial(nn.MultiHeadDotProductAttention, 2),
     r'odd\.key\.kernel \(of a DenseGeneral\).*odd\.query\.kernel'),
    (RawWeight, r'odd\.matrix \(of a RawWeight\)'),
], ids=lambda make: getattr(getattr(make, 'func', make), '__name__', ''))
def test_weights_of_other_modules(make, what):
  error = refused(Model(make), f'not exactly nn.Conv or nn.Dense.*{what}')
  assert 'write the model with plain nn.Conv and nn.Dense' in error
  assert 'dense.kernel' not in error


def test_weights_of_embeddings_and_normalizations_are_left_alone():

  class Tables(nn.Module):

    @nn.compact
    def __call__(self, x):
      x = nn.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1))(x)
      return nn.Dense(4, name='d')(x) + nn.Embed(5, 4)(jnp.arange(6))

  assert list_of(Tables()) == {'d': (3, 4)}


def other_product(*args, **options):
  return lax.dot_general(*args, **options)


def other_conv(*args, **options):
  return lax.conv_general_dilated(*args, **options)


def other_promotion(*args, dtype):
  return nn.dtypes.promote_dtype(*args, dtype=dtype)


dense = functools.partial(nn.Dense, 2)
conv = functools.partial(nn.Conv, 2, (3, 3))


@pytest.mark.parametrize('make, what', [
    (functools.partial(dense, dot_general=other_product),
     'a dot_general of its own'),
    (functools.partial(dense, dot_general_cls=lambda: other_product),
     'a dot_general_cls of its own'),
    (functools.partial(dense, promote_dtype=other_promotion),
     'a promote_dtype of its own'),
    (functools.partial(conv, conv_general_dilated=other_conv),
     'a conv_general_dilated of its own'),
    (functools.partial(conv, conv_general_dilated_cls=lambda: other_conv),
     'a conv_general_dilated_cls of its own'),
    (functools.partial(conv, promote_dtype=other_promotion),
     'a promote_dtype of its own'),
    (functools.partial(conv, mask=np.ones((3, 3, 4, 2), np.float32)),
     'a masked convolution'),
    (functools.partial(conv, padding=1, input_dilation=2),
     'input_dilation 2: a transposed convolution'),
    (functools.partial(conv, padding=1, input_dilation=(1, 2)),
     r'input_dilation \(1, 2\): a transposed convolution'),
])
def test_layers_that_compute_something_else(make, what):
  model = Model(make)
  refused(model, f'^layer odd: {what}')
  with pytest.raises(ValueError, match=f'^layer odd: {what}'):
    interception.call(model, model.init(RNGS, X), lambda module, x, f: f(x), X)


@pytest.mark.parametrize('make, shape', [
    (functools.partial(dense, dot_general=lax.dot_general), (4, 2)),
    (functools.partial(conv, conv_general_dilated=lax.conv_general_dilated),
     (3, 3, 4, 2)),
    (functools.partial(
        conv, conv_general_dilated=convolution.conv_general_dilated),
     (3, 3, 4, 2)),
    (functools.partial(conv, input_dilation=(1, 1)), (3, 3, 4, 2)),
    (functools.partial(conv, input_dilation=None), (3, 3, 4, 2)),
])
def test_layers_that_compute_the_same(make, shape):
  assert list_of(Model(make)) == {'dense': (3, 4), 'odd': shape}


def lifted_stack(transform, **options):
  return lambda name: transform(
      nn.Dense, variable_axes={'params': 0}, split_rngs={'params': True},
      **options)(4, name=name)


def test_weights_stacked_by_vmap():
  refused(Model(lifted_stack(nn.vmap)),
          r'^layer odd: its (kernel \(2, 4, 4\)|bias \(2, 4\)) holds those of '
          r'several layers.*nn\.vmap.*write these layers out')


class Step(nn.Module):
  """A turn of a loop."""

  @nn.compact
  def __call__(self, x, unused_step):
    return nn.Dense(4, name='turn')(x), None


@pytest.mark.parametrize('options', [
    {'variable_axes': {'params': 0}, 'split_rngs': {'params': True}},
    {'variable_broadcast': 'params', 'split_rngs': {'params': False}},
], ids=['a layer a turn', 'one layer'])
def test_loops(options):

  class Loop(nn.Module):

    @nn.compact
    def __call__(self, x):
      x = nn.Dense(4)(x)
      return nn.scan(Step, length=3, **options)(name='loop')(x, None)[0]

  refused(Loop(), r'^layer loop\.turn runs in a loop or branch.*\(scan; '
          r'nn\.scan.*write the turns out')


def test_branches():

  class Branch(nn.Module):

    @nn.compact
    def __call__(self, x):
      layer = nn.Dense(3, name='maybe')
      return nn.cond(x[0, 0, 0, 0] > 0, lambda model, x: layer(x),
                     lambda model, x: x, self, x)

  refused(Branch(), r'^layer maybe runs in a loop or branch.*\(cond;')


def test_loops_and_branches_without_layers_do_not_matter():

  class Free(nn.Module):

    @nn.compact
    def __call__(self, x):
      x = nn.Dense(3, name='d')(x)
      x = lax.fori_loop(0, 3, lambda i, x: x + i, x)
      return lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x)

  assert list_of(Free()) == {'d': (3, 3)}


def test_a_layer_called_twice():

  class Twice(nn.Module):

    def setup(self):
      self.layer = nn.Dense(3)

    def __call__(self, x):
      return self.layer(self.layer(x))

  refused(Twice(), "^layer 'layer' is called more than once")


def test_layers_that_are_not_called():

  class Unused(nn.Module):

    def setup(self):
      self.used, self.other = nn.Dense(3), nn.Dense(3)

    def __call__(self, x):
      if self.is_initializing():
        self.other(x)
      return self.used(x)

    def encode(self, x):
      return self.other(x)

  refused(Unused(), r"does not call .*: \['other\.kernel'\]; leave them out")


@pytest.mark.parametrize('around', [
    lambda name: nn.WeightNorm(nn.Dense(4, name=name)),
    lambda name: nn.map_variables(
        nn.Dense, 'params', lambda v: jax.tree.map(lambda w: 2 * w, v),
        init=True)(4, name=name),
], ids=['WeightNorm', 'map_variables'])
def test_layers_whose_weights_are_changed_on_the_way(around):

  class Changed(nn.Module):

    @nn.compact
    def __call__(self, x):
      return around('odd')(x)

  refused(Changed(), '^layer odd computes with another (kernel|bias) than its '
          'parameter .*nn.WeightNorm')


class After(nn.Module):
  """A Dense, then another module."""

  then: nn.Module

  @nn.compact
  def __call__(self, x):
    return self.then(nn.Dense(3, name='d')(x))


class Draws(nn.Module):

  @nn.compact
  def __call__(self, x):
    return x + jax.random.normal(self.make_rng('noise'), x.shape)


@pytest.mark.parametrize('then, message', [
    (nn.BatchNorm(use_running_average=True), 'batch_stats.*BatchNorm.*place'),
    (nn.BatchNorm(use_running_average=False), 'batch_stats.*BatchNorm.*place'),
    (nn.Dropout(0.5, deterministic=False), '"dropout".*deterministic=True'),
    (Draws(), 'random numbers.*"noise"'),
])
def test_models_that_need_more_than_parameters(then, message):
  refused(After(then), f'^the model .*{message}')


def test_batch_statistics_given_with_the_parameters():
  model = After(nn.BatchNorm(use_running_average=True))
  with pytest.raises(ValueError, match=r"variables \['batch_stats'\].*Group"):
    interception.list_layers(model, model.init(RNGS, X), X)


def test_dropout_that_is_off_and_batch_norm_of_nothing_kept():
  model = After(nn.Dropout(0.5, deterministic=True))
  assert list_of(model) == {'d': (3, 3)}


@pytest.mark.parametrize('params, what', [
    ({}, 'kernel.*/d'), ({'d': {'kernel': np.ones((3, 3))}}, 'bias.*/d'),
    ({'d': {'kernel': np.ones((5, 3)), 'bias': np.ones(3)}}, r'\(5, 3\)')])
def test_parameters_of_another_model(params, what):
  model = After(nn.Dropout(0.5, deterministic=True))
  with pytest.raises(ValueError, match=f'on these parameters.*{what}'):
    interception.list_layers(model, params, X)
