"""Distances of teacher and student at every step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msfp_jax import diffusion
from msfp_jax.report import gap

SCHEDULE = diffusion.make_schedule(
    'linear', num_train_steps=1000, beta_start=1e-4, beta_end=0.02)
X = jax.random.normal(jax.random.key(3), (2, 4, 4, 1))


def teacher(x, t, index):
  return 0.9 * x + 0.1 * jnp.sin(t / 300)[:, None, None, None]


def student(x, t, index):
  return jnp.round(teacher(x, t, index) * 4) / 4 + 0.01 * index


@pytest.mark.parametrize('eta', [0.0, 1.0])
def test_each_step_by_numpy(eta):
  """Noise is added to both, and so cancels in what a step differs by."""
  plan = diffusion.ddim_plan(SCHEDULE, 5, eta=eta)
  key = jax.random.key(0)
  found = gap.along_trajectory(teacher, student, plan, X, key)
  # The samples of the trajectory, from the sampler itself.
  visited = diffusion.trajectory(
      teacher, plan, X, key, lambda x, eps, step: x)[1]
  for i, t in enumerate(plan.timesteps):
    x, times = visited[i], jnp.full((2,), float(t))
    difference = np.asarray(
        teacher(x, times, i) - student(x, times, i), np.float64)
    assert found.eps[i] == pytest.approx(np.mean(difference**2), rel=1e-4)
    assert found.step[i] == pytest.approx(
        plan.eps_factor[i]**2 * np.mean(difference**2), rel=1e-3)


def test_a_multistep_sampler_counts_what_falls_on_the_present_prediction():
  plan = diffusion.plms_plan(SCHEDULE, 5)
  found = gap.along_trajectory(teacher, student, plan, X)
  assert plan.multistep is not None
  np.testing.assert_allclose(
      found.step, plan.eps_factor**2 * found.eps, rtol=1e-3)


def test_a_model_has_no_gap_to_itself():
  plan = diffusion.ddim_plan(SCHEDULE, 4)
  found = gap.along_trajectory(teacher, teacher, plan, X)
  assert not found.eps.any() and not found.step.any()
