"""Recipes, calibration and specs of differences between steps."""

import dataclasses
import functools

import numpy as np
import pytest
from recursion import inputs_of
from recursion import KEY
from recursion import MODEL
from recursion import PARAMS
from recursion import PLAN
from recursion import RECIPE
from recursion import X
import tiny

from msfp_jax.quant import block_formats
from msfp_jax.quant import calibrate as calibrate_lib
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import observe
from msfp_jax.quant import recipes
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.block import Block
from msfp_jax.quant.calibrate import calibrate
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.run import methods

pytestmark = pytest.mark.gpu


def test_specs_say_so():
  make = functools.partial(calibrate, tiny.NET, tiny.params(tiny.NET),
                           recipe=RECIPE, roles=tiny.NET_ROLES)
  spec = make()
  assert spec.differences
  text = spec.to_json()
  assert 'msfp-jax/spec/3' in text
  assert spec_lib.QuantSpec.from_json(text) == spec
  # Inputs in full precision differ by nothing that would be quantized.
  weights = make(act_bits=32)
  assert not weights.differences
  assert 'msfp-jax/spec/2' in weights.to_json()


def test_calibration_sees_differences():
  """Of full precision's own trajectory, the first of them 0; Gram of inputs."""
  needs = (*fit_lib.NEEDS,)
  found = observe.collect(MODEL, PARAMS, PLAN, [X], key=KEY, needs=needs,
                          samples_per_layer=200_000)
  plain = observe.collect(
      MODEL, PARAMS, PLAN, [X], key=KEY, samples_per_layer=200_000,
      needs=[need for need in needs if need != fit_lib.DIFFERENCES])
  for name, seen in inputs_of(X).items():
    apart = np.diff(np.float64(seen), axis=0)
    assert found[name].differences and not plain[name].differences
    assert found[name].maximum == pytest.approx(apart.max(), rel=1e-4)
    assert found[name].minimum == pytest.approx(apart.min(), rel=1e-4)
    # A fifth of the values is of the first step.
    steps = found[name].values.reshape(PLAN.num_steps, -1)
    assert (steps[0] == 0).all()
    for values, step in zip(steps[1:], apart, strict=True):
      gaps = np.abs(values[:, None] - step.ravel())
      assert gaps.min(1).max() < 1e-4
      assert values.std() == pytest.approx(step.std(), rel=0.1)
    np.testing.assert_array_equal(found[name].gram, plain[name].gram)


def test_recipes_take_what_they_need_to_see():
  get = recipes.get
  recipe = get('msfp_image+gptq+differences')
  assert recipe.differences and recipe.rounding == 'gptq'
  assert get('msfp_image+differences+gptq') == recipe
  # Signed and unsigned alike would be asked for differences, which are signed.
  assert set(recipe.needs) == {'rows', 'gram', 'differences'}
  # Nothing is seen of inputs, and so nothing of differences.
  assert set(get('int4_minmax+gptq+differences').needs) == {'gram'}
  assert not get(RECIPE).needs
  assert not get('msfp_image').differences
  # Branches are chosen for weights, which whole inputs are multiplied with.
  assert set(get('svdquant+differences').needs) == {
      'rows', 'channel_maxima', 'extremes'}
  # 'all' is all that can be.
  assert 'msfp_image+differences' in methods.expand('all+differences')
  assert 'msfp+differences' not in methods.expand('all+differences')
  assert len(methods.expand('all+other')) == len(recipes.RECIPES)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['msfp_image+gptq', 'svdquant'])
def test_with_inputs_in_full_precision_the_suffix_is_nothing(name):
  make = functools.partial(
      calibrate, MODEL, PARAMS, act_bits=32, batches=[X], plan=PLAN,
      roles={'in': 'first', 'out': 'last'})
  found, expected = make(recipe=f'{name}+differences'), make(recipe=name)
  assert dataclasses.replace(found, recipe=name).to_json() == (
      expected.to_json())


def test_differences_follow_no_activation_function():
  """Whose extremes happen to be like SiLU's."""
  rows = np.random.default_rng(0).uniform(-0.2, 0.5, (40, 4))
  seen = fit_lib.Seen(minimum=-0.2, maximum=0.5, rows=np.float32(rows))
  kind = lambda seen: calibrate_lib.fit_layer(
      recipes.get('msfp_image+differences'), 'in', seen,
      np.asarray(PARAMS['first']['kernel']), 4, 4).kind
  assert kind(seen) == spec_lib.AAL  # of inputs
  assert kind(dataclasses.replace(seen, differences=True)) == spec_lib.NAL


def test_a_search_and_what_stands_around_are_not_both_had(monkeypatch):
  recipe = recipes.get('msfp_image')
  monkeypatch.setitem(recipes.RECIPES, 'own', dataclasses.replace(
      recipe, around=recipes.get('hadamard').around))
  with pytest.raises(ValueError, match='its input is searched'):
    recipes.get('own+differences')


def test_what_was_seen_must_be_what_is_quantized():
  seen = observe.collect(
      MODEL, PARAMS, PLAN, [X], key=KEY, needs=('rows', 'differences'))
  roles = {'in': 'first', 'out': 'last'}
  options = {'activations': seen, 'roles': roles}
  spec = calibrate(MODEL, PARAMS, recipe='msfp_image+differences', **options)
  assert all(layer.kind == spec_lib.NAL for layer in spec.layers.values())
  with pytest.raises(ValueError, match='first.*are of differences between'):
    calibrate(MODEL, PARAMS, recipe='signed_fp_image', **options)
  options['activations'] = observe.collect(
      MODEL, PARAMS, PLAN, [X], key=KEY, needs=('rows',))
  with pytest.raises(ValueError, match='first.*looks at differences'):
    calibrate(MODEL, PARAMS, recipe='msfp_image+differences', **options)


def test_a_range_from_calibration_is_refused(monkeypatch):
  """In an unsigned format above one zero point, as own recipes may have it."""
  fit = fit_lib.Dynamic(lambda bits: Block(
      FPFormat.parse('UE2M2'), 'image', zero_point=-0.25))
  monkeypatch.setitem(recipes.RECIPES, 'own', recipes.Recipe(
      fit_lib.Dynamic(block_formats.int_group), fit, fit))
  roles = {'in': 'first', 'out': 'last'}
  calibrate(MODEL, PARAMS, recipe='own', roles=roles)
  with pytest.raises(ValueError, match='layer first: .*cuts off'):
    calibrate(MODEL, PARAMS, recipe='own+differences', roles=roles)
