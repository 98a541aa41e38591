"""The student's predictions, before training and deployed after it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import students
import tiny

from msfp_jax.kernels.apply import QuantizedModel
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import interception
from msfp_jax.quant.quantize import quantize
from msfp_jax.quant.quantizers import Full
from msfp_jax.tune import finetune
from msfp_jax.tune import student as student_lib

pytestmark = pytest.mark.gpu

variants = pytest.mark.parametrize(
    'options', [{}, pytest.param(students.PLAIN_LORA, marks=pytest.mark.slow),
                pytest.param(students.DEQUANTIZED, marks=pytest.mark.slow),
                pytest.param({'rank': 0}, marks=pytest.mark.slow)],
    ids=['two banks', 'plain LoRA', 'three banks on dequantized weights',
         'offsets of weights'])


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


@pytest.mark.slow
@variants
def test_step_0_is_plain_msfp_bit_for_bit(options):
  """Before training, predictions are the calibrated model's, bit for bit."""
  setup = students.net(**options)
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
  setup = students.net(recipe='int')
  assert len(list(assert_starts_as_plain(setup, 'int'))) == 2


@pytest.mark.slow
@variants
def test_deployed_equals_the_student_at_every_step(options):
  setup, trainable = students.net(**options), students.trained(**options)
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
  setup, trainable = students.net(), students.trained()
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
  setup, trainable = students.net(), students.trained()
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
  setup = students.net(**students.DEQUANTIZED)
  quantizer = tiny.spec(tiny.NET).layers['body'].weight
  np.testing.assert_allclose(
      setup.student.base_kernels['body'],
      tiny.fake_quant(setup.params['body']['kernel'], quantizer), rtol=1e-6,
      atol=1e-7)
  for name, base in (('conv_out', setup), ('body', students.net())):
    np.testing.assert_array_equal(base.student.base_kernels[name],
                                  setup.params[name]['kernel'])


def test_an_unknown_base_is_refused():
  with pytest.raises(ValueError, match='dequantised'):
    students.Setup(tiny.NET, base_weight='dequantised')


def test_banks_go_to_the_layers_of_fewest_bits():
  assert students.net().student.banked == ('temb', 'conv_in', 'body')
  spec = tiny.spec(tiny.NET)
  free = {name: dataclasses.replace(layer, weight=Full())
          for name, layer in spec.layers.items()}
  make = lambda layers: finetune.make_student(
      tiny.NET, tiny.params(tiny.NET),
      dataclasses.replace(spec, layers=layers), 1000, students.settings_of())
  some = make(spec.layers | {'body': free['body']})
  assert some.banked == ('temb', 'conv_in')
  with pytest.raises(ValueError, match='quantizes no weight'):
    make(free)


@pytest.mark.slow
def test_one_bank_has_no_router():
  setup = students.net(**students.PLAIN_LORA)
  assert setup.student.router is None
  assert not setup.start().trainable['router']
  _, scalars = setup.run(1)
  assert not [key for key in scalars[0] if key.startswith('bank_')]


def test_learned_ranges_and_biases_are_those_asked_for():
  trainable = students.net().start().trainable
  assert set(trainable['ranges']['act']) == set(tiny.NET_ROLES.values())
  assert set(trainable['ranges']['weight']) == {'temb', 'conv_in', 'body'}
  assert set(trainable['biases']) == set(tiny.NET_ROLES.values())
  for name, offsets in trainable['ranges']['act'].items():
    act = tiny.spec(tiny.NET).layers[name].act
    assert ('zero_point' in offsets) == (act.zero_point is not None)
  alone = students.net(**students.PLAIN_LORA).start().trainable
  assert not jax.tree.leaves([alone['ranges'], alone['biases']])


@functools.cache
def unet():
  return students.Setup(tiny.UNET, num_updates=40)


@pytest.mark.long
def test_the_unet_starts_as_plain_msfp_bit_for_bit():
  assert len(list(assert_starts_as_plain(unet()))) == 2
