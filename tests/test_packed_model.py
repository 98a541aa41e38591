"""Packed models predict and sample as the models that were packed."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toy

from msfp_jax import diffusion
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import interception as layers_lib
from msfp_jax.quant.quantize import apply
from msfp_jax.run import generate
from msfp_jax.tune import student as student_lib
from msfp_jax.tune import talora

# Compiling takes longer than running.
_jit = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def noise(shape, seed=0):
  return jnp.asarray(
      np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def pair():
  """The toy, with biases that are not 0, and the same packed."""
  deployed = toy.deployed()
  biases = {name: noise(bias.shape) for name, bias in layers_lib.leaves(
      deployed.params, 'bias').items()}
  deployed = dataclasses.replace(deployed, params=layers_lib.replace(
      deployed.params, 'bias', biases))
  return deployed, packed_lib.pack(deployed, toy.plan())


@pytest.mark.parametrize('implementation', [None, 'reference', 'xla'])
def test_every_step_has_the_weights_of_its_bank(implementation):
  """Every step runs its own bank, by fake quantization and by simulation."""
  deployed, packed = pair()
  packed = packed.with_implementation(implementation)
  x, t = noise((3, *toy.SHAPE)), jnp.full(3, 500.0)
  quantized = {
      name: layer.weight.fake_quant(deployed.weights[name])
      if layer.weight else deployed.weights[name]
      for name, layer in deployed.spec.layers.items()}
  predict = _jit(lambda model, kernels, index: (
      packed.with_arrays(model).eps_fn(x, t, index),
      deployed.eps_fn(x, t, index),
      apply(deployed.model, layers_lib.replace(
          deployed.params, 'kernel', kernels), deployed.spec.act_quantizers,
            x, t)))
  seen = []
  for index, bank in enumerate([0, 1]):
    kernels = {name: w[bank if name == 'conv_in' else 0]
               for name, w in quantized.items()}
    actual, simulated, expected = predict(packed.arrays, kernels, index)
    np.testing.assert_allclose(simulated, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    seen.append(actual)
  assert np.abs(seen[0] - seen[1]).max() > 0.1


def test_what_is_packed_is_held_once():
  deployed, packed = pair()
  assert packed.layers.keys() == {'conv_in', 'conv_out'}
  assert packed.act_quantizers == {'temb': None}
  assert packed.params.keys() == {'temb'}
  np.testing.assert_array_equal(
      packed.params['temb']['kernel'], deployed.params['temb']['kernel'])
  assert packed.choices.keys() == {'conv_in'}
  np.testing.assert_array_equal(packed.choices['conv_in'], [0, 1])
  for name, layer in packed.layers.items():
    values = layer.fmt.values()[np.asarray(layer.codes())]
    np.testing.assert_allclose(
        values * layer.scale, deployed.spec.layers[name].weight.fake_quant(
            deployed.weights[name]), rtol=1e-6)


def test_sizes():
  """Sizes are those of two codes a byte, and of float32 for the rest."""
  _, packed = pair()
  assert packed.layers['conv_in'].weights.shape == (2, 3, 3, 1, 4)
  assert packed.layers['conv_out'].weights.shape == (1, 3, 3, 2, 1)
  codes = 2 * 9 * 4 + 9 * 2
  scales, zero_points, biases = 4 + 1 + 2, 1, 4 + 1
  temb = 2 * 4 + 4
  assert packed.stored_bytes == codes + 4 * (
      scales + zero_points + biases + temb)
  assert packed.memory_bytes == packed.stored_bytes + 4 * 2 * 9 * 4


def test_samples_are_those_of_the_simulation():
  deployed, packed = pair()
  x, key = noise((3, *toy.SHAPE)), jax.random.key(1)
  expected = diffusion.sample(deployed.eps_fn, toy.plan(), x, key)
  np.testing.assert_allclose(
      packed.sample(x, key=key), expected, rtol=1e-4, atol=1e-4)


def test_images_are_generated_from_either():
  images = [generate.generate(
      model, toy.plan(), 3, 2, toy.SHAPE, jax.random.key(2)).astype(int)
            for model in pair()]
  assert images[0].shape == (3, *toy.SHAPE)
  assert np.abs(images[0] - images[1]).max() <= 1


def test_unknown_implementations_are_refused():
  with pytest.raises(ValueError, match="implementation 'nonsense': must be"):
    pair()[1].with_implementation('nonsense')


def test_what_cannot_be_packed_is_named():
  deployed, _ = pair()
  weights = deployed.weights | {
      'conv_out': deployed.weights['conv_out'].at[0, 0, 0, 0].set(jnp.nan)}
  with pytest.raises(ValueError, match='^layer conv_out: 1 of 36 weights'):
    packed_lib.pack(dataclasses.replace(deployed, weights=weights), toy.plan())


def tuned(model):
  """Makes a tuned model of two banks in every layer, by `Student.deploy`."""
  params = tiny.params(model)
  spec = tiny.by_hand(params)
  banked = tuple(spec.layers)
  router = talora.Router(
      num_layers=len(banked), num_banks=2, num_train_steps=1000, prior=1.0)
  student = student_lib.Student(model, params, spec, router, banked)

  @_jit
  def arrays():
    trainable = student.init(jax.random.key(0), 2, 2, False, False, False)
    # Away from 0, where the banks are equal.
    trainable['banks'] = {
        name: bank | {'b': bank['b'] + 0.3 * jax.random.normal(
            jax.random.key(1), bank['b'].shape)}
        for name, bank in trainable['banks'].items()}
    return student.deploy(trainable, tiny.PLAN.timesteps).arrays

  rng = np.random.default_rng(0)
  choices = {name: jnp.asarray(rng.permutation([0, 1, 0, 1]))
             for name in banked}
  return student_lib.Deployed(
      model, params, spec, {}, choices).with_arrays(arrays())


@pytest.mark.parametrize('model', [
    tiny.NET, pytest.param(tiny.UNET, marks=pytest.mark.slow)],
    ids=['net', 'unet'])
def test_models_of_two_banks(model):
  deployed = tuned(model)
  packed = packed_lib.pack(deployed, tiny.PLAN)
  assert not layers_lib.leaves(packed.params, 'kernel')
  assert packed.layers.keys() == deployed.spec.layers.keys()
  for name, banks in deployed.choices.items():
    np.testing.assert_array_equal(packed.choices[name], banks)
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


class Deep(nn.Module):
  """A deep model of convolutions wide enough for Winograd's algorithm."""

  @nn.compact
  def __call__(self, x, t):
    for i in range(6):
      x = nn.Conv(64, (3, 3), padding=((1, 1), (1, 1)), name=f'conv_{i}')(x)
      x = nn.silu(x)
    return x


