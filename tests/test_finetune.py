"""Fine-tuning's optimizer, and the randomness of its trajectories.

test_finetune_updates.py has what an update does to a student.
"""

import dataclasses
import functools
import types

from adamw_oracle import adamw
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from msfp_jax import diffusion
from msfp_jax.diffusion import conditions
from msfp_jax.diffusion import sampling
from msfp_jax.tune import average
from msfp_jax.tune import finetune
from msfp_jax.tune import trajectories as trajectories_lib

pytestmark = pytest.mark.gpu

UPDATES = 8
RATES = {'banks': 0.3, 'router': 0.05, 'ranges': 0.007, 'biases': 0.007}
SETTINGS = dataclasses.replace(
    finetune.FinetuneSettings(**common.get_config().finetune),
    num_updates=UPDATES, learning_rate=RATES['banks'],
    router_learning_rate=RATES['router'],
    range_learning_rate=RATES['ranges'], adam_b2=0.9, weight_decay=0.1)


@pytest.mark.parametrize('part', RATES)
def test_each_part_has_its_rate_which_falls_to_zero_linearly(part):
  rng = np.random.default_rng(0)
  start = rng.standard_normal(3)
  gradients = rng.standard_normal((UPDATES, 3))
  tx = finetune.optimizer(SETTINGS)
  params = {name: {'a': jnp.float32(start)} for name in RATES}
  state, seen = tx.init(params), []
  for gradient in gradients:
    updates, state = tx.update(
        {name: {'a': jnp.float32(gradient)} for name in RATES}, state, params)
    params = optax.apply_updates(params, updates)
    seen.append(params[part]['a'])
  rates = [RATES[part] * (1 - i / UPDATES) for i in range(UPDATES)]
  expected = adamw(start, gradients, rates, b2=0.9, weight_decay=0.1)
  np.testing.assert_allclose(seen, expected, rtol=1e-5, atol=1e-5)
  updates, _ = tx.update(
      {name: {'a': jnp.ones(3)} for name in RATES}, state, params)
  assert not np.any(updates[part]['a'])  # the rate of an update too many


