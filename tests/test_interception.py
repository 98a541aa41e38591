"""Finding the layers of a model, and seeing their inputs."""

from typing import Any

import flax
import flax.linen as nn
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


class Wrapped(nn.Module):
  """`inner` under a name, next to a Dense."""

  inner: nn.Module

  @nn.compact
  def __call__(self, x):
    return self.inner.copy(name='other')(nn.Dense(4, name='dense')(x))


X = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), jnp.float32)


def list_of(model, x=X):
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  return interception.list_layers(model, shapes, x)


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


class Block(nn.Module):
  """x + Dense(relu(Dense(x)))."""

  @nn.compact
  def __call__(self, x):
    h = nn.relu(nn.Dense(5, name='up')(x))
    return x + nn.Dense(3, name='down')(h)


class JitMethod(nn.Module):
  """Block, its method wrapped rather than its class."""

  @nn.jit
  @nn.compact
  def __call__(self, x):
    return Block.__call__.__wrapped__(self, x)


class RematMethod(nn.Module):

  @nn.remat
  @nn.compact
  def __call__(self, x):
    return Block.__call__.__wrapped__(self, x)


class Stack(nn.Module):
  """Two blocks of equal structure, so that nn.jit traces one for both."""

  block: Any

  @nn.compact
  def __call__(self, x):
    return self.block(name='b')(self.block(name='a')(x))


def shared(block, axis=0):
  """Lanes along an axis, one set of weights."""
  return nn.vmap(block, in_axes=axis, out_axes=axis,
                 variable_axes={'params': None}, split_rngs={'params': False})


LIFTED = {
    'plain': Block, 'jit': nn.jit(Block), 'remat': nn.remat(Block),
    'jit of a method': JitMethod, 'remat of a method': RematMethod,
    'vmap': shared(Block), 'vmap of axis 1': shared(Block, 1),
    'vmap twice': shared(shared(Block)),
    'jit of remat': nn.jit(nn.remat(Block)),
    'remat of jit of vmap': nn.remat(nn.jit(shared(Block)))}
each_lifted = pytest.mark.parametrize('block', LIFTED.values(), ids=LIFTED)
BATCH = jnp.asarray(
    np.random.default_rng(3).normal(size=(2, 4, 6, 3)), jnp.float32)


def random_params(model, *inputs):
  rng = np.random.default_rng(4)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)['params']
  return jax.tree.map(
      lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
      shapes)


def stack_in_float64(params, x):
  """The output of `Stack`, and {layer: its input}."""
  params, x = jax.tree.map(np.float64, (params, x))
  seen = {}
  for name in 'ab':
    up, down = params[name]['up'], params[name]['down']
    seen[f'{name}.up'] = x
    h = np.maximum(x @ up['kernel'] + up['bias'], 0)
    seen[f'{name}.down'] = h
    x = x + h @ down['kernel'] + down['bias']
  return x, seen


@each_lifted
@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'jit'])
def test_recorded_inputs_leave_lifted_transforms(block, compiled):
  model = Stack(block)
  params = random_params(model, BATCH)
  expected, inputs = stack_in_float64(params, BATCH)
  names = []

  def run(params, x):
    out, calls = interception.record(model, params, x)
    names[:] = calls
    return out, {name: call.input for name, call in calls.items()}

  out, seen = (jax.jit(run) if compiled else run)(params, BATCH)
  assert names == list(inputs)  # in order of execution
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
  for name, value in seen.items():
    # Lanes of a vmap come first; which value stands where is not promised.
    np.testing.assert_allclose(
        np.sort(value, axis=None), np.sort(inputs[name], axis=None), rtol=1e-4,
        atol=1e-4, err_msg=name)
    assert value.shape[-1] == inputs[name].shape[-1]


@each_lifted
def test_extremes_of_every_step_of_a_loop_around_a_lifted_model(block):
  """As calibration goes through a sampler."""
  model = Stack(block)
  params = jax.tree.map(lambda w: w / 4, random_params(model, BATCH))

  def body(x, unused_step):
    out, calls = interception.record(model, params, x)
    return out, {name: (call.input.min(), call.input.max())
                 for name, call in calls.items()}

  seen = jax.jit(lambda x: jax.lax.scan(body, x, length=3)[1])(BATCH)
  x = BATCH
  for step in range(3):
    x, inputs = stack_in_float64(params, x)
    for name, value in inputs.items():
      low, high = (extreme[step] for extreme in seen[name])
      np.testing.assert_allclose([low, high], [value.min(), value.max()],
                                 rtol=1e-4, err_msg=name)


@each_lifted
def test_every_layer_of_a_lifted_model_is_visited_by_its_own_name(block):
  """Not the name of the block that nn.jit traced first."""
  model = Stack(block)
  params = random_params(model, BATCH)
  plain = model.apply({'params': params}, BATCH)
  factors = {'a.up': 2., 'a.down': 3., 'b.up': 5., 'b.down': 7.}
  visit = lambda module, x, compute: compute(
      x * factors[interception.layer_name(module)])
  out = interception.call(model, params, visit, BATCH)
  scaled = {block: {name: {
      'kernel': layer['kernel'] * factors[f'{block}.{name}'],
      'bias': layer['bias']} for name, layer in layers.items()}
            for block, layers in params.items()}
  np.testing.assert_allclose(
      out, stack_in_float64(scaled, BATCH)[0], rtol=1e-4, atol=1e-3)
  # And what was traced for this call serves no other.
  np.testing.assert_array_equal(model.apply({'params': params}, BATCH), plain)
  assert not np.asarray(interception.call(
      model, params, lambda module, x, compute: 0 * compute(x), 0 * BATCH)
  ).any()


def test_absent_layers_are_told_apart_by_name():
  """Packed layers have no parameters that could tell blocks apart."""
  model = Stack(nn.jit(Block))
  names = ['a.up', 'a.down', 'b.up', 'b.down']
  visited = []

  def visit(module, x, compute):
    visited.append(interception.layer_name(module))
    return jnp.ones((*x.shape[:-1], module.features))

  interception.call(model, {}, visit, BATCH, names=names)
  assert visited == names


def test_modules_that_are_nothing_but_a_lifted_layer():

  class Model(nn.Module):

    @nn.compact
    def __call__(self, x):
      x = nn.jit(nn.Dense)(4, name='a')(x)
      return nn.remat(nn.Dense)(2, name='b')(x)

  assert list_of(Model()) == {'a': (3, 4), 'b': (4, 2)}


def test_a_layer_inside_the_subclass_of_a_layer():

  class Outer(nn.Conv):

    @nn.compact
    def __call__(self, x):
      return nn.Conv(self.features, self.kernel_size, name='inner')(x)

  model = Wrapped(Outer(2, (3,)))
  assert list_of(model, X[None]) == {'dense': (3, 4), 'other.inner': (3, 4, 2)}


def test_recorded_modules_say_how_they_compute_and_hold_nothing():
  model = Wrapped(nn.remat(nn.Conv)(2, (3,), strides=2, padding='VALID'))
  params = random_params(model, X[None])
  _, calls = interception.record(model, params, X[None])
  module = calls['other'].module
  assert type(module) is nn.Conv
  assert (module.strides, module.padding) == (2, 'VALID')
  assert module.scope is None


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
