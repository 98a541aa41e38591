"""Denoising factors and the DFA loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax import diffusion
from msfp_jax.diffusion import ddpm
from msfp_jax.tune import losses

LINEAR = diffusion.make_schedule(
    'linear', num_train_steps=1000, beta_start=1e-4, beta_end=0.02)
LATENT = diffusion.make_schedule(
    'scaled_linear', num_train_steps=1000, beta_start=0.0015, beta_end=0.0195)
PLANS = {
    'uniform': diffusion.ddim_plan(LINEAR, 100),
    'quad': diffusion.ddim_plan(LINEAR, 100, 'quad'),
    'eta': diffusion.ddim_plan(LINEAR, 50, eta=1.0),
    'ddpm': diffusion.ddpm_plan(LINEAR, 50),
}


def bar(t):
  """Computes alphabar_t of LINEAR; 1 before the first step."""
  return np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:t + 1])


@pytest.mark.parametrize('schedule, expected', [
    (LINEAR, {0: .0100, 9: .0064, 49: .0063, 99: .0065, 199: .0070,
              299: .0078, 499: .0105, 699: .0142, 899: .0182, 999: .0202}),
    (LATENT, {0: .0388, 9: .0127, 49: .0067, 99: .0057, 299: .0062,
              499: .0085, 699: .0121, 999: .0197}),
])
def test_ddpm_factors_have_the_known_values(schedule, expected):
  gamma = ddpm.denoising_factors(schedule.alphas, schedule.alphas_cumprod)
  for t, value in expected.items():
    assert gamma[t] == pytest.approx(value, abs=5.1e-5), t


@pytest.mark.parametrize('plan', PLANS.values(), ids=PLANS)
def test_ddpm_gamma_is_the_formula_at_the_visited_timesteps(plan):
  beta = np.linspace(1e-4, 0.02, 1000)
  expected = np.array([
      beta[t] / (np.sqrt(1 - beta[t]) * np.sqrt(1 - bar(t)))
      for t in plan.timesteps])
  np.testing.assert_allclose(
      losses.denoising_factors(LINEAR, plan, 'ddpm'),
      expected / np.mean(expected), rtol=1e-9)


@pytest.mark.parametrize('plan', PLANS.values(), ids=PLANS)
def test_respaced_gamma_takes_alpha_between_visited_timesteps(plan):
  expected = []
  for i, t in enumerate(plan.timesteps):
    last = i + 1 == len(plan.timesteps)
    alpha = bar(t) / (1.0 if last else bar(plan.timesteps[i + 1]))
    expected.append((1 - alpha) / (np.sqrt(alpha) * np.sqrt(1 - bar(t))))
  np.testing.assert_allclose(
      losses.denoising_factors(LINEAR, plan, 'ddpm_respaced'),
      np.array(expected) / np.mean(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('variant, expected', [
    ('sampler', [.17, .63, .55, .64, .92, 1.34, 1.80]),
    ('ddpm_respaced', [.09, .40, .52, .65, .93, 1.35, 1.78]),
])
def test_factors_of_100_uniform_steps_have_the_known_values(
    variant, expected):
  plan = PLANS['uniform']
  gamma = losses.denoising_factors(LINEAR, plan, variant)
  by_timestep = dict(zip(plan.timesteps.tolist(), gamma, strict=True))
  actual = [by_timestep[t] for t in (0, 10, 50, 250, 500, 750, 990)]
  np.testing.assert_allclose(actual, expected, rtol=0, atol=5.1e-3)


@pytest.mark.parametrize('name, eta', [
    ('uniform', 0.0), ('quad', 0.0), ('eta', 1.0)])
def test_sampler_gamma_is_the_factor_of_ddims_step(name, eta):
  plan, expected = PLANS[name], []
  for i, t in enumerate(plan.timesteps):
    last = i + 1 == len(plan.timesteps)
    now, then = bar(t), 1.0 if last else bar(plan.timesteps[i + 1])
    sigma = eta * np.sqrt((1 - then) / (1 - now) * (1 - now / then))
    expected.append(np.sqrt(then / now) * np.sqrt(1 - now)
                    - np.sqrt(1 - then - sigma**2))
  np.testing.assert_allclose(
      losses.denoising_factors(LINEAR, plan, 'sampler'),
      np.array(expected) / np.mean(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('variant', losses.GAMMAS)
@pytest.mark.parametrize('plan', PLANS.values(), ids=PLANS)
def test_gamma_has_mean_1_and_is_not_negative(plan, variant):
  gamma = losses.denoising_factors(LINEAR, plan, variant)
  assert gamma.shape == plan.timesteps.shape and gamma.dtype == np.float64
  assert gamma.mean() == pytest.approx(1, rel=1e-12)
  assert (gamma >= 0).all()


def test_real_timesteps_have_no_factors_of_the_training_schedule():
  plan = diffusion.SamplerPlan(
      np.array([750.5, 0.25]), np.ones(2), np.array([3.0, 1.0]), np.zeros(2))
  for variant in ('ddpm', 'ddpm_respaced'):
    with pytest.raises(ValueError, match=(
        f"such as 750.5.*gamma='{variant}'.*use 'sampler' or 'none'")):
      losses.denoising_factors(LINEAR, plan, variant)
  assert losses.denoising_factors(LINEAR, plan, 'sampler').tolist() == [1.5, .5]
  assert losses.denoising_factors(LINEAR, plan, 'none').tolist() == [1, 1]


def test_none_is_1():
  gamma = losses.denoising_factors(LINEAR, PLANS['quad'], 'none')
  assert gamma.tolist() == [1.0] * 100


def test_unknown_variant():
  with pytest.raises(ValueError, match="gamma 'snr'.*ddpm_respaced"):
    losses.denoising_factors(LINEAR, PLANS['quad'], 'snr')


def test_dfa_loss_is_the_weighted_mean_square():
  rng = np.random.default_rng(0)
  teacher, student = rng.normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
  square = (teacher.astype(np.float64) - student)**2
  expected = 1.7 * square.sum() / square.size
  actual = losses.dfa_loss(
      jnp.float32(1.7), jnp.asarray(teacher), jnp.asarray(student))
  assert actual.shape == ()
  assert float(actual) == pytest.approx(expected, rel=1e-5)


def test_the_direction_term_is_one_minus_the_cosine_of_each_image():
  rng = np.random.default_rng(1)
  teacher, student = rng.normal(size=(2, 3, 4, 4, 2))
  student[0] = 2.5 * teacher[0]  # of the same direction
  flat = lambda x: x.reshape(len(x), -1)
  cosines = np.sum(flat(teacher) * flat(student), 1) / (
      np.linalg.norm(flat(teacher), axis=1)
      * np.linalg.norm(flat(student), axis=1))
  assert cosines[0] == pytest.approx(1) and abs(cosines[1]) < 0.5
  expected = 1.7 * (np.mean((teacher - student)**2)
                    + 0.3 * np.mean(1 - cosines))
  found = losses.dfa_loss(jnp.float32(1.7), jnp.float32(teacher),
                          jnp.float32(student), 0.3)
  assert float(found) == pytest.approx(expected, rel=1e-5)


def test_a_prediction_of_nothing_has_no_direction_and_a_finite_gradient():
  nothing = jnp.zeros((2, 2, 2, 1))
  gradient = jax.grad(lambda eps: losses.dfa_loss(
      1.0, jnp.ones_like(eps), eps, 1.0))(nothing)
  assert np.isfinite(gradient).all() and np.abs(gradient).max() < 10
