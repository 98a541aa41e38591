"""Banks of low-rank updates, and the router among them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax.tune import talora

KEY = jax.random.key(2)
SHAPES = {'conv': (3, 2, 4, 6), 'dense': (5, 7)}
KERNELS = {name: jnp.ones(shape) for name, shape in SHAPES.items()}


def random_banks(num_banks, rank=2):
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
      talora.init_banks(KEY, KERNELS, num_banks, rank))


def loop_updates(banks):
  """Computes the updates of banks in float64, one output entry at a time."""
  out = {}
  for name, shape in SHAPES.items():
    a, b = np.float64(banks[name]['a']), np.float64(banks[name]['b'])
    update = np.zeros((len(a), *shape))
    for h, *place in np.ndindex(update.shape):
      *rows, column = place
      update[h, *place] = sum(
          a[h, *rows, r] * b[h, r, column] for r in range(a.shape[-1]))
    out[name] = update
  return out


def test_banks_start_without_effect():
  banks = talora.init_banks(KEY, KERNELS, 3, 2)
  for name, update in talora.bank_updates(banks).items():
    assert update.shape == (3, *SHAPES[name])
    np.testing.assert_array_equal(update, 0)
    assert not np.asarray(banks[name]['b']).any()


def test_a_starts_as_loras():
  """a is uniform within 1 / sqrt(fan in), other in every bank and layer."""
  kernels = {'x': jnp.ones((3, 3, 16, 64)), 'y': jnp.ones((3, 3, 16, 64))}
  banks = talora.init_banks(KEY, kernels, 2, 32)
  for bank in banks.values():
    a = np.asarray(bank['a'])
    assert a.shape == (2, 3, 3, 16, 32)
    assert 0.98 / 12 < np.abs(a).max() <= 1 / 12
    assert a.std() == pytest.approx(1 / 12 / 3**0.5, rel=0.02)
    assert abs(a.mean()) < 0.002
    assert (a[0] != a[1]).all()
  assert (banks['x']['a'] != banks['y']['a']).all()


@pytest.mark.parametrize('num_banks', [1, 3])
def test_updates_are_the_products_of_the_factors(num_banks):
  banks = random_banks(num_banks)
  for name, expected in loop_updates(banks).items():
    np.testing.assert_allclose(
        talora.bank_updates(banks)[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('gates', [[0, 1, 0], [0.5, -1, 2]])
def test_gates_weigh_the_banks(gates):
  banks = random_banks(3)
  gates = {'conv': jnp.asarray(gates, jnp.float32),
           'dense': jnp.asarray(gates[::-1], jnp.float32)}
  for name, each in loop_updates(banks).items():
    expected = sum(float(g) * e for g, e in zip(
        gates[name], each, strict=True))
    np.testing.assert_allclose(
        talora.bank_updates(banks, gates)[name], expected, rtol=1e-5,
        atol=1e-5)


def test_merge_adds_to_the_layers_that_have_banks():
  banks = random_banks(3)
  kernels = KERNELS | {'free': jnp.ones((2, 2))}
  merged = talora.merge(kernels, talora.bank_updates(banks))
  assert set(merged) == {'conv', 'dense'}
  for name, update in loop_updates(banks).items():
    np.testing.assert_allclose(merged[name], 1 + update, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_rank_is_at_most_the_kernels():
  kernels = {'thin': jnp.ones((1, 1, 3, 8)), 'narrow': jnp.ones((3, 3, 4, 2)),
             'wide': jnp.ones((20, 20))}
  banks = talora.init_banks(KEY, kernels, 2, 16)
  assert {name: (bank['a'].shape, bank['b'].shape)
          for name, bank in banks.items()} == {
              'thin': ((2, 1, 1, 3, 3), (2, 3, 8)),
              'narrow': ((2, 3, 3, 4, 2), (2, 2, 2)),
              'wide': ((2, 20, 16), (2, 16, 20))}


@pytest.mark.slow
def test_offsets_of_single_weights_in_place_of_a_product():
  """Rank 0: banks have the kernels' shapes, and are added as they are."""
  banks = talora.init_banks(KEY, KERNELS, 2, 0)
  for name, kernel in KERNELS.items():
    assert jax.tree.map(jnp.shape, banks[name]) == {
        'offset': (2, *kernel.shape)}
    assert not np.asarray(banks[name]['offset']).any()
  banks = jax.tree.map(
      lambda leaf: jax.random.normal(KEY, leaf.shape), banks)
  gates = {name: jnp.float32([0.0, 1.0]) for name in KERNELS}
  for name, update in talora.bank_updates(banks, gates).items():
    np.testing.assert_array_equal(update, banks[name]['offset'][1])
  for name, update in talora.bank_updates(banks).items():
    np.testing.assert_array_equal(update, banks[name]['offset'])


