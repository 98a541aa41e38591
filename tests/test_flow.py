"""Flow matching: noise levels, Euler's steps, and what training sees.

Against Black Forest Labs' own lines (get_schedule of their sampling.py) written
out in float64, closed forms, and moments of distributions.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from origins import choose
import pytest

from configs import common
from msfp_jax import diffusion
from msfp_jax.diffusion import flow
from msfp_jax.diffusion import training
from msfp_jax.diffusion.origin import Origin
from msfp_jax.tune import losses
from msfp_jax.tune import talora

UNET_FLOW = diffusion.FlowSchedule(1000)
FLUX = Origin('FILE', {'name': 'flow', 'num_train_steps': 1}, 'flow', {
    'flow': {'shift_by_tokens': list(flow.FLUX_SHIFT), 'image_tokens': 1024}})


def get_schedule(num_steps, image_seq_len, shift=True):
  """Black Forest Labs' noise levels, the last of them 0."""
  levels = np.linspace(1, 0, num_steps + 1)
  if not shift:
    return levels
  slope = (1.15 - 0.5) / (4096 - 256)
  mu = slope * image_seq_len + (0.5 - slope * 256)
  with np.errstate(divide='ignore'):
    return np.exp(mu) / (np.exp(mu) + (1 / levels - 1))


def levels_of(plan):
  return np.append(plan.timesteps, 0.0)


@pytest.mark.parametrize('steps', [1, 4, 28])
@pytest.mark.parametrize('tokens', [None, 256, 1024, 4096])
def test_levels_and_factors_are_black_forest_labs(steps, tokens):
  options = {} if tokens is None else {
      'shift_by_tokens': flow.FLUX_SHIFT, 'image_tokens': tokens}
  expected = get_schedule(steps, tokens, shift=tokens is not None)
  plan = diffusion.flow_plan(steps, **options)
  np.testing.assert_allclose(levels_of(plan), expected, rtol=1e-12)
  np.testing.assert_allclose(plan.eps_factor, -np.diff(expected), rtol=1e-9)
  assert (plan.x_coef == 1).all() and not plan.noise_std.any()
  scaled = diffusion.make_plan(UNET_FLOW, 'flow', num_steps=steps, **options)
  np.testing.assert_allclose(scaled.timesteps, 1000 * expected[:-1], rtol=1e-12)
  np.testing.assert_array_equal(scaled.eps_factor, plan.eps_factor)


@pytest.mark.parametrize('a', [0.5, 3.0])
def test_diffusers_shifts_the_least_level_twice(a):
  """Two shifts are one by their product, in odds sigma / (1 - sigma)."""
  odds = lambda sigma: sigma / (1 - sigma)
  levels = diffusion.flow_plan(5, shift=a, spacing='linspace').timesteps
  assert levels[0] == 1
  assert odds(levels[-1]) == pytest.approx(a**2 * odds(1e-3), rel=1e-9)
  single = diffusion.flow_plan(5, shift=a).timesteps
  np.testing.assert_allclose(
      odds(single[1:]), a * odds(np.array([.8, .6, .4, .2])), rtol=1e-9)


def test_levels_are_stretched_to_the_terminal():
  plain = diffusion.flow_plan(6, shift=2.0).timesteps
  levels = diffusion.flow_plan(6, shift=2.0, shift_terminal=0.1).timesteps
  np.testing.assert_allclose(levels[[0, -1]], [1, 0.1], rtol=1e-12)
  ratios = (1 - levels[1:]) / (1 - plain[1:])
  np.testing.assert_allclose(ratios, ratios[0], rtol=1e-12)


def test_a_linear_shift_by_size():
  by_tokens = (2.0, 4.0, 100, 300)
  linear = diffusion.flow_plan(
      4, shift_by_tokens=by_tokens, image_tokens=200, shift_type='linear')
  np.testing.assert_allclose(
      linear.timesteps, diffusion.flow_plan(4, shift=3.0).timesteps, rtol=1e-12)


@pytest.mark.parametrize('steps', [1, 3])
def test_straight_ways_end_at_the_data(steps):
  """Where the velocity is noise - x_0 everywhere, any steps are exact."""
  rng = np.random.default_rng(0)
  data, noise = rng.normal(size=(2, 2, 3, 5, 1)).astype(np.float32)

  def velocity(x, t, index):
    # Off the way that training has, it points elsewhere.
    del index
    level = (t / 1000)[:, None, None, None]
    expected = (1 - level) * data + level * noise
    return noise - data + 100 * (x - expected)

  plan = diffusion.make_plan(UNET_FLOW, 'flow', num_steps=steps, shift=3.0)
  found = diffusion.sample(velocity, plan, jnp.asarray(noise))
  np.testing.assert_allclose(found, data, rtol=0, atol=1e-3)


