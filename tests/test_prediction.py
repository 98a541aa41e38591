"""Models of v and of x_0 as models of the noise."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from msfp_jax.models import registry
from msfp_jax.models.guided import Guided
from msfp_jax.models.prediction import AsNoise

STABLE_DIFFUSION = {'name': 'scaled_linear', 'num_train_steps': 1000,
                    'beta_start': 0.00085, 'beta_end': 0.012}


class Given(nn.Module):
  """A model that predicts what it was given."""

  value: jax.Array

  def __call__(self, x, t):
    return self.value


@pytest.mark.parametrize('predicts', ['v', 'x0'])
def test_a_model_of_v_or_x0_becomes_one_of_the_noise(predicts):
  """With x_t = a x_0 + s eps, what it predicts leads back to eps."""
  bar = (0.9, 0.5, 0.01)
  rng = np.random.default_rng(0)
  x0, eps = rng.standard_normal((2, 3, 2, 2, 1))
  t = np.array([0, 1, 2])
  a, s = (np.sqrt(b)[:, None, None, None]
          for b in (np.array(bar), 1 - np.array(bar)))
  target = a * eps - s * x0 if predicts == 'v' else x0
  model = AsNoise(Given(jnp.asarray(target, jnp.float32)), predicts, bar)
  found = model.apply({}, jnp.asarray(a * x0 + s * eps, jnp.float32),
                      jnp.asarray(t, jnp.float32))
  np.testing.assert_allclose(found, eps, atol=2e-5)


def test_a_table_of_alphabar_is_one():
  for predicts, bar in (('eps', (0.5,)), ('v', ()), ('v', (1.0,)),
                        ('v', (0.5, float('nan')))):
    with pytest.raises(ValueError, match='predicts=|alphas_cumprod'):
      AsNoise(tiny.UNET, predicts, bar)


def test_files_know_models_of_v_also_with_guidance():
  model = Guided(AsNoise(tiny.UNET, 'v', (0.9, 0.25)), 2.0, 3)
  row = json.loads(json.dumps(registry.to_dict(model)))
  assert registry.from_dict(row) == model
  assert registry.from_dict(registry.to_dict(model.inner)) == model.inner
  with pytest.raises(TypeError, match="'speed'"):
    registry.from_dict(row | {'speed': 1})


@pytest.mark.parametrize('predicts', ['v', 'x0'])
def test_between_two_steps_the_schedule_is_on_a_line(predicts):
  """Real timesteps get their own noise level; outside of it all is NaN."""
  bar = np.array([0.9, 0.5, 0.1])
  given = np.random.default_rng(0).normal(size=(5, 2, 2, 1)).astype(np.float32)
  x = jnp.ones((5, 2, 2, 1))
  t = jnp.asarray([0.25, 1.5, 2.0, -0.5, 2.5])
  found = AsNoise(Given(jnp.asarray(given)), predicts, tuple(bar)).apply(
      {}, x, t)
  level = np.array([0.8, 0.3, 0.1])[:, None, None, None]
  signal, sigma = np.sqrt(level), np.sqrt(1 - level)
  expected = (signal * given[:3] + sigma if predicts == 'v'
              else (1 - signal * given[:3]) / sigma)
  np.testing.assert_allclose(found[:3], expected, rtol=1e-5, atol=1e-6)
  assert np.isnan(found[3:]).all()


def test_a_model_of_v_with_guidance_is_computed():
  """By the formula, and with the parameters under their own names."""
  class Labelled(nn.Module):
    conditions = ()

    @nn.compact
    def __call__(self, x, t, labels):
      scale = self.param('scale', nn.initializers.ones, ())
      return scale * x + labels[:, None, None, None].astype(x.dtype)

  bar = (0.9, 0.25)
  model = Guided(AsNoise(Labelled(), 'v', bar), 3.0, 5)
  x, t = jnp.full((1, 2, 2, 1), 0.5), jnp.array([1.0])
  found = model.apply({'params': {'scale': jnp.float32(2)}}, x, t,
                      jnp.array([1]))
  predict = lambda label: 0.5 * (2 * 0.5 + label) + np.sqrt(0.75) * 0.5
  np.testing.assert_allclose(
      found, predict(5) + 3 * (predict(1) - predict(5)), rtol=1e-5)
