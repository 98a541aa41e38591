"""The student's predictions, and the updates of fine-tuning."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import common
from msfp_jax.diffusion import sampling
from msfp_jax.kernels.apply import QuantizedModel
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import interception
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantize import quantize
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Static
from msfp_jax.tune import checkpoint
from msfp_jax.tune import finetune
from msfp_jax.tune import losses
from msfp_jax.tune import student as student_lib

pytestmark = pytest.mark.gpu

GAMMA = tuple(losses.denoising_factors(tiny.SCHEDULE, tiny.PLAN, 'sampler'))


def settings_of(**options):
  """Two banks and all that can be learned, quickly; in batches of 4."""
  usual = finetune.FinetuneSettings(**common.get_config().finetune)
  return dataclasses.replace(usual, **{
      'batch_size': 4, 'num_updates': 200, 'num_banks': 2, 'rank': 4,
      'base_weight': 'full', 'learn_act_ranges': True,
      'learn_weight_scales': True, 'learn_biases': True,
      'learning_rate': 1e-2, 'router_learning_rate': 1e-3,
      'range_learning_rate': 1e-3, 'router_prior': 1.0,
      'weight_decay': 0.0} | options)


# Few, since each compiles for seconds.
PLAIN_LORA = {'num_banks': 1, 'learn_act_ranges': False,
              'learn_weight_scales': False, 'learn_biases': False,
              'gamma': (2.0, 1.0, 1.0, 0.0)}
DEQUANTIZED = {'num_banks': 3, 'base_weight': 'dequantized', 'seed': 9}
variants = pytest.mark.parametrize(
    'options', [{}, pytest.param(PLAIN_LORA, marks=pytest.mark.slow),
                pytest.param(DEQUANTIZED, marks=pytest.mark.slow)],
    ids=['two banks', 'plain LoRA', 'three banks on dequantized weights'])


class Setup:
  """A student, its optimizer, its first state and its update."""

  def __init__(self, model, seed=4, gamma=GAMMA, recipe='msfp', **options):
    settings = settings_of(**options)
    key = jax.random.key(seed)
    self.params = tiny.params(model)
    self.student = finetune.make_student(
        model, self.params, tiny.spec(model, recipe),
        tiny.SCHEDULE.num_train_steps, settings)
    tx = finetune.optimizer(settings)
    self.start = jax.jit(lambda: finetune.init_state(
        self.student, tx, tiny.PLAN, tiny.IMAGE, key, settings))
    self.update = finetune.make_step(
        self.student, tiny.PLAN, np.array(gamma), tx, key)
    self.predict = jax.jit(self.student.predict)

  def run(self, updates, state=None):
    """Runs some updates; returns the state and their scalars."""
    state = self.start() if state is None else state
    scalars = []
    for _ in range(updates):
      state, seen = self.update(state)
      scalars.append(jax.device_get(seen))
    return state, scalars


@functools.cache
def net(**options):
  return Setup(tiny.NET, **options)


@functools.cache
def trained(**options):
  """Trains for 6 updates; returns what is trained, on the host."""
  return jax.device_get(net(**options).run(6)[0].trainable)


@functools.cache
def plain_msfp(model, recipe='msfp'):
  """Makes (x, t) -> eps of the calibrated model, by quantize alone."""
  spec = tiny.spec(model, recipe)
  quantized = jax.jit(QuantizedModel(model, spec).apply)
  params = quantize(tiny.params(model), spec)
  return lambda x, t: quantized(params, x, t)


def assert_starts_as_plain(setup, recipe='msfp'):
  """Checks that a student starts as the calibrated model; yields two steps."""
  plain, trainable = (plain_msfp(setup.student.model, recipe),
                      setup.start().trainable)
  for index in (0, 3):
    x, t = tiny.noise(7), tiny.PLAN.timesteps[index]
    expected = plain(x, tiny.t_of(t))
    np.testing.assert_array_equal(
        setup.predict(trainable, x, jnp.float32(t))[0], expected)
    yield index, x, tiny.t_of(t), expected


@variants
def test_step_0_is_plain_msfp_bit_for_bit(options):
  """Before training, predictions are the calibrated model's, bit for bit."""
  setup = net(**options)
  deployed = packed_lib.deploy(
      setup.student, setup.start().trainable, tiny.PLAN)
  weights = quantize(tiny.params(tiny.NET), setup.student.spec)
  for name, kernel in interception.leaves(weights, 'kernel').items():
    banks = deployed.layers[name].weight
    for i in range(deployed.layers[name].num_banks):
      np.testing.assert_array_equal(
          banks.bank(i).dequantize(), kernel.dequantize())
  eps_fn = jax.jit(deployed.eps_fn)
  for index, x, t, expected in assert_starts_as_plain(setup):
    np.testing.assert_array_equal(eps_fn(x, t, index), expected)


