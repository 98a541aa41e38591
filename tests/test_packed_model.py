"""Packed models predict and sample as the models that were packed."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import marks
import numpy as np
from packed_cases import conv
from packed_cases import Deep
from packed_cases import noise
import pytest
import tiny
import toy

from msfp_jax import diffusion
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import interception
from msfp_jax.run import generate
from msfp_jax.tune import student as student_lib
from msfp_jax.tune import talora

pytestmark = [pytest.mark.gpu, pytest.mark.optimized]

# Compiling takes longer than running.
_jit = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@functools.cache
def given():
  """The toy's parameters, with biases that are not 0."""
  params = toy.params()
  biases = {name: noise(bias.shape) for name, bias in interception.leaves(
      params, 'bias').items()}
  return interception.replace(params, 'bias', biases)


@functools.cache
def pair():
  """The toy, and the same packed."""
  deployed = toy.deployed(given())
  return deployed, deployed.packed()


def toy_by_hand(x, t, bank):
  """The quantized toy in float64: nearest levels by brute force."""
  rows, params = toy.spec().layers, given()
  weights = {name: tiny.fake_quant(toy.sets()[name][bank if name == 'conv_in'
                                                    else 0], row.weight)
             for name, row in rows.items() if not row.weight.is_full}
  h = conv(tiny.fake_quant(x, rows['conv_in'].act), weights['conv_in'])
  time = np.stack([t, 1000 - t], axis=-1) / 1000
  temb = time @ np.float64(params['temb']['kernel']) + params['temb']['bias']
  h = h + params['conv_in']['bias'] + temb[:, None, None]
  h = tiny.fake_quant(h / (1 + np.exp(-h)), rows['conv_out'].act)
  return conv(h, weights['conv_out']) + params['conv_out']['bias']


@pytest.mark.parametrize('implementation', [None, 'reference', 'xla'])
def test_every_step_has_the_weights_of_its_bank(implementation):
  """Packed and not, against the whole model in float64 NumPy."""
  deployed, packed = pair()
  packed = packed.with_implementation(implementation)
  x, t = noise((3, *toy.SHAPE)), np.full(3, 500.0)
  predict = _jit(lambda arrays, index: [model.with_arrays(array).eps_fn(
      x, jnp.float32(t), index) for model, array in zip(
          (packed, deployed), arrays, strict=True)])
  seen = []
  for index, bank in enumerate([0, 1]):
    expected = toy_by_hand(np.asarray(x), t, bank)
    actual, simulated = predict((packed.arrays, deployed.arrays), index)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(simulated, actual)
    seen.append(actual)
  assert np.abs(seen[0] - seen[1]).max() > 0.1


def test_what_is_packed_is_held_once():
  deployed, packed = pair()
  assert packed.layers.keys() == deployed.layers.keys()
  for name, layer in packed.layers.items():
    assert (layer.weight is None) == (name == 'temb')
    assert layer.weight is None or layer.weight.is_packed
  assert packed.params.keys() == {'temb'}
  np.testing.assert_array_equal(
      packed.params['temb']['kernel'], deployed.params['temb']['kernel'])
  assert packed.choices.keys() == {'conv_in'}
  np.testing.assert_array_equal(packed.choices['conv_in'], [0, 1])
  for name in ('conv_in', 'conv_out'):
    weight = packed.layers[name].weight
    values = weight.fmt.values()[np.asarray(weight.codes())]
    np.testing.assert_allclose(
        values * weight.scale,
        tiny.fake_quant(toy.sets()[name], toy.spec().layers[name].weight),
        rtol=1e-6)


def test_sizes_by_hand():
  """Two codes a byte in memory, 3 bits each in a file; float32 for the rest."""
  deployed, packed = pair()
  assert packed.layers['conv_in'].weight.data.shape == (2, 3, 3, 1, 4)
  assert packed.layers['conv_out'].weight.data.shape == (1, 3, 3, 2, 1)
  scales, zero_points, biases = 4 + 1 + 2, 1, 4 + 1
  temb = 2 * 4 + 4
  rest = 4 * (scales + zero_points + biases + temb)
  assert packed.stored_bytes == rest + 2 * 9 * 4 // 2 + 14  # 36 x 3 bits
  assert deployed.stored_bytes == packed.stored_bytes
  tap_sums = 4 * 2 * 9 * 4
  assert packed.memory_bytes == rest + 2 * 9 * 4 + 9 * 2 + tap_sums