def test_deep_networks_are_equal_bit_for_bit():
  """A last bit that differs would move levels, more with every layer."""
  x, t = noise((8, 10, 14, 64)), jnp.zeros(8)
  params = Deep().init(jax.random.key(0), x, t)['params']
  deployed = student_lib.calibrated(
      Deep(), params, tiny.by_hand(params), tiny.PLAN.timesteps)
  packed = packed_lib.pack(deployed, tiny.PLAN)
  assert all(layer.parts for layer in packed.layers.values())
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
  params = Heavy().init(jax.random.key(0), x, jnp.zeros(1))['params']
  weights = layers_lib.leaves(params, 'kernel')
  plan = tiny.PLAN
  deployed = student_lib.Deployed(
      Heavy(), params, tiny.by_hand(params),
      {name: jnp.stack([w] * num_banks) for name, w in weights.items()},
      {name: jnp.arange(plan.num_steps) % num_banks for name in weights})
  packed = packed_lib.pack(deployed, plan)
  draw = jax.jit(lambda arrays, x: diffusion.sample(
      lambda x, t, index: packed.with_arrays(arrays).eps_fn(x, t, index), plan,
      x))
  held = draw.lower(packed.arrays, x).compile().memory_analysis()
  full = sum(w.nbytes for w in weights.values())
  assert held.temp_size_in_bytes < full / 8 * 1.5 + full / 8
  assert held.argument_size_in_bytes < full * (num_banks / 8 + 0.1)