def test_eulers_method_on_an_equation_with_a_known_solution():
  """x' = c x has x(0) = x(1) prod(1 - c dsigma); timesteps reach the model."""
  plan = diffusion.flow_plan(7, shift=2.0)
  levels = get_schedule(7, 0, shift=False)
  levels = 2 * levels / (1 + levels)
  rate = lambda level: 0.3 + level
  expected = np.prod([1 - rate(a) * (a - b) for a, b in zip(
      levels[:-1], levels[1:], strict=True)])
  found = diffusion.sample(
      lambda x, t, index: rate(t)[:, None, None, None] * x, plan,
      jnp.ones((1, 1, 1, 1)))
  assert float(found[0, 0, 0, 0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('steps, options, message', [
    (0, {}, 'num_steps=0'), (2.5, {}, 'num_steps=2.5'),
    (4, {'shift': 0.0}, 'shift=0.0'), (4, {'shift': np.nan}, 'shift=nan'),
    (4, {'spacing': 'karras'}, "spacing 'karras'.*linspace"),
    (4, {'shift_by_tokens': flow.FLUX_SHIFT}, 'image_tokens=0.*config.sampler'),
    (4, {'shift_by_tokens': (1, 2, 3), 'image_tokens': 4}, 'four numbers'),
    (4, {'shift_by_tokens': (1, 2, 3, 3), 'image_tokens': 4}, 'two sizes'),
    (4, {'shift_by_tokens': (0, 1, 9, 10), 'image_tokens': 4,
         'shift_type': 'linear'}, 'at 4 tokens is -5: must be above 0'),
    (4, {'shift_by_tokens': (0, 1, 9, 10), 'image_tokens': 4,
         'shift_type': 'cubic'}, "shift_type 'cubic'"),
    (4, {'shift_by_tokens': flow.FLUX_SHIFT, 'image_tokens': 4, 'shift': 3.0},
     'shift=3.0 and shift_by_tokens.*one of them'),
    (4, {'shift_terminal': 1.0}, 'shift_terminal=1.0'),
    (1, {'shift_terminal': 0.1}, 'shift_terminal=0.1: one step')])
def test_what_makes_no_levels_is_refused_by_name(steps, options, message):
  with pytest.raises(ValueError, match=message):
    diffusion.flow_plan(steps, **options)


def test_samplers_and_schedules_of_two_kinds():
  ddpm = diffusion.make_schedule('cosine', num_train_steps=10)
  with pytest.raises(ValueError, match="'flow'.*noise schedule.*'ddim' or"):
    diffusion.make_plan(ddpm, 'flow', num_steps=2)
  with pytest.raises(ValueError, match="'ddim'.*flow matching.*'flow'"):
    diffusion.make_plan(UNET_FLOW, 'ddim', num_steps=2)
  with pytest.raises(ValueError, match="'flow' has no option eta=1.0"):
    diffusion.make_plan(UNET_FLOW, 'flow', num_steps=2, eta=1.0)
  with pytest.raises(ValueError, match="'ddim' has no option shift=2.0"):
    diffusion.make_plan(ddpm, 'ddim', num_steps=2, shift=2.0)
  with pytest.raises(ValueError, match='num_train_steps=0.5'):
    diffusion.make_schedule('flow', num_train_steps=0.5)


def test_a_config_names_a_flow_by_its_schedule_alone():
  chosen = choose(Origin(), schedule_name='flow')
  assert chosen.schedule == UNET_FLOW
  assert chosen.sampler_fields['name'] == 'flow'
  assert chosen.plan.timesteps[0] == 1000 and chosen.plan.num_steps == 20
  with pytest.raises(ValueError, match='beta_end=0.1: the flow schedule has'):
    choose(Origin(), schedule_name='flow', schedule_beta_end=0.1)
  with pytest.raises(ValueError, match='config.sampler.name'):
    choose(Origin(), schedule_name='flow', sampler_name='ddim')


def test_typed_shifts_go_before_the_checkpoints():
  """A shift of its own replaces that by the size, and other fields stay."""
  expected = get_schedule(20, 1024)
  np.testing.assert_allclose(levels_of(choose(FLUX).plan), expected, rtol=1e-12)
  np.testing.assert_allclose(
      levels_of(choose(FLUX, sampler_image_tokens=256).plan),
      get_schedule(20, 256), rtol=1e-12)
  typed = choose(FLUX, sampler_shift=1.0)
  np.testing.assert_allclose(
      levels_of(typed.plan), np.linspace(1, 0, 21), rtol=0, atol=1e-12)
  assert typed.sampler_fields['shift_by_tokens'] == ()


def test_models_of_one_kind_are_not_sampled_as_the_other():
  noise = Origin('FILE', {'name': 'cosine', 'num_train_steps': 10})
  with pytest.raises(ValueError, match='FILE predicts the noise.*velocity.*'
                                       'leave config.schedule out'):
    choose(noise, schedule_name='flow')
  with pytest.raises(ValueError, match='FILE predicts the velocity.*the noise'):
    choose(FLUX, schedule_name='linear')
  with pytest.raises(ValueError, match="predicts='v'"):
    dataclasses.replace(FLUX, predicts='v')


def test_the_denoising_factor_is_the_steps_size():
  plan = choose(FLUX).plan
  sizes = -np.diff(get_schedule(20, 1024))
  np.testing.assert_allclose(
      losses.denoising_factors(diffusion.FlowSchedule(), plan, 'sampler'),
      sizes / sizes.mean(), rtol=1e-9)
  for gamma in ('ddpm', 'ddpm_respaced'):
    with pytest.raises(ValueError, match=f"gamma='{gamma}'.*use 'sampler'"):
      losses.denoising_factors(diffusion.FlowSchedule(), plan, gamma)


@pytest.mark.parametrize('steps', [1, 1000])
def test_the_router_tells_real_timesteps_apart(steps):
  """Of sigma from 0 to 1 the upper half has one bank, the lower the other."""
  router = talora.Router(num_layers=1, num_banks=2, num_train_steps=steps,
                         continuous=True)
  t = steps * np.array([0.05, 0.45, 0.55, 0.95])
  params = router.init(jax.random.key(0), t[0])['params']
  assert talora.plan_choices(router, params, t)[:, 0].tolist() == [0, 0, 1, 1]
  # And what is learned sees them as a router of 1000 whole steps does, but for
  # the half step that such a one adds.
  params = jax.tree.map(jnp.ones_like, params)
  whole = talora.Router(num_layers=1, num_banks=2, num_train_steps=1000)
  for sigma in (0.02, 0.5, 0.97):
    np.testing.assert_allclose(
        router.apply({'params': params}, steps * sigma),
        whole.apply({'params': params}, 1000 * sigma), rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize('schedule', [
    diffusion.FlowSchedule(), UNET_FLOW,
    diffusion.make_schedule('cosine', num_train_steps=1000)],
    ids=['sigma', 'flow', 'noise'])
def test_times_have_their_density(schedule):
  draw = lambda **options: np.float64(training.Times(**options).draw(
      jax.random.key(0), schedule, 40_000)) / schedule.num_train_steps
  uniform = draw()
  assert 0 <= uniform.min() and uniform.max() < 1
  np.testing.assert_allclose(np.quantile(uniform, [.1, .5, .9]), [.1, .5, .9],
                             rtol=0, atol=0.01)
  normal = draw(density='logit_normal', mean=0.7, std=0.5)
  odds = np.log(normal / (1 - normal))
  np.testing.assert_allclose([odds.mean(), odds.std()], [.7, .5], atol=0.02)


def test_times_that_there_are_not():
  for options, message in (({'density': 'cosmap'}, 'density=.*logit_normal'),
                           ({'std': 0.0}, 'std=0.0'),
                           ({'mean': np.inf}, 'mean=inf')):
    with pytest.raises(ValueError, match=message):
      training.Times(**options)


def test_the_fields_of_the_config_reach_the_plan():
  config = common.get_config()
  assert {'shift', 'shift_by_tokens', 'shift_type', 'image_tokens',
          'shift_terminal'} <= {*config.sampler}
  chosen = choose(Origin(), schedule_name='flow', sampler_num_steps=4,
                  sampler_shift_by_tokens=(1.0, 2.0, 10, 20),
                  sampler_shift_type='linear', sampler_image_tokens=15,
                  sampler_shift_terminal=0.05)
  assert chosen.plan.to_dict() == diffusion.flow_plan(
      4, shift_by_tokens=(1.0, 2.0, 10, 20), shift_type='linear',
      image_tokens=15, shift_terminal=0.05, schedule=UNET_FLOW).to_dict()