@pytest.mark.parametrize('decay', [0.0, 0.6])
def test_what_is_kept_is_the_average_of_what_updates_leave(decay):
  """With early ones forgotten: after n of them by (1 + n) / (10 + n)."""
  rng = np.random.default_rng(0)
  gradients = rng.standard_normal((UPDATES, 3))
  tx = finetune.optimizer(dataclasses.replace(SETTINGS, ema_decay=decay))
  plain = finetune.optimizer(SETTINGS)
  params = same = {name: {'a': jnp.ones(3)} for name in RATES}
  state, plain_state = tx.init(params), plain.init(same)
  expected = np.ones(3)
  for n, gradient in enumerate(gradients):
    given = {name: {'a': jnp.float32(gradient)} for name in RATES}
    updates, state = tx.update(given, state, params)
    params = optax.apply_updates(params, updates)
    updates, plain_state = plain.update(given, plain_state, same)
    same = optax.apply_updates(same, updates)
    share = 1 - min(decay, (1 + n) / (10 + n))
    expected = expected + share * (np.float64(same['banks']['a']) - expected)
  jax.tree.map(np.testing.assert_array_equal, params, same)
  kept = average.of(params, state)['banks']['a']
  if not decay:
    expected = params['banks']['a']
  np.testing.assert_allclose(kept, expected, rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Linear:
  """A student whose prediction is a multiple of x, plus labels and index."""

  params: float
  router = None
  # The teacher predicts x / 2, plus the labels.
  model = types.SimpleNamespace(
      apply=lambda variables, x, t, *labels: variables['params'] * x + sum(
          label[:, None] for label in labels))

  arrays = property(lambda self: (self.params, {}))

  def with_arrays(self, arrays):
    return dataclasses.replace(self, params=arrays[0])

  def teach(self, x, t, *labels):
    return self.model.apply({'params': self.params}, x, t, *labels)

  def predict_next(self, trainable, x, t, *labels, step, memory, fresh):
    del fresh
    prediction = self.model.apply({'params': trainable['a']}, x, t, *labels)
    return prediction + step, None, memory


SCHEDULE = diffusion.make_schedule(
    'linear', num_train_steps=1000, beta_start=1e-4, beta_end=0.02)
PLAN = diffusion.ddim_plan(SCHEDULE, 4, eta=1.0)  # adds noise
STEPS = PLAN.num_steps
KEY = jax.random.key(7)


def follow(updates, draw=conditions.none):
  """The teacher's x after each update `[updates, 4, 2]`, and the losses."""
  tx = optax.sgd(0.0)
  step = finetune.make_step(Linear(jnp.float32(0.5)), PLAN, np.ones(STEPS), tx,
                            KEY, draw)
  trainable = {'a': jnp.float32(0.0)}
  state = finetune.FinetuneState(
      step=jnp.zeros((), jnp.int32), trainable=trainable,
      opt_state=tx.init(trainable),
      position=diffusion.sampling.start(PLAN, jnp.full((4, 2), 99.0)))
  seen, losses = [], []
  for _ in range(updates):
    state, scalars = step(state)
    seen.append(np.array(state.position.x))
    losses.append(float(scalars['loss']))
  return np.array(seen), np.array(losses)


def draws(trajectory):
  """The noise that trajectory number `trajectory` starts from and adds.

  Of its key, 0 folds to the start's and 1 to the steps', which fold their
  index.
  """
  key = jax.random.fold_in(KEY, trajectory)
  normal = lambda key: np.float64(jax.random.normal(key, (4, 2)))
  steps = jax.random.fold_in(key, 1)
  return normal(jax.random.fold_in(key, 0)), [
      normal(jax.random.fold_in(steps, i)) for i in range(STEPS)]


def test_trajectories_start_and_go_on_with_noise_of_their_own():
  seen, _ = follow(2 * STEPS + 1)
  everything = []
  for trajectory in range(3):
    x, noises = draws(trajectory)
    everything += [x, *noises]
    for i, z in enumerate(noises):
      if STEPS * trajectory + i == len(seen):
        break
      x = (PLAN.x_coef[i] * x - PLAN.eps_factor[i] * 0.5 * x
           + PLAN.noise_std[i] * z)
      np.testing.assert_allclose(
          seen[STEPS * trajectory + i], x, rtol=1e-5, atol=1e-5)
  # No two of the draws are the same.
  flat = np.array(everything).reshape(len(everything), -1)
  apart = np.abs(flat[:, None] - flat).max(-1) + np.eye(len(flat))
  assert apart.min() > 0.1


def by_hand(i, z, x, eps):
  """The sampler's step i with noise z."""
  return (PLAN.x_coef[i] * x - PLAN.eps_factor[i] * eps
          + PLAN.noise_std[i] * z)


@pytest.mark.parametrize('steer', [0.0, 0.25, 0.9])
def test_the_students_own_trajectory_is_led_back_to_the_teachers(steer):
  """By hand, in float64: positions of both, and what the student should say."""
  settings = dataclasses.replace(
      SETTINGS, driver='student', steer=steer, batch_size=4)
  tx = optax.sgd(0.0)
  step = finetune.make_step(
      Linear(jnp.float32(0.5)), PLAN, np.ones(STEPS), tx, KEY,
      trajectories=trajectories_lib.Trajectories(PLAN, 'student', steer))
  student = types.SimpleNamespace(
      init=lambda *unused: {'a': jnp.float32(0.4)}, memory=lambda x: None)
  state = finetune.init_state(student, tx, PLAN, (2,), KEY, settings)
  mean_square = np.mean(PLAN.eps_factor**2)
  for trajectory in range(2):
    own, noises = draws(trajectory)
    teachers = own
    for i, z in enumerate(noises):
      go = functools.partial(by_hand, i, z)
      predicted, target = 0.4 * own + i, 0.5 * own
      if steer:
        # Such that, of all corrections c, (apart - f c)^2 + weight c^2 is the
        # least: by its derivative, and a share of `steer` at the average.
        f, weight = PLAN.eps_factor[i], (1 / steer - 1) * mean_square
        apart = go(own, 0.5 * own) - go(teachers, 0.5 * teachers)
        target = target + f * apart / (f**2 + weight)
      state, scalars = step(state)
      assert float(scalars['loss']) == pytest.approx(
          np.mean((target - predicted)**2), rel=1e-4)
      assert float(scalars['mse']) == pytest.approx(
          np.mean((0.5 * own - predicted)**2), rel=1e-4)
      own, teachers = go(own, predicted), go(teachers, 0.5 * teachers)
      for found, expected in ((state.position.student, own),
                              (state.position.teacher, teachers)):
        np.testing.assert_allclose(found.x, expected, rtol=1e-4, atol=1e-4)


def test_in_windows_the_student_begins_anew_at_the_teachers():
  """Of two steps, in a trajectory of an odd number; and in the next one."""
  settings = dataclasses.replace(
      SETTINGS, driver='student', window_steps=2, batch_size=4)
  tx = optax.sgd(0.0)
  step = finetune.make_step(
      Linear(jnp.float32(0.5)), PLAN, np.ones(STEPS), tx, KEY,
      trajectories=trajectories_lib.Trajectories(
          PLAN, 'student', window_steps=2))
  student = types.SimpleNamespace(
      init=lambda *unused: {'a': jnp.float32(0.4)}, memory=lambda x: None)
  state = finetune.init_state(student, tx, PLAN, (2,), KEY, settings)
  for trajectory in range(2):
    own, noises = draws(trajectory)
    teachers = own
    for i, z in enumerate(noises):
      state, _ = step(state)
      own = by_hand(i, z, own, 0.4 * own + i)
      teachers = by_hand(i, z, teachers, 0.5 * teachers)
      assert np.abs(own - teachers).max() > 0.1
      own = teachers if i % 2 else own
      np.testing.assert_allclose(
          state.position.student.x, own, rtol=1e-4, atol=1e-4)
      np.testing.assert_allclose(
          state.position.teacher.x, teachers, rtol=1e-4, atol=1e-4)
  with pytest.raises(ValueError, match="finetune.window_steps=2.*'teacher'"):
    dataclasses.replace(SETTINGS, window_steps=2)


@pytest.mark.parametrize('number', [1, STEPS, STEPS + 1])
def test_windows_that_change_nothing_are_refused(number):
  with pytest.raises(ValueError, match=f'window_steps={number}: must be'):
    trajectories_lib.Trajectories(PLAN, 'student', window_steps=number)


@pytest.mark.parametrize('plan', [
    diffusion.ddim_plan(SCHEDULE, 4, clip=0.5),
    diffusion.plms_plan(SCHEDULE, 4)],
                         ids=['clipped', 'of several steps'])
def test_two_trajectories_of_any_sampler(plan):
  """A sampler's own steps, along two trajectories that know of each other."""
  trajectories = trajectories_lib.Trajectories(plan, 'student', 0.25)
  own = teachers = sampling.start(plan, jax.random.normal(KEY, (4, 2)))
  positions = trajectories.start(own.x)
  for i in range(plan.num_steps):
    step = jax.tree.map(lambda a, i=i: a[i], plan.steps())
    taught = 0.5 * own.x, 0.5 * teachers.x
    go = functools.partial(sampling.advance, plan, step)
    f, mean_square = plan.eps_factor[i], np.mean(plan.eps_factor**2)
    apart = np.float64(go(own, taught[0], KEY).x
                       - go(teachers, taught[1], KEY).x)
    np.testing.assert_allclose(
        trajectories.target(step, positions, taught, KEY),
        np.float64(taught[0]) + f * apart / (f**2 + 3 * mean_square),
        rtol=1e-4, atol=1e-5)
    eps = 0.4 * own.x + 1
    positions = trajectories.advance(step, positions, taught, eps, KEY)
    own, teachers = go(own, eps, KEY), go(teachers, taught[1], KEY)
    jax.tree.map(np.testing.assert_array_equal, positions,
                 trajectories_lib.Both(teachers, own))


def test_windows_of_a_sampler_of_several_steps():
  """At a window's end the student takes over what the sampler remembers too."""
  plan = diffusion.plms_plan(SCHEDULE, 4)
  trajectories = trajectories_lib.Trajectories(plan, 'student', window_steps=2)
  own = teachers = sampling.start(plan, jax.random.normal(KEY, (4, 2)))
  positions = trajectories.start(own.x)
  for i in range(plan.num_steps):
    step = jax.tree.map(lambda a, i=i: a[i], plan.steps())
    assert bool(trajectories.begins(step)) == (i % 2 == 0)
    taught, eps = (0.5 * own.x, 0.5 * teachers.x), 0.4 * own.x + 1
    go = functools.partial(sampling.advance, plan, step)
    positions = trajectories.advance(step, positions, taught, eps, KEY)
    own, teachers = go(own, eps, KEY), go(teachers, taught[1], KEY)
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), own, teachers)
    assert min(jax.tree.leaves(apart)) > 1e-3  # x, and what is remembered
    own = teachers if i % 2 else own
    jax.tree.map(np.testing.assert_array_equal, positions,
                 trajectories_lib.Both(teachers, own))


