"""Schedules and samplers, against the papers' formulas in float64."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax import diffusion
from msfp_jax.diffusion import plan as plan_lib

SHAPE = (2, 3, 3, 2)
KEY = jax.random.key(7)


def ddpm_schedule(num_train_steps=1000):
  return diffusion.make_schedule(
      'linear', num_train_steps=num_train_steps, beta_start=1e-4,
      beta_end=0.02)


def noise(seed=0):
  return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def toy_eps(xp, x, t):
  """A toy model, not linear in x, different at every t and pixel."""
  phase = xp.arange(x.size).reshape(x.shape) / 7
  t = t.reshape(-1, 1, 1, 1)
  return (xp.sqrt((t + 1) / 1001) * x + 0.2 * xp.sin(2 * x + phase)
          + 0.05 * xp.cos(t / 90))


def jax_eps(x, t, index):
  del index
  return toy_eps(jnp, x, t)


def numpy_eps(x, t):
  return toy_eps(np, x, np.full(len(x), float(t)))


@functools.cache
def fresh_noise(num_steps):
  """Draws the noise that samplers draw at each position, float64 [S, ...]."""
  draw = lambda i: jax.random.normal(jax.random.fold_in(KEY, i), SHAPE)
  return np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(num_steps)), np.float64)


def ddim_step(bar, t, t_next, x, e, z, eta):
  """Steps by ermongroup's recurrence, functions/denoising.py."""
  a = bar[t]
  a_next = bar[t_next] if t_next >= 0 else 1.0
  x0 = (x - e * np.sqrt(1 - a)) / np.sqrt(a)
  c1 = eta * np.sqrt((1 - a / a_next) * (1 - a_next) / (1 - a))
  c2 = np.sqrt(1 - a_next - c1**2)
  return np.sqrt(a_next) * x0 + c1 * z + c2 * e


def ddpm_step(bar, t, t_next, x, e, z, variance):
  """Steps by DDPM's algorithm 2, alpha = abar / abar' between visited steps."""
  a_next = bar[t_next] if t_next >= 0 else 1.0
  alpha = bar[t] / a_next
  beta = 1 - alpha
  var = beta if variance == 'large' else (1 - a_next) / (1 - bar[t]) * beta
  mean = (x - beta / np.sqrt(1 - bar[t]) * e) / np.sqrt(alpha)
  return mean + (np.sqrt(var) * z if t_next >= 0 else 0.0)


def walk(step, bar, timesteps, x, option):
  """Runs a NumPy step over descending timesteps."""
  x = np.asarray(x, np.float64)
  z = fresh_noise(len(timesteps))
  for i, t in enumerate(timesteps):
    t_next = timesteps[i + 1] if i + 1 < len(timesteps) else -1
    x = step(bar, t, t_next, x, numpy_eps(x, t), z[i], option)
  return x


def assert_near(actual, desired, relative=1e-4):
  """Checks to a tolerance relative to the largest magnitude."""
  np.testing.assert_allclose(
      actual, desired, rtol=0, atol=relative * np.abs(desired).max())


def bars(betas):
  """Computes alphabar by the recurrence."""
  out, bar = [], 1.0
  for beta in betas:
    bar *= 1 - beta
    out.append(bar)
  return np.array(out)


def test_linear_schedule():
  expected = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
  schedule = ddpm_schedule()
  assert schedule.betas.dtype == np.float64
  assert schedule.num_train_steps == 1000
  np.testing.assert_allclose(schedule.betas, expected, rtol=1e-13)
  np.testing.assert_allclose(
      schedule.alphas_cumprod, bars(expected), rtol=1e-12)


def test_scaled_linear_schedule():
  low, high = 0.0015**0.5, 0.0195**0.5
  expected = [(low + (high - low) * t / 999)**2 for t in range(1000)]
  schedule = diffusion.make_schedule(
      'scaled_linear', num_train_steps=1000, beta_start=0.0015,
      beta_end=0.0195)
  np.testing.assert_allclose(schedule.betas, expected, rtol=1e-12)


def test_cosine_schedule():
  schedule = diffusion.make_schedule('cosine', num_train_steps=200)
  f = lambda t: np.cos((t / 200 + 0.008) / 1.008 * np.pi / 2)**2
  expected = np.array([f(t + 1) / f(0) for t in range(200)])
  # The last beta is capped at 0.999, which only lifts the last alphabar.
  np.testing.assert_allclose(
      schedule.alphas_cumprod[:-1], expected[:-1], rtol=1e-9)
  assert schedule.betas[-1] == 0.999


def test_unknown_schedule():
  with pytest.raises(ValueError, match="'sigmoid'.*cosine.*linear"):
    diffusion.make_schedule('sigmoid', num_train_steps=10)


