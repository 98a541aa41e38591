"""What a spec keeps of rounded weights, and models and students made of it."""

import dataclasses
import json

from gptq_cases import by_gptq
from gptq_cases import GRAM
from gptq_cases import KERNEL
from gptq_cases import nearest
from gptq_cases import ROWS
from gptq_cases import true_error
from gptq_cases import X
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import observe
from msfp_jax.quant import recipes
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.around import Around
from msfp_jax.quant.calibrate import calibrate
from msfp_jax.quant.calibrate import fit_layer
from msfp_jax.quant.fit import Seen
from msfp_jax.quant.quantize import quantize
from msfp_jax.tune import student as student_lib

ROTATED = Around(rotation=16, smooth=jnp.exp(jnp.linspace(-1, 1, ROWS)))


def layer_of(recipe='signed_fp+gptq', around=None, kernel=KERNEL, bits=4):
  of = recipes.get(recipe)
  if around is not None:
    of = dataclasses.replace(of, around=lambda trial: around)
  seen = Seen(X.ravel(), X.min(), X.max(), X, np.abs(X).max(0), GRAM)
  return fit_layer(of, 'conv', seen, kernel, bits, 8)


@pytest.mark.slow
def test_with_smoothing_and_rotation_it_is_what_the_product_sees():
  layer = layer_of(around=ROTATED)
  moved = np.asarray(ROTATED.residual(KERNEL))
  x = np.float64(ROTATED.input(X))
  assert layer.stats['output_mse'] == pytest.approx(true_error(
      layer.rounded.dequantize(), x, moved), rel=1e-4)
  assert layer.stats['nearest_output_mse'] == pytest.approx(true_error(
      nearest(layer.weight, moved), x, moved), rel=1e-4)
  assert layer.stats['output_mse'] < 0.7 * layer.stats['nearest_output_mse']
  assert layer.stats['weight_mse'] == pytest.approx(np.mean(
      (np.float64(layer.rounded.dequantize()) - moved)**2), rel=1e-4)


def test_without_a_gram_matrix_it_says_what_to_gather():
  with pytest.raises(ValueError, match="'gptq' needs.*'gram'.*collect"):
    fit_layer(recipes.get('int4_group+gptq'), 'conv', Seen(), KERNEL, 4, 8)


@pytest.mark.slow
@pytest.mark.parametrize('recipe, bits', [
    ('int4_minmax+gptq', 4), ('nvfp4+gptq', 4), ('mxfp4+gptq', 4),
    ('int+gptq', 4), ('quartz_weights+gptq', 4), ('quartz_weights+gptq', 3)])
def test_json_there_and_back_is_exact(recipe, bits):
  spec = spec_lib.QuantSpec(recipe, {'a': layer_of(recipe, bits=bits)})
  back = spec_lib.QuantSpec.from_json(spec.to_json())
  one, two = spec.layers['a'].rounded, back.layers['a'].rounded
  assert one.digest == two.digest and two.weight.is_packed
  tiny.assert_trees_equal(one.weight, two.weight)
  assert [leaf.dtype for leaf in jax.tree.leaves(one.weight)] == [
      leaf.dtype for leaf in jax.tree.leaves(two.weight)]


def assert_refused(recipe, change):
  """Checks that a spec whose rounded weights are changed does not load."""
  content = json.loads(spec_lib.QuantSpec(
      recipe, {'a': layer_of(recipe)}).to_json())
  change(content['layers'][0]['rounded'])
  with pytest.raises(ValueError, match='not a quantization spec'):
    spec_lib.QuantSpec.from_json(json.dumps(content))


@pytest.mark.parametrize('change', [
    lambda row: row.pop('of'),
    lambda row: row.pop('scale'),
    lambda row: row.update(odd=1),
    lambda row: row.update(length=ROWS + 2),
    lambda row: row.update(group=32),
    lambda row: row['scale'].update(dtype='int64'),
    lambda row: row['outer'].update(values=[-1.0])])
def test_damaged_weights_in_a_spec_are_refused(change):
  assert_refused('nvfp4+gptq', change)


@pytest.mark.parametrize('change', [
    lambda row: row.pop('wide'), lambda row: row.pop('shift'),
    lambda row: row.update(shift_group=0), lambda row: row.update(wide='E1M5')])
def test_damaged_shifts_in_a_spec_are_refused(change):
  assert_refused('quartz_weights+gptq', change)


@pytest.fixture(scope='module')
def seen():
  return observe.collect(
      tiny.NET, tiny.params(tiny.NET), tiny.PLAN, [tiny.noise(0)],
      samples_per_layer=2048, key=jax.random.key(0), needs=(
          'extremes', 'values', 'gram'))