@pytest.mark.slow
def test_step_0_is_the_plain_int_baseline_bit_for_bit():
  """The same for INT, whose weights have zero points and learned scales."""
  assert len(list(assert_starts_as_plain(net(recipe='int'), 'int'))) == 2


@pytest.mark.slow
@variants
def test_deployed_equals_the_student_at_every_step(options):
  setup, trainable = net(**options), trained(**options)
  deployed = packed_lib.deploy(setup.student, trainable, tiny.PLAN)
  eps_fn = jax.jit(deployed.eps_fn)
  x = tiny.noise(7)
  plain = plain_msfp(tiny.NET)
  for index, t in enumerate(tiny.PLAN.timesteps):
    expected, choices = setup.predict(trainable, x, jnp.float32(t))
    np.testing.assert_allclose(
        eps_fn(x, tiny.t_of(t), index), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - plain(x, tiny.t_of(t))).max() > 1e-3
    if setup.student.router is not None:
      np.testing.assert_array_equal(
          [deployed.choices[name][index] for name in setup.student.banked],
          choices)


@pytest.mark.slow
def test_deployed_weights_are_the_quantized_sum_of_kernel_and_update():
  setup, trainable = net(), trained()
  deployed = packed_lib.deploy(setup.student, trainable, tiny.PLAN)
  bank = jax.tree.map(np.float64, trainable['banks']['body'])
  kernel = np.float64(setup.params['body']['kernel'])
  merged = kernel + np.einsum('hxyir,hro->hxyio', bank['a'], bank['b'])
  quantizer = student_lib.with_ranges(
      setup.student.spec, trainable['ranges']).layers['body'].weight
  expected = tiny.fake_quant(merged, quantizer)
  found = deployed.layers['body'].weight.dequantize()
  assert found.shape == (2, *kernel.shape)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  assert deployed.layers['conv_out'].num_banks == 1  # 8 bits: no banks


def test_one_bank_or_many_of_equal_updates_are_the_same_model():
  """What a bank is does not depend on how many stand beside it."""
  setup, trainable = net(), trained()
  same = trainable | {'banks': jax.tree.map(
      lambda leaf: np.stack([leaf[0], leaf[0]]), trainable['banks'])}
  weights = packed_lib.deploy(setup.student, same, tiny.PLAN).layers[
      'body'].weight
  np.testing.assert_array_equal(weights.data[0], weights.data[1])
  mixed = packed_lib.deploy(setup.student, trainable, tiny.PLAN).layers[
      'body'].weight
  np.testing.assert_array_equal(weights.data[0], mixed.data[0])
  assert (mixed.data[0] != mixed.data[1]).any()


def test_offsets_move_scales_by_factors_and_zero_points_by_scales():
  """scale exp(log_scale), to 16 bits where there is a zero point, + z scale.

  One rate trains both, whatever the size of an input.
  """
  spec = tiny.spec(tiny.NET)
  first, second = (name for name, layer in spec.layers.items()
                   if layer.act.zero_point is not None)
  offsets = {first: (0.25, 1.0), second: (-0.5, -3.0)}
  assert spec.layers[first].act.scale != spec.layers[second].act.scale
  moved = student_lib.with_ranges(spec, {'weight': {}, 'act': {
      name: {'log_scale': jnp.float32(a), 'zero_point': jnp.float32(b)}
      for name, (a, b) in offsets.items()}})
  for name, (factor, units) in offsets.items():
    before, after = spec.layers[name].act, moved.layers[name].act
    scale, zero = np.float64(before.scale), np.float64(before.zero_point)
    np.testing.assert_allclose(
        after.scale, scale * np.exp(factor), rtol=2**-15)
    np.testing.assert_allclose(
        after.zero_point, zero + units * scale, rtol=1e-5)
  others = set(spec.layers) - set(offsets)
  for name in others:
    tiny.assert_trees_equal(moved.layers[name], spec.layers[name])