@pytest.mark.parametrize('betas', [
    [], [[0.1]], [0.1, 0.0], [0.1, 1.0], [0.1, -0.1], [0.1, np.nan]])
def test_betas_that_are_no_variances_are_refused(betas):
  with pytest.raises(ValueError, match='betas must'):
    diffusion.NoiseSchedule(np.array(betas))


def test_add_noise_is_equation_4_with_each_rows_own_t():
  schedule = ddpm_schedule()
  x0, z = noise(1), noise(2)
  t = np.array([3, 871])
  bar = bars(schedule.betas)[t].reshape(-1, 1, 1, 1)
  expected = np.sqrt(bar) * x0 + np.sqrt(1 - bar) * z
  actual = diffusion.add_noise(
      schedule, jnp.asarray(x0), jnp.asarray(z), jnp.asarray(t))
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('steps', [1, 7, 20, 100, 300, 999, 1000])
def test_uniform_timesteps(steps):
  expected = list(range(0, 1000, 1000 // steps))
  assert diffusion.ddim_timesteps(1000, steps).tolist() == expected


@pytest.mark.parametrize('steps', [1, 7, 20, 100, 300, 1000])
def test_quad_timesteps(steps):
  grid = np.linspace(0, np.sqrt(1000 * 0.8), steps)**2
  expected = [int(s) for s in grid]
  assert diffusion.ddim_timesteps(1000, steps, 'quad').tolist() == expected


@pytest.mark.parametrize('spacing', ['uniform', 'quad'])
@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
def test_ddim_is_ermongroups(eta, spacing):
  schedule = ddpm_schedule()
  plan = diffusion.make_plan(
      schedule, 'ddim', num_steps=20, spacing=spacing, eta=eta)
  actual = diffusion.sample(
      jax_eps, plan, jnp.asarray(noise()), KEY if eta else None)
  t = diffusion.ddim_timesteps(1000, 20, spacing)[::-1]
  expected = walk(ddim_step, bars(schedule.betas), t, noise(), eta)
  assert_near(actual, expected)


@pytest.mark.parametrize('variance', ['small', 'large'])
@pytest.mark.parametrize('train_steps, steps, spacing', [
    (40, None, 'uniform'), (1000, 20, 'uniform'), (1000, 10, 'quad')])
def test_ddpm_is_algorithm_2(train_steps, steps, spacing, variance):
  schedule = ddpm_schedule(train_steps)
  plan = diffusion.make_plan(
      schedule, 'ddpm', num_steps=steps, spacing=spacing, variance=variance)
  actual = diffusion.sample(jax_eps, plan, jnp.asarray(noise()), KEY)
  t = diffusion.ddim_timesteps(train_steps, steps or train_steps, spacing)
  expected = walk(
      ddpm_step, bars(schedule.betas), t[::-1], noise(), variance)
  assert_near(actual, expected)


def test_ddim_of_eta_1_is_ddpm():
  """Song et al. 2021, section 4.1: eta 1 on all T is the DDPM."""
  schedule = ddpm_schedule(50)
  ddim = diffusion.ddim_plan(schedule, 50, eta=1.0)
  ddpm = diffusion.ddpm_plan(schedule)
  assert np.array_equal(ddim.timesteps, ddpm.timesteps)
  for field in ('x_coef', 'eps_factor', 'noise_std'):
    np.testing.assert_allclose(
        getattr(ddim, field), getattr(ddpm, field), rtol=1e-9, atol=1e-12)


PLANS = [
    ('ddim', {'num_steps': 20, 'eta': 0.0}),
    ('ddim', {'num_steps': 20, 'eta': 1.0}),
    ('ddim', {'num_steps': 100, 'eta': 0.5, 'spacing': 'quad'}),
    ('ddpm', {'num_steps': 20}),
    ('ddpm', {'num_steps': None, 'variance': 'large'}),
]


@pytest.mark.parametrize('name, options', PLANS)
def test_eps_factor_is_minus_the_derivative_by_the_noise(name, options):
  schedule = ddpm_schedule()
  plan = diffusion.make_plan(schedule, name, **options)
  bar = bars(schedule.betas)
  step, option = (
      (ddim_step, options['eta']) if name == 'ddim'
      else (ddpm_step, options.get('variance', 'small')))
  after = np.append(plan.timesteps[1:], -1)
  at = lambda t, t_next, e: step(bar, t, t_next, 0.3, e, 0.1, option)
  slopes = [(at(t, n, 2.0) - at(t, n, -2.0)) / 4
            for t, n in zip(plan.timesteps, after, strict=True)]
  np.testing.assert_allclose(
      plan.eps_factor, -np.array(slopes), rtol=1e-6, atol=1e-9)
  assert (plan.eps_factor >= 0).all()


@pytest.mark.parametrize('name, options', PLANS)
def test_the_last_step_adds_no_noise(name, options):
  plan = diffusion.make_plan(ddpm_schedule(), name, **options)
  assert plan.timesteps[-1] == 0
  assert plan.noise_std[-1] == 0


def test_another_key_gives_another_sample():
  plan = diffusion.ddpm_plan(ddpm_schedule(), 10)
  x = jnp.asarray(noise())
  a, again, b = (diffusion.sample(jax_eps, plan, x, key)
                 for key in (KEY, KEY, jax.random.key(8)))
  assert np.array_equal(a, again)
  assert not np.allclose(a, b)


def test_trajectory_visits_every_step():
  schedule = ddpm_schedule()
  plan = diffusion.ddim_plan(schedule, 10)
  visit = lambda x, eps, step: {'x': x, 'eps': eps, 't': step['t'],
                                'index': step['index']}
  final, seen = diffusion.trajectory(
      jax_eps, plan, jnp.asarray(noise()), visit=visit)
  assert seen['index'].tolist() == list(range(10))
  assert seen['t'].tolist() == list(range(900, -1, -100))
  assert np.array_equal(seen['x'][0], noise())
  for i, t in enumerate(range(900, -1, -100)):
    assert_near(seen['eps'][i], numpy_eps(np.asarray(seen['x'][i]), t), 1e-5)
  bar = bars(schedule.betas)
  for i, (t, t_next) in enumerate([(900, 800), (800, 700)]):
    x, e = (np.asarray(seen[k][i], np.float64) for k in ('x', 'eps'))
    assert_near(seen['x'][i + 1], ddim_step(bar, t, t_next, x, e, 0, 0), 1e-5)
  assert_near(diffusion.sample(jax_eps, plan, jnp.asarray(noise())), final)


def test_eps_fn_gets_a_batch_of_t_and_the_position():
  plan = diffusion.ddim_plan(ddpm_schedule(), 4)
  calls = []

  def eps_fn(x, t, index):
    assert t.shape == (SHAPE[0],) and t.dtype == jnp.float32
    jax.debug.callback(lambda *a: calls.append(a), t, index, ordered=True)
    return x

  jax.block_until_ready(
      diffusion.sample(eps_fn, plan, jnp.asarray(noise())))
  jax.effects_barrier()
  assert [(t.tolist(), int(i)) for t, i in calls] == [
      ([750] * 2, 0), ([500] * 2, 1), ([250] * 2, 2), ([0] * 2, 3)]


def test_a_sampler_that_adds_noise_needs_a_key():
  plan = diffusion.ddim_plan(ddpm_schedule(), 4, eta=0.5)
  with pytest.raises(ValueError, match='pass a key'):
    diffusion.sample(jax_eps, plan, jnp.asarray(noise()))


@pytest.mark.parametrize('name, options, message', [
    ('euler', {'num_steps': 10}, "sampler 'euler'.*ddim.*ddpm.*plms"),
    ('plms', {'num_steps': 1}, 'num_steps=1: PLMS'),
    ('dpm_solver', {'num_steps': 0}, 'num_steps=0: .*1..999'),
    ('dpm_solver', {'num_steps': 1000}, 'num_steps=1000'),
    ('ddim', {'num_steps': 10, 'convention': 'edm'}, "convention 'edm'"),
    ('ddim', {'num_steps': 1000, 'convention': 'compvis'}, 't = 1000'),
    ('ddim', {'num_steps': 10, 'eta': -0.1}, 'eta=-0.1'),
    ('ddpm', {'num_steps': 10, 'eta': 0.5}, "'ddpm' has no option eta=0.5"),
    ('ddim', {'num_steps': 10, 'variance': 'large'}, "no option variance="),
    ('dpm_solver', {'num_steps': 10, 'speed': 1}, 'no option speed=1'),
    ('ddim', {'num_steps': 10, 'eta': float('nan')}, 'eta=nan'),
    ('ddim', {'num_steps': 0}, 'num_steps=0: .*1..1000'),
    ('ddim', {'num_steps': -5}, 'num_steps=-5'),
    ('ddim', {'num_steps': 1001}, 'num_steps=1001'),
    ('ddim', {'num_steps': 10, 'spacing': 'cubic'}, "spacing 'cubic'"),
    ('ddpm', {'num_steps': 10, 'variance': 'learned'}, "variance 'learned'"),
    ('ddpm', {'num_steps': 100, 'spacing': 'quad'}, 'twice'),
    ('ddpm', {'num_steps': 1001}, 'num_steps=1001'),
    ('ddpm', {'num_steps': 0}, 'num_steps=0'),
])
def test_what_is_no_sampler_is_refused(name, options, message):
  with pytest.raises(ValueError, match=message):
    diffusion.make_plan(ddpm_schedule(), name, **options)


def flow_times(num_steps, shift=3.0):
  """As flow matching spaces them: s t / (1 + (s - 1) t), from 1 to 0."""
  t = np.linspace(1, 0, num_steps + 1)
  return shift * t / (1 + (shift - 1) * t)


def test_real_timesteps_sample_a_flow():
  """Euler's steps x' = x + (t' - t) v(x, t), whole and by the recurrence.

  The velocity turns fast with t, so that a rounded time would be seen.
  """
  times = flow_times(6)
  plan = diffusion.SamplerPlan(
      times[:-1], np.ones(6), times[:-1] - times[1:], np.zeros(6))
  assert plan.timesteps.dtype == np.float64
  velocity = lambda xp, x, t: xp.sin(40 * t) * x + xp.cos(25 * t) + 0.3
  found = diffusion.sample(
      lambda x, t, index: velocity(jnp, x, t[:, None, None, None]), plan,
      jnp.asarray(noise()))
  x = np.float64(noise())
  for t, after in zip(times[:-1], times[1:], strict=True):
    x = x + (after - t) * velocity(np, x, t)
  assert_near(found, x, 1e-5)


@pytest.mark.parametrize('timesteps, kind', [
    ([500, 0], np.int64), (np.array([500, 0], np.int32), np.int64),
    ([0.5, 0.0], np.float64), (np.array([3.5, 1], np.float32), np.float64)])
def test_a_plan_there_and_back_keeps_integers_and_reals(timesteps, kind):
  plan = diffusion.SamplerPlan(
      timesteps, np.array([1 / 3, 1]), np.array([0.1, 0]), np.zeros(2))
  again = diffusion.SamplerPlan.from_dict(
      json.loads(json.dumps(plan.to_dict())))
  for name in ('timesteps', 'x_coef', 'eps_factor', 'noise_std'):
    one, two = getattr(plan, name), getattr(again, name)
    np.testing.assert_array_equal(one, two)
    assert one.dtype == two.dtype
  assert again.timesteps.dtype == kind and again.multistep is None


def test_a_multistep_plan_there_and_back():
  plan = diffusion.plms_plan(ddpm_schedule(), 5)
  again = diffusion.SamplerPlan.from_dict(
      json.loads(json.dumps(plan.to_dict())))
  for name in ('x_part', 'eps_part', 'weights'):
    np.testing.assert_array_equal(
        getattr(plan.multistep, name), getattr(again.multistep, name))


@pytest.mark.parametrize('change, message', [
    ({'timesteps': []}, r'timesteps must be .*\[0\]'),
    ({'timesteps': ['a', 'b']}, 'timesteps must be'),
    ({'timesteps': [[1, 0]]}, r'\[1, 2\]'),
    ({'timesteps': [float('nan'), 0]}, 'NaN'),
    ({'x_coef': np.ones(3)}, r'2 timesteps, and x_coef \[3\]'),
    ({'multistep': plan_lib.Multistep(
        np.ones(2), np.ones(1), np.ones((2, 3)))}, r'and eps_part \[1\]')])
def test_what_is_no_plan(change, message):
  fields = {'timesteps': [1, 0], 'x_coef': np.ones(2),
            'eps_factor': np.ones(2), 'noise_std': np.zeros(2)}
  with pytest.raises(ValueError, match=message):
    diffusion.SamplerPlan(**fields | change)


def test_a_schedule_has_no_values_between_its_steps():
  with pytest.raises(ValueError, match='float32, and must be integers'):
    diffusion.add_noise(ddpm_schedule(), jnp.asarray(noise()),
                        jnp.asarray(noise()), jnp.asarray([1.5, 2.0]))


@pytest.mark.parametrize('shape, message', [
    ((2, 3, 3, 4), 'takes 2 channels and makes 4: it predicts a variance too'),
    ((2, 3, 3, 1), 'takes 2 channels and makes 1: 1 channels are a condition'),
    ((2, 3, 3, 3), 'takes 2 channels and makes 3: a sampler needs'),
    ((2, 3, 1, 2), r'makes \[2, 3, 1, 2\] of \[2, 3, 3, 2\]'),
    ((), r'makes \[\]')])
def test_a_model_whose_output_is_not_the_noise(shape, message):
  """One that broadcasts would sample in silence."""
  plan = diffusion.make_plan(ddpm_schedule(), 'ddim', num_steps=2)
  with pytest.raises(ValueError, match=message):
    diffusion.sample(lambda x, t, index: jnp.zeros(shape), plan, noise())
