"""Values seen inside nested functions come out of them."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax.quant import taps

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
MATRIX = np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)


def inner(x):
  return jnp.sin(taps.tap(2 * x, label='inner'))


@jax.custom_jvp
def with_jvp(x):
  return inner(x)


@jax.custom_vjp
def with_vjp(x):
  return inner(x)


with_jvp.defjvp(lambda values, tangents: (inner(*values), tangents[0]))
with_vjp.defvjp(lambda x: (inner(x), None), lambda kept, g: (g,))


@pytest.mark.parametrize('nest', [
    lambda f: f, jax.jit, jax.checkpoint, jax.vmap,
    lambda f: jax.vmap(f, in_axes=1, out_axes=1), lambda f: with_jvp,
    lambda f: with_vjp, lambda f: jax.jit(jax.checkpoint(jax.vmap(jax.jit(f)))),
])
def test_a_value_comes_out_of_a_nested_function(nest):
  out, found = taps.run(nest(inner), X)
  np.testing.assert_allclose(out, np.sin(2 * np.float64(X)), rtol=1e-5)
  (one,) = found
  assert one.label == 'inner'
  value = one.value if one.value.shape == X.shape else one.value.T
  np.testing.assert_array_equal(value, 2 * X)


def test_lanes_come_first():
  _, found = taps.run(jax.vmap(inner, in_axes=1), X)
  np.testing.assert_array_equal(found[0].value, 2 * X.T)


def test_what_all_lanes_share_has_no_axis_of_lanes():
  function = jax.vmap(
      lambda x, w: taps.tap(x, w, label=0), in_axes=(0, None))
  _, (one,) = taps.run(function, X, MATRIX)
  assert (one.value.shape, one.beside[0].shape) == ((3, 4), (4, 4))
  each = jax.vmap(lambda x, w: taps.tap(x, w, label=0), in_axes=(None, 1))
  out, (one,) = taps.run(each, X[0], MATRIX)
  np.testing.assert_array_equal(one.value, X[0])
  np.testing.assert_array_equal(one.beside[0], MATRIX.T)
  np.testing.assert_array_equal(out, np.broadcast_to(X[0], (4, 4)))


def test_arguments_that_reach_a_tap_unchanged_are_the_same_objects():

  @jax.jit
  def function(x, same, changed):
    return taps.tap(x, same, changed + 0, label=None)

  same, changed = jnp.ones(2), jnp.ones(2)
  _, (one,) = taps.run(
      lambda x, tree: jax.checkpoint(function)(x, *tree), X, [same, changed])
  assert one.beside[0] is same and one.beside[1] is not changed


def test_taps_come_in_order_of_execution_and_as_often_as_they_run():

  @jax.jit
  def twice(x):
    return inner(inner(x))

  _, found = taps.run(
      lambda x: taps.tap(twice(taps.tap(x, label=1)), label=2), X)
  assert [one.label for one in found] == [1, 'inner', 'inner', 2]
  np.testing.assert_allclose(
      found[2].value, 2 * np.sin(2 * np.float64(X)), rtol=1e-5)


def test_constants_trees_and_repeated_operands_pass():
  matrix = jnp.asarray(MATRIX)

  @jax.jit
  def function(x):
    square = x['a'] * x['a']
    return {'y': taps.tap(square @ matrix, label=0), 'x': x['a'], 'one': 1.0}

  out, (one,) = taps.run(lambda x: (function(x), x), {'a': X})
  expected = np.float64(X)**2 @ np.float64(MATRIX)
  np.testing.assert_allclose(one.value, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(out[0]['y'], expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(out[0]['x'], X)
  assert out[0]['one'] == 1 and set(out[0]) == {'x', 'y', 'one'}


def test_the_derivative_of_a_tap_is_the_identitys():
  out, found = taps.run(jax.grad(lambda x: inner(x).sum()), X)
  np.testing.assert_allclose(out, 2 * np.cos(2 * np.float64(X)), rtol=1e-5)
  np.testing.assert_array_equal(found[0].value, 2 * X)
  assert len(found) == 1


def test_a_tap_alone_is_the_identity():
  np.testing.assert_array_equal(taps.tap(X, MATRIX, label=0), X)


def cond(x):
  return lax.cond(x.sum() > 0, inner, lambda x: x, x)


@pytest.mark.parametrize('function, kind', [
    (lambda x: lax.scan(lambda c, _: (inner(c), None), x, length=2)[0], 'scan'),
    (lambda x: lax.while_loop(lambda c: c.sum() > 0, inner, x), 'while'),
    (cond, 'cond'),
    (lambda x: lax.scan(lambda c, _: (cond(c), None), x, length=2)[0], 'scan'),
])
def test_loops_and_branches_are_refused(function, kind):
  with pytest.raises(taps.LoopError, match=f"'inner'.*{kind}") as error:
    taps.run(jax.jit(function), X)
  assert (error.value.labels, error.value.kind) == (['inner'], kind)