def test_a_dequantized_base_is_quantized_before_the_update():
  setup = net(**DEQUANTIZED)
  quantizer = tiny.spec(tiny.NET).layers['body'].weight
  np.testing.assert_allclose(
      setup.student.base_kernels['body'],
      tiny.fake_quant(setup.params['body']['kernel'], quantizer), rtol=1e-6,
      atol=1e-7)
  for name, base in (('conv_out', setup), ('body', net())):
    np.testing.assert_array_equal(base.student.base_kernels[name],
                                  setup.params[name]['kernel'])


def test_an_unknown_base_is_refused():
  with pytest.raises(ValueError, match='dequantised'):
    Setup(tiny.NET, base_weight='dequantised')


def test_banks_go_to_the_layers_of_fewest_bits():
  assert net().student.banked == ('temb', 'conv_in', 'body')
  spec = tiny.spec(tiny.NET)
  free = {name: dataclasses.replace(layer, weight=Full())
          for name, layer in spec.layers.items()}
  make = lambda layers: finetune.make_student(
      tiny.NET, tiny.params(tiny.NET),
      dataclasses.replace(spec, layers=layers), 1000, settings_of())
  some = make(spec.layers | {'body': free['body']})
  assert some.banked == ('temb', 'conv_in')
  with pytest.raises(ValueError, match='quantizes no weight'):
    make(free)


@pytest.mark.slow
def test_one_bank_has_no_router():
  setup = net(**PLAIN_LORA)
  assert setup.student.router is None
  assert not setup.start().trainable['router']
  _, scalars = setup.run(1)
  assert not [key for key in scalars[0] if key.startswith('bank_')]


def test_learned_ranges_and_biases_are_those_asked_for():
  trainable = net().start().trainable
  assert set(trainable['ranges']['act']) == set(tiny.NET_ROLES.values())
  assert set(trainable['ranges']['weight']) == {'temb', 'conv_in', 'body'}
  assert set(trainable['biases']) == set(tiny.NET_ROLES.values())
  for name, offsets in trainable['ranges']['act'].items():
    act = tiny.spec(tiny.NET).layers[name].act
    assert ('zero_point' in offsets) == (act.zero_point is not None)
  alone = net(**PLAIN_LORA).start().trainable
  assert not jax.tree.leaves([alone['ranges'], alone['biases']])


def ddim_step(x, eps, t, t_next):
  """Song et al. 2021, eq. 12 with sigma = 0, float64; t_next < 0 ends."""
  bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
  now, then = bar[t], bar[t_next] if t_next >= 0 else 1.0
  x0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
  return np.sqrt(then) * x0 + np.sqrt(1 - then) * eps


def test_the_teacher_alone_drives_the_trajectory():
  setup = net()
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
  other = net(**PLAIN_LORA)
  for state, (_, x) in zip(
      (other.run(n)[0] for n in (1, 4, 5)), (seen[0], seen[3], seen[4]),
      strict=True):
    np.testing.assert_array_equal(state.position.x, x)


def test_trajectories_start_anew_from_fresh_noise():
  setup = net()
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
  setup = net()
  first, _ = setup.run(1)
  _, scalars = setup.run(2)
  x = np.array(first.position.x)
  trainable = jax.device_get(first.trainable)
  teacher = tiny.teacher(tiny.NET)(setup.params, x, tiny.t_of(500))
  student, choices = setup.predict(trainable, x, jnp.float32(500))
  mse = np.mean((np.float64(teacher) - np.float64(student))**2)
  assert scalars[1]['t'] == 500
  assert scalars[1]['mse'] == pytest.approx(mse, rel=1e-3)
  assert scalars[1]['loss'] == pytest.approx(mse * GAMMA[1], rel=1e-3)
  for bank in (0, 1):
    assert scalars[1][f'bank_{bank}'] == pytest.approx(
        np.mean(np.asarray(choices) == bank))


