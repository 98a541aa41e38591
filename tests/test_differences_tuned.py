"""Students that quantize differences between steps."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recursion import ByHand
from recursion import KEY
from recursion import MODEL
from recursion import PARAMS
from recursion import PLAN
from recursion import RECIPE
from recursion import simulated
from recursion import X
import students
import tiny

from msfp_jax.base import devices
from msfp_jax.kernels import differences
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import block_formats
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.block import Block
from msfp_jax.quant.calibrate import calibrate
from msfp_jax.quant.numbers import int_format
from msfp_jax.quant.qlayer import Latent
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.tune import finetune
from msfp_jax.tune import student as student_lib
from msfp_jax.tune import trajectories as trajectories_lib

pytestmark = pytest.mark.gpu


ONE = {'num_banks': 1, 'learn_act_ranges': False, 'learn_weight_scales': False,
       'learn_biases': False, 'recipe': RECIPE}


def test_products_in_training_are_of_whole_sums():
  """In bfloat16 too, whose numbers x^ is none of."""
  rng = np.random.default_rng(0)
  layer = nn.Dense(5, name=None)
  x = jnp.asarray(rng.normal(size=(3, 7)), jnp.bfloat16)
  params = layer.init(KEY, jnp.float32(x))['params']
  weights = block_formats.int_group(4)
  made = QLayer(Latent(params['kernel'], weights),
                Block(int_format(4), 'token'), params['bias'] + 0.3)
  memory = {'input': jnp.asarray(rng.normal(size=(3, 7)), jnp.float32)}
  # The module's own name is empty: it is the model.
  out, memory = differences.apply(
      layer, params, {'': made}, memory, x, dtype='float32')
  kernel = np.float64(fit_lib.restored(weights, params['kernel'], -2))
  np.testing.assert_allclose(
      out, np.float64(memory['input']) @ kernel + np.float64(made.bias),
      rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_student_follows_the_recursion(dtype):
  """From x^ = x on, where a trajectory begins."""
  spec = spec_lib.QuantSpec('by hand', {
      name: spec_lib.LayerSpec(
          '', '', block_formats.int_group(4), Block(int_format(4), 'image'))
      for name in ('first', 'last')}, differences=True)
  student, nothing = student_lib.untrained(MODEL, PARAMS, spec)
  student = dataclasses.replace(student, dtype=dtype)
  predict = jax.jit(functools.partial(student.predict_next, nothing))
  expected, memory = ByHand(simulated()), student.memory(X)
  for i, t in enumerate(PLAN.timesteps):
    x = X * (1 - 0.1 * i)
    if i == 0:
      # What is left of the first differences is nothing.
      expected.known = [h for h, _ in expected.whole(np.float64(x), 0)]
    eps, _, memory = predict(
        x, jnp.float32(t), step=i, memory=memory, fresh=jnp.bool_(i == 0))
    room = 1e-5 if dtype == 'float32' else 0.1
    np.testing.assert_allclose(eps, expected(np.float64(x), i), atol=room)
    if i == 0:
      np.testing.assert_allclose(memory['first']['input'], x + t / 1000,
                                 atol=1e-5 if dtype == 'float32' else 0.02)


def test_other_students_keep_their_checkpoints():
  """What orbax finds in a state that knows no differences: as it was."""
  fields = lambda recipe: {field.name for field in dataclasses.fields(
      jax.eval_shape(students.Setup(
          tiny.NET, **ONE | {'recipe': recipe}).start))}
  assert fields('msfp') == {'step', 'trainable', 'opt_state', 'position'}
  assert fields(RECIPE) == fields('msfp') | {'memory'}


class Places(nn.Module):
  """A model one layer of which sees the same for all samples."""

  @nn.compact
  def __call__(self, x, t):
    places = nn.Dense(x.shape[-1], name='places')(jnp.ones((1, 8, 8, 3)))
    return nn.Conv(x.shape[-1], (1, 1), name='out')(
        x + places + t[:, None, None, None] / 1000)


def test_inputs_without_a_row_a_sample_are_not_cut_in_parts():
  params = Places().init(KEY, tiny.noise(0), tiny.t_of(0))['params']
  spec = calibrate(Places(), params, recipe=RECIPE,
                   roles={'places': 'places', 'out': 'out'})
  settings = students.settings_of(num_banks=1, accumulate=2)
  start = lambda settings: finetune.init_state(
      finetune.make_student(Places(), params, spec, 1000, settings),
      finetune.optimizer(settings), tiny.PLAN, tiny.IMAGE, KEY, settings)
  with pytest.raises(ValueError, match=r"layers \['places'\] have no row"):
    start(settings)
  state = start(dataclasses.replace(settings, accumulate=1))
  layout = devices.layout()
  lie = finetune.shardings(layout, state)
  assert lie.memory['places']['input'] == layout.whole
  assert lie.memory['out']['input'] == layout.batch


@pytest.mark.slow
def test_a_student_sees_what_the_deployed_model_sees():
  """Along one trajectory: each step's prediction, and what is remembered."""
  setup = students.Setup(tiny.NET, **ONE)
  state = setup.start()
  deployed = packed_lib.deploy(setup.student, state.trainable, tiny.PLAN)
  noise, memory = tiny.noise(5), deployed.memory(tiny.noise(5))
  predict = jax.jit(deployed.eps_fn_of())
  _, memory = predict(noise, tiny.t_of(750), 0, memory)
  ours = jax.jit(setup.student.predict_next)
  inputs = lambda memory: {name: {'input': layer['input']}
                           for name, layer in memory.items()}
  for i, t in enumerate(tiny.PLAN.timesteps):
    x = noise * (1 - 0.1 * i)
    student, _, kept = ours(state.trainable, x, jnp.float32(t), step=i,
                            memory=inputs(memory))
    eps, memory = predict(x, tiny.t_of(t), i, memory)
    np.testing.assert_allclose(student, eps, rtol=1e-4, atol=1e-4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4),
                 kept, inputs(memory))