def test_samples_are_those_of_the_simulation_bit_for_bit():
  deployed, packed = pair()
  x, key = noise((3, *toy.SHAPE)), jax.random.key(1)
  expected = deployed.sample(x, key=key)
  np.testing.assert_array_equal(packed.sample(x, key=key), expected)
  by_sampler = diffusion.sample(deployed.eps_fn, toy.plan(), x, key)
  np.testing.assert_allclose(expected, by_sampler, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_images_are_generated_from_either():
  images = [generate.generate(
      generate.Drawer(model, toy.plan(), 2, toy.SHAPE), 3, jax.random.key(2))
            for model in pair()]
  assert images[0].shape == (3, *toy.SHAPE)
  np.testing.assert_array_equal(images[0], images[1])


def test_unknown_implementations_are_refused():
  with pytest.raises(ValueError, match="implementation 'nonsense': must be"):
    pair()[1].with_implementation('nonsense')


def test_what_cannot_be_packed_is_named():
  deployed, _ = pair()
  layer = deployed.layers['conv_out']
  weight = layer.weight.replace(
      data=layer.weight.data.at[0, 0, 0, 0].set(jnp.nan))
  broken = dataclasses.replace(deployed, layers=deployed.layers | {
      'conv_out': layer.replace(weight=weight)})
  with pytest.raises(ValueError, match='^layer conv_out: 1 of 36 weights'):
    broken.packed()


@pytest.mark.parametrize('make', [packed_lib.pack, packed_lib.simulate])
def test_parameters_that_are_nan_or_of_another_model_are_named(make):
  params = toy.params()
  broken = interception.replace(params, 'kernel', {
      'conv_in': params['conv_in']['kernel'].at[0].set(jnp.nan)})
  with pytest.raises(ValueError, match='layer conv_in: 12 of 36 values'):
    make(toy.Toy(), broken, toy.spec(), toy.plan())
  with pytest.raises(ValueError, match=r"lacks: \['conv_out'\]"):
    make(toy.Toy(), {k: v for k, v in params.items() if k != 'conv_out'},
         toy.spec(), toy.plan())


@pytest.mark.parametrize('nested', [True, False])
def test_pack_takes_parameters_under_params_or_not(nested):
  given_ = {'params': toy.params()} if nested else toy.params()
  packed = packed_lib.pack(toy.Toy(), given_, toy.spec(), toy.plan())
  assert packed.layers['conv_in'].weight.is_packed
  assert packed.params.keys() == {'temb'}


def tuned(model):
  """A student of two banks in every layer, and what was trained of it."""
  params = tiny.params(model)
  spec = tiny.by_hand(params)
  banked = tuple(spec.layers)
  router = talora.Router(
      num_layers=len(banked), num_banks=2, num_train_steps=1000, prior=1.0)
  student = student_lib.Student(model, params, spec, router, banked)
  trainable = student.init(jax.random.key(0), 2, 2, False, False, False)
  # Away from 0, where the banks are equal.
  trainable['banks'] = {
      name: bank | {'b': bank['b'] + 0.3 * jax.random.normal(
          jax.random.key(1), bank['b'].shape)}
      for name, bank in trainable['banks'].items()}
  return student, trainable


@pytest.mark.parametrize(
    'model', marks.slow([tiny.NET], [tiny.NET, tiny.UNET]), ids=['net', 'unet'])
def test_models_of_two_banks(model):
  student, trainable = tuned(model)
  deployed = packed_lib.deploy(student, trainable, tiny.PLAN)
  packed = deployed.packed()
  assert not interception.leaves(packed.params, 'kernel')
  assert packed.layers.keys() == student.spec.layers.keys()
  expected = student.choices(trainable, tiny.PLAN.timesteps)
  for name in student.banked:
    np.testing.assert_array_equal(packed.choices[name], expected[name])
  x = tiny.noise(3, batch=1)
  predict = lambda model: _jit(
      lambda arrays, t, index: model.with_arrays(arrays).eps_fn(x, t, index))
  ours, theirs = predict(packed), predict(deployed)
  outputs = []
  for index in (0, 3):
    t = tiny.t_of(tiny.PLAN.timesteps[index], batch=1)
    outputs.append(ours(packed.arrays, t, index))
    np.testing.assert_allclose(
        outputs[-1], theirs(deployed.arrays, t, index), rtol=1e-5, atol=1e-5)
  assert np.isfinite(outputs[0]).all()
  assert np.abs(outputs[0] - outputs[1]).max() > 0.01


@pytest.mark.slow
def test_deep_networks_are_equal_bit_for_bit():
  """A last bit that differs would move levels, more with every layer."""
  x, t = noise((8, 10, 14, 64)), jnp.zeros(8)
  params = jax.jit(Deep().init)(jax.random.key(0), x, t)['params']
  deployed = packed_lib.simulate(
      Deep(), params, tiny.by_hand(params), tiny.PLAN)
  packed = deployed.packed()
  assert all(layer.prepared.parts for layer in packed.layers.values())
  outputs = [jax.jit(lambda arrays, model=model: model.with_arrays(
      arrays).eps_fn(x, t, 0))(model.arrays) for model in (
          deployed, packed, packed.with_implementation('reference'))]
  for output in outputs[1:]:
    np.testing.assert_array_equal(output, outputs[0])
  assert len(np.unique(outputs[0])) > 1000


class Heavy(nn.Module):
  """A model of many weights for inputs that are small."""

  @nn.compact
  def __call__(self, x, t):
    for i in range(8):
      x = nn.Dense(256, name=f'layer_{i}')(nn.silu(x))
    return x


@pytest.mark.parametrize('num_banks', [1, 2])
def test_decoded_weights_are_never_in_memory_at_once(num_banks):
  """Nor are they computed before the loop over steps, to be kept.

  There is room for one of the 8 layers, and for the codes of a step's banks.
  """
  x = jnp.zeros((1, 1, 1, 256))
  params = jax.jit(Heavy().init)(jax.random.key(0), x, jnp.zeros(1))['params']
  plan, spec = tiny.PLAN, tiny.by_hand(params)
  packed = packed_lib.pack(Heavy(), params, spec, plan)
  if num_banks > 1:
    doubled = {name: layer.replace(
        weight=layer.weight.replace(
            data=np.concatenate([layer.weight.data] * num_banks)),
        prepared=layer.prepared.replace(tap_sums=None))
               for name, layer in packed.layers.items()}
    packed = dataclasses.replace(
        packed, layers=doubled,
        choices={name: np.arange(plan.num_steps) % num_banks
                 for name in doubled})
  draw = jax.jit(lambda arrays, x: diffusion.sample(
      lambda x, t, index: packed.with_arrays(arrays).eps_fn(x, t, index), plan,
      x))
  held = draw.lower(packed.arrays, x).compile().memory_analysis()
  full = sum(w.nbytes for w in interception.leaves(params, 'kernel').values())
  assert held.temp_size_in_bytes < full / 8 * 1.5 + full / 8
  assert held.argument_size_in_bytes < full * (num_banks / 8 + 0.1)
