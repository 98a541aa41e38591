"""Recipes whose inputs are searched with regard to the sampler's steps."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from recursion import inputs_of
from recursion import KEY
from recursion import MODEL
from recursion import PARAMS
from recursion import PLAN
from recursion import X
import tiny

from configs import common
from msfp_jax import diffusion
from msfp_jax.packed import file as file_lib
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import around
from msfp_jax.quant import fit as fit_lib
from msfp_jax.quant import numbers
from msfp_jax.quant import observe
from msfp_jax.quant import recipes
from msfp_jax.quant.calibrate import calibrate
from msfp_jax.quant.fit import Seen
from msfp_jax.tune import finetune

pytestmark = pytest.mark.gpu

RNG = np.random.default_rng(0)
# Of four steps, whose values grow by turns; after SiLU.
PARTS = np.stack([width * RNG.normal(size=300) for width in (3, 0.2, 1, 9)])
SILU = PARTS / (1 + np.exp(-PARTS))


def seen(parts):
  parts = np.float32(parts)
  return Seen(values=parts.ravel(), minimum=float(parts.min()),
              maximum=float(parts.max()), by_step=parts)


@pytest.mark.parametrize('candidates', [
    fit_lib.SIGNED, fit_lib.UNSIGNED, fit_lib.INTEGER])
def test_every_step_has_the_best_of_its_own_values(candidates):
  """Against a search of each step alone, in each format alone."""
  found = fit_lib.SearchedByStep((candidates,))(seen(SILU), 4, -1)
  errors = {}
  for fmt in ([numbers.int_format(4)] if candidates.integer else
              numbers.formats_of_width(4, candidates.signed)):
    zeros = candidates.zero_points
    zeros = fit_lib.search.SILU_ZERO_POINTS if zeros == 'silu' else zeros
    alone = [fit_lib.search.search(part, [fmt], zero_points=zeros)
             for part in np.float32(SILU)]
    errors[fmt] = np.mean([result.mse for result in alone])
    if fmt == found.quantizer.fmt:
      for step, result in enumerate(alone):
        one, expected = found.quantizer.at(step), result.quantizer()
        np.testing.assert_allclose(one.scale, expected.scale, rtol=1e-6)
        if zeros is not None:
          np.testing.assert_allclose(
              one.zero_point, expected.zero_point, rtol=1e-6, atol=1e-9)
  assert found.quantizer.fmt == min(errors, key=errors.get)
  assert found.mse == pytest.approx(min(errors.values()))
  # Widths differ 45-fold: one range for all is far worse.
  together = fit_lib.Searched((candidates,))(seen(SILU), 4, -1)
  assert found.quantizer.num_steps == len(SILU)
  assert found.mse < 0.8 * together.mse


def test_the_sign_is_that_of_the_least_error_over_all_steps():
  both = fit_lib.SearchedByStep((fit_lib.SIGNED, fit_lib.UNSIGNED))
  after, before = both(seen(SILU), 4, -1), both(seen(PARTS), 4, -1)
  assert not after.quantizer.fmt.signed and before.quantizer.fmt.signed
  assert set(after.tried) == {fit_lib.SIGNED, fit_lib.UNSIGNED}
  assert after.mse == min(after.tried.values())


def test_values_of_a_step_are_of_that_step():
  """Two batches, against the inputs that the sampler comes by."""
  found = observe.collect(
      MODEL, PARAMS, PLAN, [X, 2 * X], key=KEY, samples_per_layer=20_000,
      needs=(fit_lib.BY_STEP,))
  for name, batches in inputs_of(X, 2 * X).items():
    kept = found[name].by_step
    assert kept.shape == (PLAN.num_steps, 4000)
    np.testing.assert_array_equal(
        np.sort(kept.ravel()), np.sort(found[name].values))
    for step, values in enumerate(kept):
      there = np.concatenate([
          batches[step].ravel(), batches[PLAN.num_steps + step].ravel()])
      assert np.abs(values[:, None] - there).min(1).max() < 1e-5
      assert values.std() == pytest.approx(there.std(), rel=0.1)


def test_weighted_values_are_of_steps_by_the_square_of_their_factor():
  found = observe.collect(
      MODEL, PARAMS, PLAN, [X, 2 * X], key=KEY, samples_per_layer=10_000,
      needs=(fit_lib.BY_STEP, fit_lib.WEIGHTED))
  weights = PLAN.eps_factor**2 / np.sum(PLAN.eps_factor**2)
  for kept in found.values():
    # The mean of any function is that of the steps' means, so weighted.
    for function in (np.abs, np.square):
      means = function(np.float64(kept.by_step)).mean(axis=1)
      mean = function(np.float64(kept.weighted)).mean()
      assert mean == pytest.approx(np.sum(weights * means), rel=0.05)
    plain = np.square(np.float64(kept.values)).mean()
    assert abs(plain - mean) > 0.2 * mean


def test_a_weighted_search_looks_at_these_values_and_weights_as_they_are():
  of = fit_lib.SearchedWeighted((fit_lib.SIGNED,))
  plain = fit_lib.Searched((fit_lib.SIGNED,))
  mixed = dataclasses.replace(seen(PARTS), weighted=np.float32(PARTS[1]))
  found = of(mixed, 4, -1)
  assert found.quantizer == plain(seen(PARTS[1:2]), 4, -1).quantizer
  assert found.quantizer != plain(mixed, 4, -1).quantizer
  kernel = Seen.of_weights(np.float32(PARTS))
  np.testing.assert_array_equal(
      of(kernel, 4, -2).quantizer.scale, plain(kernel, 4, -2).quantizer.scale)
  assert recipes.get('msfp+weighted').aal == fit_lib.SearchedWeighted(
      recipes.RECIPES['msfp'].aal.candidates)


def calibrated(recipe):
  return calibrate(MODEL, PARAMS, recipe=recipe, batches=[X], plan=PLAN,
                   roles={'in': 'first', 'out': 'last'}, key=KEY)


@pytest.mark.slow
def test_a_model_samples_with_the_quantizer_of_the_step(tmp_path):
  """Against walking the plan with one model a step; the file does the same."""
  spec = calibrated('msfp+gptq+by_step')
  inputs = [layer.act for layer in spec.layers.values()]
  assert all(act.num_steps == PLAN.num_steps for act in inputs)
  assert any(len(set(np.asarray(act.scale))) > 1 for act in inputs)

  def of_step(step):
    return packed_lib.simulate(MODEL, PARAMS, dataclasses.replace(spec, layers={
        name: dataclasses.replace(layer, act=layer.act.at(step))
        for name, layer in spec.layers.items()}), PLAN)

  models = [of_step(step) for step in range(PLAN.num_steps)]
  expected = diffusion.sample(
      lambda x, t, index: jnp.stack(
          [model.eps_fn(x, t, index) for model in models])[index],
      PLAN, X, KEY)
  simulated = packed_lib.simulate(MODEL, PARAMS, spec, PLAN)
  np.testing.assert_allclose(
      simulated.sample(X, key=KEY), expected, rtol=1e-5, atol=1e-5)
  path = tmp_path / 'model.safetensors'
  file_lib.save(path, simulated.packed())
  np.testing.assert_array_equal(
      file_lib.load(path, MODEL).sample(X, key=KEY),
      simulated.packed().sample(X, key=KEY))
  with pytest.raises(ValueError, match='each of 5 steps, and the plan has 4'):
    packed_lib.simulate(MODEL, PARAMS, spec, diffusion.ddim_plan(
        tiny.SCHEDULE, 4))


@pytest.mark.slow
def test_the_report_compares_with_the_best_signed_by_the_same_values():
  """Its gain is that of the sign alone, and not that of other scales."""
  for words, values in (('by_step', 'by_step'), ('weighted', 'weighted')):
    for name, layer in calibrated(f'int+{words}').layers.items():
      kept = observe.collect(
          MODEL, PARAMS, PLAN, [X], key=KEY, needs=(values,))[name]
      of = recipes.SEARCHES[words]((fit_lib.SIGNED,))
      bits = layer.act.bits
      assert layer.stats['act_signed_mse'] == pytest.approx(
          of(kept, bits, -1).mse)


def test_the_suffix_changes_inputs_alone():
  plain, found = calibrated('int'), calibrated('int+by_step')
  for name, layer in found.layers.items():
    one = plain.layers[name]
    np.testing.assert_array_equal(layer.weight.scale, one.weight.scale)
    assert layer.stats['act_mse'] < one.stats['act_mse']
  assert recipes.get('msfp+by_step+gptq') == recipes.get('msfp+gptq+by_step')
  assert set(recipes.get('signed_fp+by_step').needs) == {'values', 'by_step'}
  assert set(recipes.get('msfp+by_step').needs) == {
      'values', 'by_step', 'extremes'}


def test_recipes_of_ones_own_are_refused_likewise():
  """Before anything is collected."""
  of, plain = fit_lib.SearchedByStep((fit_lib.SIGNED,)), fit_lib.Searched(
      (fit_lib.SIGNED,))
  with pytest.raises(ValueError, match='weights are searched by step'):
    recipes.Recipe(of, plain, plain)
  with pytest.raises(ValueError, match='stands around its products changes'):
    recipes.Recipe(plain, of, of, around.Rotation())
  # And what stands around a layer takes the values of steps along.
  moved = around.Around(smooth=jnp.float32([2, 2])).seen(Seen(
      rows=np.ones((5, 2), np.float32), by_step=PARTS, weighted=PARTS))
  assert moved.by_step is None and moved.weighted is None


def test_a_training_with_another_plan_is_refused_before_it(tmp_path):
  spec = calibrated('int+by_step')
  settings = finetune.FinetuneSettings(**dict(
      common.get_config().finetune, num_banks=1))
  student = finetune.make_student(MODEL, PARAMS, spec, 1000, settings)
  with pytest.raises(ValueError, match='each of 5 steps, and the plan has 4'):
    finetune.train(
        student, tiny.SCHEDULE, diffusion.ddim_plan(tiny.SCHEDULE, 4),
        settings, str(tmp_path), sample_shape=MODEL.sample_shape, bank_key=KEY,
        trajectory_key=KEY)
  assert not [*tmp_path.iterdir()]


def test_weights_have_no_steps():
  with pytest.raises(ValueError, match='for inputs'):
    fit_lib.SearchedByStep((fit_lib.SIGNED,))(seen(PARTS), 4, -2)


def test_values_that_were_not_kept_by_step_are_refused():
  found = observe.collect(MODEL, PARAMS, PLAN, [X], key=KEY)
  with pytest.raises(ValueError, match="needs to see .'by_step'."):
    calibrate(MODEL, PARAMS, recipe='signed_fp+by_step', activations=found,
              roles={'in': 'first', 'out': 'last'})
