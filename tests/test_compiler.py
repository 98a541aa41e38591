"""Options for XLA are used where it knows them, and layers stay apart."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from msfp_jax.kernels import compiler
from msfp_jax.kernels import cpu

pytestmark = pytest.mark.optimized


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


@pytest.mark.usefixtures('on_cpu')
@pytest.mark.parametrize('seconds, expected', [
    ({'f32': 3.0, 'int8': 1.0}, 'int8'), ({'f32': 1.0, 'int8': 3.0}, 'f32'),
    # As good as equal: nothing is gained.
    ({'f32': 1.0, 'int8': 0.99}, 'f32')])
def test_the_faster_carrier_is_taken(monkeypatch, seconds, expected):
  monkeypatch.setattr(cpu, '_race', lambda runs: seconds)
  monkeypatch.setattr(cpu, '_layer', lambda name: None)
  assert cpu._decide() == expected


@pytest.fixture
def races(monkeypatch):
  """Forgets what was decided; lists the seconds of every race."""
  found, race = [], cpu._race

  def record(runs):
    found.append(race(runs))
    return found[-1]

  monkeypatch.setattr(cpu, '_race', record)
  cpu._decided.cache_clear()
  yield found
  cpu._decided.cache_clear()


# Products of a layer for which a race pays.
LARGE = 10**10


def traced():
  jax.jit(lambda x: (cpu.carrier(LARGE), x)[1])(1.0)


def uncompiled():
  with jax.disable_jit():
    cpu.carrier(LARGE)


def vectorized():
  jax.vmap(lambda x: (cpu.carrier(LARGE), x)[1])(jnp.ones(3))


@pytest.mark.usefixtures('on_cpu')
@pytest.mark.parametrize('ask', [traced, uncompiled, vectorized])
def test_the_race_does_not_depend_on_who_asks(races, ask):
  ask()
  assert cpu.carrier(LARGE) in ('f32', 'int8')
  assert len(races) == 1  # once a process
  assert set(races[0]) == {'f32', 'int8'}
  assert all(0 < seconds < 60 for seconds in races[0].values())


@pytest.mark.usefixtures('on_cpu')
def test_small_layers_start_no_race(races):
  """Those of the smallest models: to measure would take longer than to run."""
  assert cpu.carrier(64 * 8 * 8 * 16) == 'f32'
  assert not races


@pytest.mark.usefixtures('on_cpu')
def test_threads_share_one_race(races):
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    found = set(pool.map(lambda _: cpu.carrier(LARGE), range(3)))
  assert len(found) == len(races) == 1


def test_processes_of_one_program_take_the_same(monkeypatch, races):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  assert cpu.carrier(LARGE) == 'f32'
  assert not races


@pytest.mark.parametrize('shape', [(4,), (3, 4), (2, 3, 2, 4)])
def test_products_of_bytes(shape):
  x, w = (np.random.default_rng(0).integers(-128, 128, size, np.int8)
          for size in (shape, (4, 5)))
  found = compiler.product_of_bytes(jnp.asarray(x), jnp.asarray(w))
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, np.int64(x) @ np.int64(w))


def test_only_cpus_have_any(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  assert compiler.options() is None


@pytest.mark.slow
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