def test_what_cannot_be_steered():
  with pytest.raises(ValueError, match="config.finetune.steer=0.5.*'teacher'"):
    dataclasses.replace(SETTINGS, steer=0.5)
  with pytest.raises(ValueError, match='config.finetune.driver'):
    dataclasses.replace(SETTINGS, driver='me')
  with pytest.raises(ValueError, match='config.finetune.steer'):
    dataclasses.replace(SETTINGS, driver='student', steer=1.0)
  with pytest.raises(ValueError, match='the teacher drives'):
    finetune.make_step(Linear(jnp.float32(0.5)), PLAN, np.ones(STEPS),
                       optax.sgd(0.0), KEY,
                       trajectories=trajectories_lib.Trajectories(
                           PLAN, steer=0.5))


def test_tables_of_conditions_are_no_constants_of_the_step():
  """Embeddings of many prompts are gigabytes."""
  step = finetune.make_step(
      Linear(jnp.float32(0.5)), PLAN, np.ones(STEPS), optax.sgd(0.0), KEY,
      conditions.rows((np.arange(50),)))
  assert (50,) in map(np.shape, jax.tree.leaves(step.shapes))
  state = finetune.FinetuneState(
      step=jnp.zeros((), jnp.int32), trainable={'a': jnp.float32(0.0)},
      opt_state=optax.sgd(0.0).init({'a': jnp.float32(0.0)}),
      position=diffusion.sampling.start(PLAN, jnp.zeros((4, 2))))
  traced = step.update.trace(state, *step.shapes)
  assert (50,) not in map(np.shape, traced.jaxpr.consts)


@pytest.mark.parametrize('draw', [
    conditions.classes(50), conditions.rows((np.arange(50),))],
                         ids=['classes', 'rows of a table'])
def test_teacher_and_student_are_asked_for_the_same(draw):
  """A condition of every trajectory, and the index of every step."""
  asked, losses = follow(2 * STEPS, draw)
  for trajectory in range(2):
    key = jax.random.fold_in(KEY, trajectory)
    labels = np.float64(jax.random.randint(
        jax.random.fold_in(key, 2), (4,), 0, 50))[:, None]
    x, noises = draws(trajectory)
    for i, z in enumerate(noises):
      # The student predicts labels and index alone: x / 2 is missing.
      assert losses[STEPS * trajectory + i] == pytest.approx(
          np.mean((0.5 * x - i)**2), rel=1e-4)
      x = (PLAN.x_coef[i] * x - PLAN.eps_factor[i] * (0.5 * x + labels)
           + PLAN.noise_std[i] * z)
      np.testing.assert_allclose(
          asked[STEPS * trajectory + i], x, rtol=1e-4, atol=1e-4)
