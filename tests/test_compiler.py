"""Options for XLA are used where it knows them, and layers stay apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from msfp_jax.kernels import compiler


@pytest.fixture(autouse=True)
def forgotten():
  compiler.options.cache_clear()
  yield
  compiler.options.cache_clear()


def test_they_compile():
  x = jnp.arange(6.0).reshape(2, 3)
  product = jax.jit(jnp.matmul, compiler_options=compiler.options())
  np.testing.assert_array_equal(product(x, x.T), [[5, 14], [14, 50]])


@pytest.mark.usefixtures('on_cpu')
@pytest.mark.parametrize('unknown', [
    {'xla_no_such_option': '1'},
    {'xla_cpu_experimental_ynn_fusion_type': 'NO_SUCH_TYPE'}])
def test_unknown_ones_are_left_out(monkeypatch, unknown):
  monkeypatch.setattr(compiler, '_CPU', unknown)
  assert compiler.options() is None


def test_only_cpus_have_any(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  assert compiler.options() is None


@pytest.mark.usefixtures('on_cpu')
@pytest.mark.parametrize('is_packed', [False, True])
def test_xla_leaves_layers_apart(is_packed):
  """Two of three layers are quantized; each has a branch of its own."""
  model = toy.deployed()
  if is_packed:
    model = model.packed()
  x, t = jnp.ones((2, *toy.SHAPE)), jnp.ones(2)
  compiled = jax.jit(lambda arrays, x: model.with_arrays(arrays).eps_fn(
      x, t, 0)).lower(model.arrays, x).compile()
  assert compiled.as_text().count(' conditional(') == 2


@pytest.mark.usefixtures('on_cpu')
@pytest.mark.parametrize('value', [0, 1, -2, np.nan, np.inf])
def test_whatever_the_input_a_layer_apart_is_itself(value):
  """Setting a layer apart changes no result, jitted or not, empty or not."""
  layer = toy.deployed().layers['conv_in'].at(0)
  run = lambda x, layer: x * layer.weight.scale.ravel() + layer.bias
  x = jnp.full((2, 4), value, jnp.float32)
  apart = lambda x, layer: compiler.apart(run, x, layer)
  for inputs in (x, x[:0]):
    for call in (apart, jax.jit(apart)):
      np.testing.assert_allclose(
          call(inputs, layer), run(inputs, layer), rtol=1e-6)