def test_a_step_of_factor_0_has_finite_scalars():
  """Quadratic spacing visits t = 0 several times, with gamma = 0."""
  _, scalars = net(**PLAIN_LORA).run(4)
  assert scalars[3]['t'] == 0 and scalars[3]['loss'] == 0
  assert all(np.isfinite(value) for value in scalars[3].values())


def test_gradients_reach_everything_trained():
  _, scalars = net().run(3)
  for part in ('banks', 'ranges', 'biases'):
    assert scalars[0][f'l2_grads_{part}'] > 0
  # An update without effect (b = 0) has no preference among banks yet.
  assert scalars[0]['l2_grads_router'] == 0
  assert scalars[2]['l2_grads_router'] > 0
  before = jax.device_get(net().start().trainable)
  changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, trained())
  unmoved = [path for path, moved
             in jax.tree_util.tree_leaves_with_path(changed) if not moved]
  assert not unmoved


def test_one_update_changes_the_chosen_bank_alone():
  """The first update, at t = 750, changes the second of two banks alone."""
  setup = net()
  before = jax.device_get(setup.start().trainable['banks'])
  state, scalars = setup.run(1)
  assert scalars[0]['bank_1'] == 1
  for name, bank in jax.device_get(state.trainable['banks']).items():
    for part in 'ab':
      np.testing.assert_array_equal(bank[part][0], before[name][part][0])
    assert (bank['b'][1] != before[name]['b'][1]).any()


def test_the_teacher_stays():
  setup = net()
  before = jax.device_get(setup.params)
  setup.run(2)
  tiny.assert_trees_equal(jax.device_get(setup.params), before)
  tiny.assert_trees_equal(jax.device_get(setup.student.params), before)


@pytest.mark.slow
def test_the_same_key_gives_the_same_run_and_another_another():
  setup = net()
  one, two = (jax.device_get(setup.run(5)[0]) for _ in range(2))
  tiny.assert_trees_equal(one, two)
  other = net(**DEQUANTIZED).run(1)[0]
  x, of_other = (np.asarray(state.position.x)
                 for state in (setup.run(1)[0], other))
  assert (of_other != x).all()


@pytest.mark.slow
def test_saved_and_restored_it_goes_on_identically(tmp_path):
  setup = net()
  straight = jax.device_get(setup.run(7)[0])
  with checkpoint.Checkpointer(tmp_path) as saver:
    saver.save(3, setup.run(3)[0])
  with checkpoint.Checkpointer(tmp_path) as saver:
    state = saver.restore(setup.start())
  assert int(state.step) == 3
  tiny.assert_trees_equal(jax.device_get(setup.run(4, state)[0]), straight)


@functools.cache
def unet():
  return Setup(tiny.UNET, num_updates=40)


@pytest.mark.slow
def test_the_unet_starts_as_plain_msfp_bit_for_bit():
  assert len(list(assert_starts_as_plain(unet()))) == 2


def loss_by_trajectory(setup, updates):
  """The mean loss of each trajectory, which has 4 steps."""
  _, scalars = setup.run(updates)
  return np.array([s['loss'] for s in scalars]).reshape(-1, 4).mean(axis=1)


def test_the_loss_falls():
  """The loss falls, if little: a net this small owes most to activations."""
  loss = loss_by_trajectory(net(), 200)
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
  settings = settings_of(num_updates=100)
  student = finetune.make_student(
      tiny.NET, tiny.params(tiny.NET), by_step_spec(), 1000, settings)
  tx = finetune.optimizer(settings)
  state = finetune.init_state(
      student, tx, tiny.PLAN, tiny.IMAGE, jax.random.key(4), settings)
  update = finetune.make_step(
      student, tiny.PLAN, np.array(GAMMA), tx, jax.random.key(4))
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
