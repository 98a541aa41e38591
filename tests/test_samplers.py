"""CompVis' DDIM, PLMS and DPM-Solver++, against their recurrences.

The recurrences are written step by step in float64, as the original codes
have them.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax import diffusion
from msfp_jax.diffusion import sampling

pytestmark = pytest.mark.gpu

SCHEDULE = diffusion.make_schedule(
    'scaled_linear', num_train_steps=1000, beta_start=0.0015, beta_end=0.0195)
BAR = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000)**2)
NOISE = np.random.default_rng(0).normal(size=(2, 3, 3, 2)).astype(np.float32)


def eps_of(xp, x, t):
  phase = xp.arange(x.size).reshape(x.shape) / 7
  level = t / 1000.0
  return (xp.sqrt(level + 1e-3) * x + 0.2 * xp.sin(2 * x + phase)
          + 0.05 * xp.cos(11 * level))


def jax_eps(x, t, index):
  del index
  return eps_of(jnp, x, t[0])


def sampled(plan, eps_fn=jax_eps):
  return diffusion.sample(eps_fn, plan, jnp.asarray(NOISE))


def assert_near(actual, desired):
  np.testing.assert_allclose(
      actual, desired, rtol=0, atol=1e-4 * np.abs(desired).max())


class CompVis:
  """Steps as DDIMSampler and PLMSSampler of latent diffusion do, eta = 0."""

  def __init__(self, steps, spacing='uniform'):
    if spacing == 'uniform':
      t = np.asarray(list(range(0, 1000, 1000 // steps)))
    else:
      t = (np.linspace(0, np.sqrt(1000 * .8), steps)**2).astype(int)
    self.t = t + 1
    self.alphas = BAR[self.t]
    self.alphas_prev = np.asarray([BAR[0]] + BAR[self.t[:-1]].tolist())

  def previous(self, x, e, index):
    a, a_prev = self.alphas[index], self.alphas_prev[index]
    x0 = (x - np.sqrt(1 - a) * e) / np.sqrt(a)
    return np.sqrt(a_prev) * x0 + np.sqrt(1 - a_prev) * e

  def ddim(self, x):
    for index in reversed(range(len(self.t))):
      x = self.previous(x, eps_of(np, x, self.t[index]), index)
    return x

  def plms(self, x):
    times, old = self.t[::-1], []
    for i, step in enumerate(times):
      index = len(times) - i - 1
      after = times[min(i + 1, len(times) - 1)]
      e = eps_of(np, x, step)
      if len(old) == 0:
        x_prev = self.previous(x, e, index)
        e_prime = (e + eps_of(np, x_prev, after)) / 2
      elif len(old) == 1:
        e_prime = (3 * e - old[-1]) / 2
      elif len(old) == 2:
        e_prime = (23 * e - 16 * old[-1] + 5 * old[-2]) / 12
      else:
        e_prime = (55 * e - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
      x = self.previous(x, e_prime, index)
      old = [*old[-2:], e]
    return x


@pytest.mark.parametrize('steps, spacing', [
    (1, 'uniform'), (20, 'uniform'), (30, 'uniform'), (20, 'quad')])
def test_ddim_is_compvis(steps, spacing):
  plan = diffusion.make_plan(SCHEDULE, 'ddim', num_steps=steps,
                             spacing=spacing, convention='compvis')
  assert_near(sampled(plan), CompVis(steps, spacing).ddim(np.float64(NOISE)))


@pytest.mark.parametrize('steps', [2, 4, 5, 6, 8, 20, 50])
def test_plms_is_compvis(steps):
  plan = diffusion.make_plan(SCHEDULE, 'plms', num_steps=steps)
  # 1,000 is no multiple of 6: the original makes 7 steps then.
  assert plan.num_steps == len(CompVis(steps).t) + 1
  assert_near(sampled(plan), CompVis(steps).plms(np.float64(NOISE)))


def dpm_solver(x, steps):
  """Steps by the terms of the authors' multistep_dpm_solver_second_update."""
  times = np.linspace(0, 999, steps + 1).round().astype(int)[1:][::-1]
  alpha, sigma = np.sqrt(BAR[times]), np.sqrt(1 - BAR[times])
  lam = np.log(alpha) - np.log(sigma)
  models = []
  for i, t in enumerate(times):
    models.append((x - sigma[i] * eps_of(np, x, t)) / alpha[i])
    if i + 1 == len(times):
      return models[-1]  # sigma = 0: the prediction itself
    h = lam[i + 1] - lam[i]
    phi = np.expm1(-h)
    x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * phi * models[-1]
    if i:
      r0 = (lam[i] - lam[i - 1]) / h
      d1 = (models[-1] - models[-2]) / r0
      x = x - 0.5 * alpha[i + 1] * phi * d1
  return x


