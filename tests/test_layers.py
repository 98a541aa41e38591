"""Finding the layers of a model, and seeing their inputs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from msfp_jax.quant import interception as layers_lib


class MLP(nn.Module):
  """Two layers, whose names sort in another order than they run."""

  @nn.compact
  def __call__(self, x):
    h = nn.relu(nn.Dense(5, name='b')(x))
    h = nn.LayerNorm()(h)
    return nn.Dense(2, name='a')(h)


class Wrapped(nn.Module):
  """A model that holds another under a name, next to a Dense."""

  inner: nn.Module

  @nn.compact
  def __call__(self, x):
    return self.inner.copy(name='other')(nn.Dense(4, name='dense')(x))


class RawWeight(nn.Module):

  @nn.compact
  def __call__(self, x):
    return x @ self.param('matrix', nn.initializers.ones, (x.shape[-1], 3))


X = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), jnp.float32)


def list_of(model, x=X):
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  return layers_lib.list_layers(model, shapes, x)


def test_layers_come_in_order_of_execution_with_their_kernels_shapes():
  assert list(list_of(MLP()).items()) == [('b', (3, 5)), ('a', (5, 2))]


def test_nested_names_are_joined_with_dots():
  assert list_of(Wrapped(MLP())) == {
      'dense': (3, 4), 'other.b': (4, 5), 'other.a': (5, 2)}


def test_convs_of_any_dimension():
  model = Wrapped(nn.Conv(2, (3,)))
  assert list_of(model, X[None])['other'] == (3, 4, 2)


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


@pytest.mark.parametrize('inner, weight', [
    (nn.ConvTranspose(2, (3,)), r'other\.kernel'),
    (nn.DenseGeneral(2), r'other\.kernel'),
    (nn.MultiHeadDotProductAttention(2), r'other\.query\.kernel'),
    (RawWeight(), r'other\.matrix'),
], ids=['ConvTranspose', 'DenseGeneral', 'attention', 'raw'])
def test_weights_of_other_layers_are_refused_by_name(inner, weight):
  with pytest.raises(ValueError, match=f'full precision.*{weight}') as error:
    list_of(Wrapped(inner), X[None])
  assert 'dense.kernel' not in str(error.value)


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

  with layers_lib.intercept_inputs(visit):
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
  with layers_lib.intercept_inputs(
      lambda name, x: 2 * x if name == 'b' else x):
    doubled = MLP().apply(params, X)
  np.testing.assert_array_equal(doubled, MLP().apply(params, 2 * X))


def test_interception_ends_with_its_block():
  params = MLP().init(jax.random.key(1), X)
  calls = []
  with pytest.raises(ZeroDivisionError):
    with layers_lib.intercept_inputs(lambda name, x: 1 / 0):
      MLP().apply(params, X)
  with layers_lib.intercept_inputs(lambda name, x: calls.append(name) or x):
    pass
  MLP().apply(params, X)
  assert not calls


@pytest.mark.parametrize('kind', ['kernel', 'bias'])
def test_leaves_of_one_kind_and_their_replacement(kind):
  params = MLP().init(jax.random.key(1), X)['params']
  leaves = layers_lib.leaves(params, kind, ('a', 'b'))
  assert {name: leaf.shape for name, leaf in leaves.items()} == {
      'kernel': {'a': (5, 2), 'b': (3, 5)},
      'bias': {'a': (2,), 'b': (5,)}}[kind]
  everywhere = set(layers_lib.leaves(params, kind))
  assert everywhere - {'a', 'b'} == (
      {'LayerNorm_0'} if kind == 'bias' else set())
  ones = np.ones(leaves['a'].shape)
  new = layers_lib.replace(params, kind, {'a': ones})
  np.testing.assert_array_equal(new['a'][kind], ones)
  new['a'][kind] = params['a'][kind]
  tiny.assert_trees_equal(new, params)
