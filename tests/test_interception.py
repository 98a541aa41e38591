"""Finding the layers of a model, and seeing their inputs."""

import flax
import flax.linen as nn
from interception_cases import list_of
from interception_cases import Wrapped
from interception_cases import X
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from msfp_jax.quant import interception


class MLP(nn.Module):
  """Two layers; the second is named to run before the first, by the name."""

  @nn.compact
  def __call__(self, x):
    h = nn.relu(nn.Dense(5, name='b')(x))
    h = nn.LayerNorm()(h)
    return nn.Dense(2, name='a')(h)


def test_layers_come_in_order_of_execution_with_their_kernels_shapes():
  assert list(list_of(MLP()).items()) == [('b', (3, 5)), ('a', (5, 2))]


def test_nested_names_are_joined_with_dots():
  assert list_of(Wrapped(MLP())) == {
      'dense': (3, 4), 'other.b': (4, 5), 'other.a': (5, 2)}


def test_convs_of_any_dimension():
  model = Wrapped(nn.Conv(2, (3,)))
  assert list_of(model, X[None])['other'] == (3, 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize('config, count', [
    (tiny.CIFAR10, 113), (tiny.CELEBA64, 134)], ids=['cifar10', 'celeba64'])
def test_the_real_unets(config, count):
  layers = tiny.layers(config)
  assert len(layers) == count
  assert list(layers)[:4] == ['temb.dense.0', 'temb.dense.1', 'conv_in',
                              'down.0.block.0.conv1']
  assert list(layers)[-1] == 'conv_out'
  assert layers['temb.dense.0'] == (128, 512)
  assert layers['conv_in'] == (3, 3, 3, 128)
  assert layers['up.0.block.0.nin_shortcut'] == (1, 1, 384, 128)


def test_embeddings_norms_and_biases_are_no_layers():

  class Model(nn.Module):

    @nn.compact
    def __call__(self, x):
      x = nn.Dense(4, name='dense')(x) + nn.Embed(5, 4)(jnp.arange(7))
      return nn.GroupNorm(2)(x)

  assert list_of(Model()) == {'dense': (3, 4)}


def test_interception_sees_exactly_the_inputs_and_changes_nothing():
  params = MLP().init(jax.random.key(1), X)
  plain = MLP().apply(params, X)
  seen = {}

  def visit(name, x):
    seen[name] = np.asarray(x)
    return x

  with interception.intercept_inputs(visit):
    out = MLP().apply(params, X)

  np.testing.assert_array_equal(out, plain)
  assert list(seen) == ['b', 'a']
  np.testing.assert_array_equal(seen['b'], X)
  dense = {name: jax.tree.map(np.float64, params['params'][name])
           for name in 'ba'}
  h = np.maximum(X @ dense['b']['kernel'] + dense['b']['bias'], 0)
  h = h - h.mean(axis=1, keepdims=True)
  h = h / np.sqrt((h**2).mean(axis=1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(seen['a'], h, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
      out, h @ dense['a']['kernel'] + dense['a']['bias'], rtol=1e-4,
      atol=1e-5)


def test_what_visit_returns_is_what_the_layer_gets():
  params = MLP().init(jax.random.key(1), X)
  with interception.intercept_inputs(
      lambda name, x: 2 * x if name == 'b' else x):
    doubled = MLP().apply(params, X)
  np.testing.assert_array_equal(doubled, MLP().apply(params, 2 * X))


def test_interception_ends_with_its_block():
  params = MLP().init(jax.random.key(1), X)
  calls = []
  with pytest.raises(ZeroDivisionError):
    with interception.intercept_inputs(lambda name, x: 1 / 0):
      MLP().apply(params, X)
  with interception.intercept_inputs(lambda name, x: calls.append(name) or x):
    pass
  MLP().apply(params, X)
  assert not calls


@pytest.mark.parametrize('kind', ['kernel', 'bias'])
def test_leaves_of_one_kind_and_their_replacement(kind):
  params = MLP().init(jax.random.key(1), X)['params']
  leaves = interception.leaves(params, kind, ('a', 'b'))
  assert {name: leaf.shape for name, leaf in leaves.items()} == {
      'kernel': {'a': (5, 2), 'b': (3, 5)},
      'bias': {'a': (2,), 'b': (5,)}}[kind]
  everywhere = set(interception.leaves(params, kind))
  assert everywhere - {'a', 'b'} == (
      {'LayerNorm_0'} if kind == 'bias' else set())
  ones = np.ones(leaves['a'].shape)
  new = interception.replace(params, kind, {'a': ones})
  np.testing.assert_array_equal(new['a'][kind], ones)
  new['a'][kind] = params['a'][kind]
  tiny.assert_trees_equal(new, params)


def test_other_methods_and_other_types_are_not_intercepted():
  """Of a subclass neither what it does itself nor what it inherits."""

  class Scaled(nn.Dense):

    def __call__(self, x):
      return 2 * super().__call__(x)

  class Model(nn.Module):

    @nn.compact
    def __call__(self, x):
      return nn.Dense(2, name='plain')(Scaled(4, name='scaled')(x))

  model, names = Model(), []
  variables = model.init(jax.random.key(0), X)
  with interception.intercept_inputs(lambda name, x: names.append(name) or x):
    model.apply(variables, X)
  assert names == ['plain']


def test_an_input_given_by_its_name():

  class Model(nn.Module):

    @nn.compact
    def __call__(self, x):
      return nn.Dense(2, name='dense')(inputs=nn.Conv(4, (3,))(inputs=x))

  params = Model().init(jax.random.key(0), X[None])
  visit = lambda module, x, compute: compute(
      2 * x if module.name == 'dense' else x)
  doubled = interception.call(Model(), params, visit, X[None])
  bias = np.asarray(params['params']['dense']['bias'])
  plain = Model().apply(params, X[None])
  np.testing.assert_allclose(doubled - bias, 2 * (plain - bias), rtol=1e-5)
  assert list_of(Model(), X[None]) == {'Conv_0': (3, 3, 4), 'dense': (4, 2)}


def boxed(init):
  return nn.with_partitioning(init, (None, 'model'))


class Boxed(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(2, name='d',
                    kernel_init=boxed(nn.initializers.lecun_normal()))(x)


@pytest.mark.parametrize('form', [
    lambda v: v, lambda v: v['params'], flax.core.freeze,
    lambda v: flax.core.freeze(v['params']),
    lambda v: v | {'intermediates': {'sown': (X,)}, 'empty': {}}],
    ids=['variables', 'parameters', 'frozen variables', 'frozen', 'sown'])
def test_forms_of_parameters(form):
  variables = Boxed().init(jax.random.key(0), X)
  kernel = variables['params']['d']['kernel'].value
  found = interception.parameters(form(variables))
  assert type(found) is type(found['d']) is dict
  np.testing.assert_array_equal(found['d']['kernel'], kernel)
  assert interception.list_layers(Boxed(), form(variables), X) == {'d': (3, 2)}
  _, calls = interception.record(Boxed(), form(variables), X)
  np.testing.assert_array_equal(calls['d'].input, X)


@pytest.mark.parametrize('given, message', [
    (None, 'the nested dict that model.init returned, not NoneType'),
    ([1], 'not list'),
    ({'params': {}, 'batch_stats': {'m': 1}}, r"variables \['batch_stats'\]"),
])
def test_what_is_no_parameters(given, message):
  with pytest.raises(ValueError, match=message):
    interception.parameters(given)
