"""Layers inside jit, remat and vmap, and in loops around these."""

from typing import Any

import flax.linen as nn
from interception_cases import list_of
from interception_cases import Wrapped
from interception_cases import X
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax.quant import interception


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