@pytest.mark.parametrize('steps', [1, 2, 3, 10, 20, 50])
def test_dpm_solver_is_its_algorithm(steps):
  plan = diffusion.make_plan(SCHEDULE, 'dpm_solver', num_steps=steps)
  assert plan.num_steps == steps
  assert_near(sampled(plan), dpm_solver(np.float64(NOISE), steps))


@pytest.mark.parametrize('name', ['plms', 'dpm_solver'])
def test_the_denoising_factor_is_minus_the_derivative(name):
  """gamma_t is what a step subtracts of the noise that it just predicted."""
  plan = diffusion.make_plan(SCHEDULE, name, num_steps=7)
  assert (plan.eps_factor >= 0).all()
  position = sampling.start(plan, jnp.asarray(NOISE))
  for i in range(plan.num_steps):
    step = jax.tree.map(lambda a, i=i: a[i], plan.steps())
    change = lambda size, step=step, position=position: sampling.advance(
        plan, step, position, jnp.full(NOISE.shape, size), None).x
    slope = (change(1.0) - change(0.0)).mean()
    np.testing.assert_allclose(slope, -plan.eps_factor[i], rtol=1e-3)
    eps = jax_eps(position.x, jnp.full(2, step['t']), i)
    position = sampling.advance(plan, step, position, eps, None)


def test_a_trajectory_can_be_walked_step_by_step():
  """Single steps, as in fine-tuning, are those of a whole trajectory."""
  for name in ('ddim', 'plms', 'dpm_solver'):
    plan = diffusion.make_plan(SCHEDULE, name, num_steps=6)
    position = sampling.start(plan, jnp.asarray(NOISE))
    for i in range(plan.num_steps):
      step = jax.tree.map(lambda a, i=i: a[i], plan.steps())
      eps = jax_eps(position.x, jnp.full(2, step['t']), i)
      position = sampling.advance(plan, step, position, eps, None)
    assert_near(position.x, np.asarray(sampled(plan)))


# By hand: 10 steps of 1000, and 7, which do not divide it.
@pytest.mark.parametrize('spacing, steps, expected', [
    ('leading', 10, range(0, 1000, 100)),
    ('leading', 7, range(0, 994, 142)),
    ('trailing', 10, range(99, 1000, 100)),
    ('trailing', 7, [142, 285, 428, 570, 713, 856, 999]),
    ('linspace', 10, [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]),
    ('linspace', 7, [0, 166, 333, 500, 666, 832, 999])])
def test_spacings_of_diffusers(spacing, steps, expected):
  found = diffusion.ddim_timesteps(1000, steps, spacing)
  assert found.tolist() == list(expected)
  # An offset moves what begins at 0 alone.
  moved = diffusion.ddim_timesteps(1000, steps, spacing, offset=3)
  assert (moved - found == (3 if spacing == 'leading' else 0)).all()


@pytest.mark.parametrize('spacing, expected', [
    ('leading', [90 * i + 2 for i in range(10, 0, -1)]),
    ('trailing', range(999, 0, -100)),
    ('linspace', [999, 899, 799, 699, 599, 500, 400, 300, 200, 100])])
def test_spacings_of_dpm_solver(spacing, expected):
  offset = 2 if spacing == 'leading' else 0
  plan = diffusion.make_plan(SCHEDULE, 'dpm_solver', num_steps=10,
                             spacing=spacing, offset=offset)
  assert plan.timesteps.tolist() == list(expected)