@pytest.mark.parametrize('num_banks, rank', [(0, 4), (-1, 4), (2, -1)])
def test_no_banks_or_no_rank_are_refused(num_banks, rank):
  with pytest.raises(ValueError, match=f'num_banks={num_banks}, rank={rank}'):
    talora.init_banks(KEY, KERNELS, num_banks, rank)


@pytest.mark.parametrize('temperature', [0.1, 1.0, 7.0])
def test_select_is_exactly_one_hot(temperature):
  logits = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
  expected = np.eye(4)[logits.argmax(axis=1)]
  for fun in (talora.select, jax.jit(talora.select)):
    np.testing.assert_array_equal(fun(logits, temperature), expected)


def test_select_takes_the_first_of_equals():
  np.testing.assert_array_equal(
      talora.select(jnp.asarray([1.0, 3.0, 3.0])), [0, 1, 0])


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_gradient_of_select_is_the_softmaxs(temperature):
  """The gradient is the softmax's, p_i (delta_ij - p_j) / T."""
  logits = np.random.default_rng(1).normal(size=4)
  p = np.exp(logits / temperature)
  p /= p.sum()
  expected = (np.diag(p) - np.outer(p, p)) / temperature
  jacobian = jax.jacobian(talora.select)(
      jnp.asarray(logits, jnp.float32), temperature)
  np.testing.assert_allclose(jacobian, expected, rtol=1e-4, atol=1e-6)


def router_of(num_banks, **options):
  router = talora.Router(num_layers=5, num_banks=num_banks,
                         num_train_steps=1000, **options)
  return router, router.init(KEY, jnp.zeros(()))['params']


@pytest.mark.parametrize('num_banks', [
    2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_span_of_timesteps_starts_in_its_own_bank(num_banks):
  router, params = router_of(num_banks)
  span = 1000 // num_banks
  # All but the borders, where the random part of the start decides.
  t = np.array([t for t in range(0, 1000, 5)
                if 15 <= t % span <= span - 15 or t < 15 or t > 985])
  choices = talora.plan_choices(router, params, t)
  assert choices.shape == (len(t), 5) and choices.dtype == jnp.int32
  np.testing.assert_array_equal(choices, np.tile(t[:, None] // span, 5))


@pytest.mark.parametrize('num_banks', [2, 3, 5])
@pytest.mark.parametrize('prior', [1.0, 4.0])
def test_a_spans_bank_is_ahead_of_the_nth_next_by_n_priors(num_banks, prior):
  """Whatever the number of banks; in the middle of a span, with weights of 0.

  More banks stand closer together: without a factor of h they would be told
  apart the less, the more there are.
  """
  router, params = router_of(num_banks, prior=prior)
  silent = {'params': jax.tree.map(jnp.zeros_like, params)}
  banks = np.arange(num_banks)
  for own in banks:
    middle = (own + 0.5) * 1000 / num_banks - 0.5
    logits = np.asarray(router.apply(silent, jnp.float32(middle)))
    expected = -prior * np.abs(banks - own)
    np.testing.assert_allclose(
        logits - logits[:, [own]], np.tile(expected, (5, 1)), atol=1e-4)


def test_plan_choices_are_the_argmax_at_each_step_in_order():
  """Choices are the argmax at each step, of a router whose layers differ."""
  router, params = router_of(3)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
      params)
  t = np.array([900, 3, 500, 77])
  choices = np.asarray(talora.plan_choices(router, params, t))
  for row, step in zip(choices, t, strict=True):
    logits = router.apply({'params': params}, jnp.float32(step))
    assert logits.shape == (5, 3) and logits.dtype == jnp.float32
    np.testing.assert_array_equal(row, np.argmax(logits, axis=1))
  assert len(np.unique(choices)) > 1


def test_without_prior_the_logits_start_near_zero():
  router, params = router_of(3, prior=0.0)
  for t in (0.0, 499.0, 999.0):
    assert np.abs(router.apply({'params': params}, t)).max() < 0.1
