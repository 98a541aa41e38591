"""The updates of fine-tuning: the trajectory, the loss, what they move."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import students
import tiny

from msfp_jax.diffusion import sampling
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantizers import Static
from msfp_jax.tune import checkpoint
from msfp_jax.tune import finetune

pytestmark = pytest.mark.gpu


def ddim_step(x, eps, t, t_next):
  """Song et al. 2021, eq. 12 with sigma = 0, float64; t_next < 0 ends."""
  bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
  now, then = bar[t], bar[t_next] if t_next >= 0 else 1.0
  x0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
  return np.sqrt(then) * x0 + np.sqrt(1 - then) * eps


def test_the_teacher_alone_drives_the_trajectory():
  setup = students.net()
  state, seen = setup.start(), []
  for _ in range(9):
    state, scalars = setup.update(state)
    seen.append((float(scalars['t']), np.array(state.position.x)))
  assert [t for t, _ in seen] == [750, 500, 250, 0] * 2 + [750]
  teacher = tiny.teacher(tiny.NET)
  for first in (1, 2, 3, 5, 6, 7):  # not where a trajectory starts
    t, x = int(seen[first][0]), seen[first - 1][1]
    eps = np.float64(teacher(setup.params, x, tiny.t_of(t)))
    expected = ddim_step(np.float64(x), eps, t, t - 250)
    np.testing.assert_allclose(
        seen[first][1], expected, rtol=1e-4,
        atol=1e-4 * np.abs(expected).max())
  # Another student, trained otherwise, sees the same.
  other = students.net(**students.PLAIN_LORA)
  for state, (_, x) in zip(
      (other.run(n)[0] for n in (1, 4, 5)), (seen[0], seen[3], seen[4]),
      strict=True):
    np.testing.assert_array_equal(state.position.x, x)


def test_trajectories_start_anew_from_fresh_noise():
  setup = students.net()
  first = np.array(setup.run(1)[0].position.x)
  # Whatever x was before: it starts from noise.
  other = setup.start().replace(
      position=sampling.Position(tiny.noise(9) * 100))
  np.testing.assert_array_equal(setup.run(1, other)[0].position.x, first)
  fifth = np.array(setup.run(5)[0].position.x)
  assert abs(np.corrcoef(first.ravel(), fifth.ravel())[0, 1]) < 0.3
  assert 0.5 < fifth.std() / first.std() < 2  # of the same distribution


def test_the_scalars_are_the_dfa_loss_of_the_step():
  """gamma_t times the mean squared difference to the teacher, at step 1."""
  setup = students.net()
  first, _ = setup.run(1)
  _, scalars = setup.run(2)
  x = np.array(first.position.x)
  trainable = jax.device_get(first.trainable)
  teacher = tiny.teacher(tiny.NET)(setup.params, x, tiny.t_of(500))
  student, choices = setup.predict(trainable, x, jnp.float32(500))
  mse = np.mean((np.float64(teacher) - np.float64(student))**2)
  assert scalars[1]['t'] == 500
  assert scalars[1]['mse'] == pytest.approx(mse, rel=1e-3)
  assert scalars[1]['loss'] == pytest.approx(mse * students.GAMMA[1], rel=1e-3)
  for bank in (0, 1):
    assert scalars[1][f'bank_{bank}'] == pytest.approx(
        np.mean(np.asarray(choices) == bank))


def test_a_step_of_factor_0_has_finite_scalars():
  """Quadratic spacing visits t = 0 several times, with gamma = 0."""
  _, scalars = students.net(**students.PLAIN_LORA).run(4)
  assert scalars[3]['t'] == 0 and scalars[3]['loss'] == 0
  assert all(np.isfinite(value) for value in scalars[3].values())


def test_gradients_reach_everything_trained():
  _, scalars = students.net().run(3)
  for part in ('banks', 'ranges', 'biases'):
    assert scalars[0][f'l2_grads_{part}'] > 0
  # An update without effect (b = 0) has no preference among banks yet.
  assert scalars[0]['l2_grads_router'] == 0
  assert scalars[2]['l2_grads_router'] > 0
  before = jax.device_get(students.net().start().trainable)
  changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before,
                         students.trained())
  unmoved = [path for path, moved
             in jax.tree_util.tree_leaves_with_path(changed) if not moved]
  assert not unmoved


def test_one_update_changes_the_chosen_bank_alone():
  """The first update, at t = 750, changes the second of two banks alone."""
  setup = students.net()
  before = jax.device_get(setup.start().trainable['banks'])
  state, scalars = setup.run(1)
  assert scalars[0]['bank_1'] == 1
  for name, bank in jax.device_get(state.trainable['banks']).items():
    for part in 'ab':
      np.testing.assert_array_equal(bank[part][0], before[name][part][0])
    assert (bank['b'][1] != before[name]['b'][1]).any()


def test_the_teacher_stays():
  setup = students.net()
  before = jax.device_get(setup.params)
  setup.run(2)
  tiny.assert_trees_equal(jax.device_get(setup.params), before)
  tiny.assert_trees_equal(jax.device_get(setup.student.params), before)


@pytest.mark.slow
def test_the_same_key_gives_the_same_run_and_another_another():
  setup = students.net()
  one, two = (jax.device_get(setup.run(5)[0]) for _ in range(2))
  tiny.assert_trees_equal(one, two)
  other = students.net(**students.DEQUANTIZED).run(1)[0]
  x, of_other = (np.asarray(state.position.x)
                 for state in (setup.run(1)[0], other))
  assert (of_other != x).all()


@pytest.mark.slow
def test_saved_and_restored_it_goes_on_identically(tmp_path):
  setup = students.net()
  straight = jax.device_get(setup.run(7)[0])
  with checkpoint.Checkpointer(tmp_path) as saver:
    saver.save(3, setup.run(3)[0])
  with checkpoint.Checkpointer(tmp_path) as saver:
    state = saver.restore(setup.start())
  assert int(state.step) == 3
  tiny.assert_trees_equal(jax.device_get(setup.run(4, state)[0]), straight)


def loss_by_trajectory(setup, updates):
  """The mean loss of each trajectory, which has 4 steps."""
  _, scalars = setup.run(updates)
  return np.array([s['loss'] for s in scalars]).reshape(-1, 4).mean(axis=1)


def test_the_loss_falls():
  """The loss falls, if little: a net this small owes most to activations."""
  loss = loss_by_trajectory(students.net(), 200)
  assert loss[-10:].mean() < 0.93 * loss[:10].mean()


BY_STEP = (0.2, 0.3, 0.5, 0.9)  # scales of the input at the 4 steps


def by_step_spec():
  """The calibrated spec, with an input whose scale differs by step."""
  spec = tiny.spec(tiny.NET)
  act = Static(FPFormat.parse('E2M1'), jnp.asarray(BY_STEP), by_step=True)
  return dataclasses.replace(spec, layers=spec.layers | {
      'conv_in': dataclasses.replace(spec.layers['conv_in'], act=act)})


@pytest.mark.slow
def test_steps_are_trained_each_with_its_own_scale():
  """The update of a step moves that step's scale, and predicts with it."""
  settings = students.settings_of(num_updates=100)
  student = finetune.make_student(
      tiny.NET, tiny.params(tiny.NET), by_step_spec(), 1000, settings)
  tx = finetune.optimizer(settings)
  state = finetune.init_state(
      student, tx, tiny.PLAN, tiny.IMAGE, jax.random.key(4), settings)
  update = finetune.make_step(
      student, tiny.PLAN, np.array(students.GAMMA), tx, jax.random.key(4))
  assert not np.any(state.trainable['ranges']['act']['conv_in']['log_scale'])
  for index in (0, 1):
    state, _ = update(state)
    moved = jax.device_get(
        state.trainable['ranges']['act']['conv_in']['log_scale'])
    assert moved.shape == (4,)
    np.testing.assert_array_equal(moved != 0, np.arange(4) <= index)
  trainable = jax.device_get(state.trainable)
  deployed = packed_lib.deploy(student, trainable, tiny.PLAN)
  np.testing.assert_allclose(
      deployed.layers['conv_in'].input.scale,
      BY_STEP * np.exp(np.float64(moved)), rtol=1e-5)
  x, eps_fn = tiny.noise(7), jax.jit(deployed.eps_fn)
  predict = jax.jit(student.predict)
  for index, t in enumerate(tiny.PLAN.timesteps):
    expected, _ = predict(trainable, x, jnp.float32(t), step=index)
    np.testing.assert_allclose(
        eps_fn(x, tiny.t_of(t), index), expected, rtol=1e-5, atol=1e-5)