def clipped(name, spacing, steps, limit):
  """Steps as diffusers' DDIM and DDPM do by their defaults, without noise."""
  times = diffusion.ddim_timesteps(1000, steps, spacing)[::-1]
  x = np.float64(NOISE)
  for i, t in enumerate(times):
    # DDIM's steps go back by T // S, DDPM's to what is visited next.
    before = (t - 1000 // steps if name == 'ddim'
              else times[i + 1] if i + 1 < steps else -1)
    a, a_prev = BAR[t], BAR[before] if before >= 0 else 1.0
    e = eps_of(np, x, t)
    x0 = np.clip((x - np.sqrt(1 - a) * e) / np.sqrt(a), -limit, limit)
    if name == 'ddim':
      x = np.sqrt(a_prev) * x0 + np.sqrt(1 - a_prev) * e
    else:
      alpha = a / a_prev
      x = (np.sqrt(a_prev) * (1 - alpha) / (1 - a) * x0
           + np.sqrt(alpha) * (1 - a_prev) / (1 - a) * x)
  return x


@pytest.mark.parametrize('name', ['ddim', 'ddpm'])
@pytest.mark.parametrize('spacing, steps, limit', [
    ('leading', 20, 1.0), ('trailing', 7, 0.5), ('linspace', 12, 2.0)])
def test_x0_is_clipped_as_diffusers_does(name, spacing, steps, limit):
  plan = diffusion.make_plan(SCHEDULE, name, num_steps=steps, spacing=spacing,
                             clip=limit)
  plan = diffusion.SamplerPlan.from_dict(json.loads(json.dumps(
      plan.to_dict() | {'noise_std': [0.0] * steps})))
  expected = clipped(name, spacing, steps, limit)
  assert_near(sampled(plan), expected)
  without = diffusion.make_plan(SCHEDULE, name, num_steps=steps,
                                spacing=spacing)
  np.testing.assert_array_equal(without.eps_factor, plan.eps_factor)
  assert without.clip is None
  # It matters here: far from what no clipping gives.
  assert np.abs(expected - clipped(name, spacing, steps, 1e9)).max() > 0.1


def test_what_cannot_be_clipped_or_spaced():
  for clip in (-1.0, np.nan, np.inf):
    with pytest.raises(ValueError, match='clip='):
      diffusion.make_plan(SCHEDULE, 'ddim', num_steps=5, clip=clip)
  with pytest.raises(ValueError, match="'plms' has no option clip=1.0"):
    diffusion.make_plan(SCHEDULE, 'plms', num_steps=5, clip=1.0)
  for name in ('ddim', 'dpm_solver'):
    with pytest.raises(ValueError, match='spacing.*trailing'):
      diffusion.make_plan(SCHEDULE, name, num_steps=5, spacing='even')
  for offset in (-1, 995):
    with pytest.raises(ValueError, match=f'offset.*{offset}'):
      diffusion.make_plan(SCHEDULE, 'ddim', num_steps=5, offset=offset)
  plan = diffusion.make_plan(SCHEDULE, 'ddim', num_steps=5, clip=1.0)
  with pytest.raises(ValueError, match='unequal lengths.*clip.gain'):
    diffusion.SamplerPlan.from_dict(plan.to_dict() | {
        'clip': plan.to_dict()['clip'] | {'gain': [1.0]}})


@pytest.mark.parametrize('spacing, steps', [('trailing', 7), ('linspace', 10)])
def test_plms_needs_steps_of_one_length(spacing, steps):
  assert diffusion.make_plan(
      SCHEDULE, 'plms', num_steps=20, spacing='trailing').num_steps == 21
  with pytest.raises(ValueError, match='as PLMS wants them'):
    diffusion.make_plan(SCHEDULE, 'plms', num_steps=steps, spacing=spacing)


def test_the_last_step_of_ddpm_adds_noise_above_t_0():
  """As in diffusers, where large variance does so and small has none left."""
  plans = {variance: diffusion.make_plan(
      SCHEDULE, 'ddpm', num_steps=10, spacing='trailing', variance=variance)
           for variance in ('small', 'large')}
  assert plans['small'].noise_std[-1] == 0
  np.testing.assert_allclose(
      plans['large'].noise_std[-1], np.sqrt(1 - BAR[99]), rtol=1e-9)


def test_trailing_steps_never_pass_the_end():
  """Rounding errors of arange leave one more with 61 of 1000, and others."""
  for number in range(1, 1000):
    found = diffusion.ddim_timesteps(1000, number, 'trailing')
    assert len(found) == number and found[0] >= 0, number
