"""Options for XLA are used where it knows them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