def test_updates_follow_the_trajectory_and_carry_the_memory():
  """Each loss by predictions made one after the other, x^ = x at the first."""
  setup = students.Setup(tiny.NET, **ONE, learning_rate=0.0)
  state = setup.start()
  predict = jax.jit(setup.student.predict_next)
  memory, trainable = jax.tree.map(jnp.copy, (state.memory, state.trainable))
  for n in range(6):  # four steps, and two of the next trajectory
    i = n % 4
    x = state.position.x
    if i == 0:
      x = jax.random.normal(jax.random.fold_in(jax.random.fold_in(
          jax.random.key(4), n // 4), 0), x.shape)
    t = jnp.float32(tiny.PLAN.timesteps[i])
    eps, _, memory = predict(trainable, x, t, step=i, memory=memory,
                             fresh=jnp.bool_(i == 0))
    target = setup.student.teach(x, t)
    state, seen = setup.update(state)
    assert float(seen['mse']) == pytest.approx(
        float(np.mean((eps - target)**2)), rel=1e-4)
    # At the first x^ is x: nothing is lost but by weights.
    jax.tree.map(functools.partial(
        np.testing.assert_allclose, rtol=1e-4, atol=1e-5), state.memory, memory)
  assert np.abs(memory['body']['input']).max() > 0.1


@pytest.mark.slow
def test_at_a_windows_end_the_memory_begins_anew():
  """There the student stands where its own path did not lead."""
  setup = students.Setup(tiny.NET, **ONE, learning_rate=0.0)
  trajectories = trajectories_lib.Trajectories(
      tiny.PLAN, 'student', window_steps=2)
  settings = students.settings_of(
      **{key: value for key, value in ONE.items() if key != 'recipe'},
      driver='student', window_steps=2, learning_rate=0.0)
  tx = finetune.optimizer(settings)
  step = finetune.make_step(
      setup.student, tiny.PLAN, np.array(students.GAMMA), tx,
      jax.random.key(4), trajectories=trajectories)
  state = finetune.init_state(
      setup.student, tx, tiny.PLAN, tiny.IMAGE, KEY, settings)
  predict = jax.jit(setup.student.predict_next)
  trainable = jax.tree.map(jnp.copy, state.trainable)
  close = lambda a, b: all(jax.tree.leaves(jax.tree.map(
      functools.partial(np.allclose, rtol=1e-3, atol=1e-4), a, b)))
  for i, t in enumerate(tiny.PLAN.timesteps):
    x, memory = jax.tree.map(jnp.copy, (state.position.student.x, state.memory))
    state, _ = step(state)
    if i == 2:
      anew, on = (predict(trainable, x, jnp.float32(t), step=i, memory=memory,
                          fresh=jnp.bool_(fresh))[2] for fresh in (True, False))
      assert close(state.memory, anew) and not close(state.memory, on)


@pytest.mark.slow
def test_no_gradient_passes_the_memory():
  setup = students.Setup(tiny.NET, **ONE)
  state = setup.start()
  x, t = tiny.noise(5), jnp.float32(500)

  def loss(trainable, memory):
    return jnp.sum(setup.student.predict_next(
        trainable, x, t, step=1, memory=memory)[0]**2)

  memory = jax.tree.map(lambda part: part + 0.5, state.memory)
  gradient, passed = jax.jit(jax.grad(loss, (0, 1)))(state.trainable, memory)
  assert not any(np.any(part) for part in jax.tree.leaves(passed))
  assert any(np.any(part) for part in jax.tree.leaves(gradient['banks']))


@pytest.mark.long
@pytest.mark.parametrize('options', [
    {'how_remat': 'blocks'}, {'how_remat': 'products'}, {'accumulate': 2}],
                         ids=str)
def test_updates_in_less_memory_remember_the_same(options):
  settings = {key: value for key, value in ONE.items() if key != 'recipe'}
  setup = students.Setup(tiny.UNET, recipe=RECIPE, **settings)
  step = finetune.make_step(
      setup.student, tiny.PLAN, np.array(students.GAMMA),
      finetune.optimizer(students.settings_of(**settings)), jax.random.key(4),
      **options)
  plain, ours = setup.start(), setup.start()
  for _ in range(2):
    plain, _ = setup.update(plain)
    ours, _ = step(ours)
  jax.tree.map(functools.partial(
      np.testing.assert_allclose, rtol=1e-3, atol=1e-3),
               (ours.memory, ours.trainable), (plain.memory, plain.trainable))