def spec_of(seen, recipe, bits=4):
  return calibrate(
      tiny.NET, tiny.params(tiny.NET), recipe=recipe, bits=bits,
      activations=seen, exceptions={'out': 8}, roles=tiny.NET_ROLES)


@pytest.mark.parametrize('recipe', [
    pytest.param('msfp+gptq', marks=pytest.mark.slow), 'nvfp4+gptq'])
def test_a_model_has_the_rounded_weights_wherever_it_is_made(seen, recipe):
  """Quantized, simulated and packed alike: what GPTQ gives for the layer."""
  params, spec = tiny.params(tiny.NET), spec_of(seen, recipe)
  simulated = packed_lib.simulate(tiny.NET, params, spec, tiny.PLAN)
  packed = packed_lib.pack(tiny.NET, params, spec, tiny.PLAN)
  plain = quantize(params, spec)
  for name, layer in spec.layers.items():
    kernel = params[name]['kernel']
    expected = by_gptq(layer.weight, kernel, seen[name].gram)
    for weight in (simulated.layers[name].weight.bank(0),
                   packed.layers[name].weight.bank(0), plain[name]['kernel']):
      np.testing.assert_array_equal(weight.dequantize(), expected)
  # The same size as with the nearest levels.
  assert packed.stored_bytes == packed_lib.pack(
      tiny.NET, params, spec_of(seen, recipe[:-5]), tiny.PLAN).stored_bytes


def test_other_parameters_are_refused_by_name(seen):
  params, spec = tiny.params(tiny.NET), spec_of(seen, 'int4_group+gptq')
  body = params['body']['kernel']
  other = params | {'body': {**params['body'], 'kernel': body.at[
      0, 0, 1, 2].add(1e-6)}}
  for use in (quantize, lambda params, spec: packed_lib.simulate(
      tiny.NET, params, spec, tiny.PLAN)):
    with pytest.raises(ValueError, match='layer body.*other param.*calibrate'):
      use(other, spec)
  # Biases may be others.
  quantize(params | {'body': {'kernel': body, 'bias': jnp.ones(6)}}, spec)


def student_of(spec, base='full'):
  """A student with banks that do nothing yet, and what is trained of it."""
  student = student_lib.Student(
      tiny.NET, tiny.params(tiny.NET), spec, None, ('body', 'temb'), base=base)
  return student, student.init(jax.random.key(0), 1, 2, True, True, False)


@pytest.mark.slow
@pytest.mark.parametrize('recipe', [
    'nvfp4+gptq', 'int+gptq', 'int4_minmax+gptq'])
@pytest.mark.parametrize('base', ['full', 'dequantized'])
def test_training_starts_from_the_rounded_weights(seen, recipe, base):
  """Banks of zero, for block formats too: theirs are the scales of before."""
  spec = spec_of(seen, recipe)
  student, trainable = student_of(spec, base)
  learned = 'body' in trainable['ranges']['weight']
  assert learned == (recipe == 'int+gptq')
  # Codes are of the scales of before: with learned ones none are claimed.
  moved = student_lib.with_ranges(spec, trainable['ranges'])
  assert (moved.layers['body'].rounded is None) == learned
  assert moved.layers['conv_in'].rounded is spec.layers['conv_in'].rounded
  _, layers = student.quantized(trainable)
  for name, layer in spec.layers.items():
    np.testing.assert_array_equal(
        layers[name].weight.bank(0).dequantize(), layer.rounded.dequantize())


@pytest.mark.slow
def test_a_student_predicts_by_the_rounded_weights_and_learns(
    seen, monkeypatch):
  monkeypatch.setitem(recipes.RECIPES, 'own', dataclasses.replace(
      recipes.get('nvfp4+gptq'), nal=fit_lib.Searched((fit_lib.SIGNED,)),
      aal=fit_lib.Searched((fit_lib.SIGNED,))))
  spec = spec_of(seen, 'own')
  student, trainable = student_of(spec)
  x, t = tiny.noise(7), 500.0

  @jax.jit
  def predict(arrays, trainable):
    total = lambda trainable: (jnp.sum((eps := student.with_arrays(
        arrays).predict(trainable, x, t)[0])**2), eps)
    return jax.grad(total, has_aux=True)(trainable)

  gradient, eps = predict(student.arrays, trainable)
  simulated = packed_lib.simulate(
      tiny.NET, tiny.params(tiny.NET), spec, tiny.PLAN)
  np.testing.assert_array_equal(
      eps, jax.jit(simulated.eps_fn)(x, tiny.t_of(t), 1))
  assert np.abs(gradient['banks']['body']['b']).max() > 0
