"""Recipes by what they do to data, and bits by name."""

import dataclasses
import pathlib
import runpy

import numpy as np
import pytest
import test_docs

from benchmarks import calibration
from msfp_jax.quant import block_formats
from msfp_jax.quant import recipes
from msfp_jax.quant.fit import Dynamic
from msfp_jax.quant.fit import Seen
from msfp_jax.run import methods

RNG = np.random.default_rng(0)
NORMAL = RNG.standard_normal(4000).astype(np.float32)
SILU = (NORMAL / (1 + np.exp(-NORMAL))).astype(np.float32)
# With long tails, on which levels that are finer near 0 have less error.
TAILS = RNG.laplace(size=4000).astype(np.float32)**3
WEIGHTS = TAILS[:900].reshape(3, 3, 20, 5)


def fitted(recipe, part, values, axis=-1):
  """What a recipe's fit finds for values, at 4 bits."""
  fit = getattr(recipes.get(recipe), part)
  return fit(Seen(values, float(values.min()), float(values.max())), 4, axis)


def steps(quantizer):
  """Distances of neighbouring levels, as multiples of the least."""
  found = np.diff(quantizer.fmt.levels())
  return np.round(found / found.min(), 6)


@pytest.mark.parametrize('recipe', ['msfp', 'signed_fp'])
@pytest.mark.parametrize('part, values, axis', [
    ('weight', WEIGHTS, -2), ('nal', TAILS, -1)])
def test_weights_and_inputs_of_other_layers_become_signed_floats(
    recipe, part, values, axis):
  found = fitted(recipe, part, values, axis).quantizer
  assert found.fmt.signed and found.zero_point is None
  assert len(set(steps(found))) > 1


def test_msfp_mixes_signs_where_the_input_follows_activation():
  """Unsigned above a zero point has less error there; signed FP has none."""
  mixed, signed = fitted('msfp', 'aal', SILU), fitted('signed_fp', 'aal', SILU)
  assert signed.quantizer.fmt.signed and signed.quantizer.zero_point is None
  assert not mixed.quantizer.fmt.signed
  assert -0.3 <= float(mixed.quantizer.zero_point) < 0
  assert mixed.mse < 0.6 * signed.mse


def test_msfp_stays_signed_where_that_has_less_error():
  found = fitted('msfp', 'aal', NORMAL)
  assert found.quantizer.fmt.signed
  assert found.mse == fitted('signed_fp', 'aal', NORMAL).mse


@pytest.mark.parametrize('part, values, axis', [
    ('weight', WEIGHTS, -2), ('nal', TAILS, -1), ('aal', SILU, -1)])
def test_integers_are_evenly_spaced_with_a_zero_point(part, values, axis):
  found = fitted('int', part, values, axis).quantizer
  assert set(steps(found)) == {1.0} and len(found.fmt.levels()) == 16
  assert found.zero_point is not None


def test_weights_have_a_scale_for_every_output_channel():
  for recipe in ('msfp', 'signed_fp', 'int'):
    found = fitted(recipe, 'weight', WEIGHTS, -2).quantizer
    assert np.shape(found.scale) == (1, 1, 1, 5)


def test_a_recipe_that_there_is_not():
  with pytest.raises(ValueError, match="'fp5'.*int.*msfp.*signed_fp"):
    recipes.get('fp5')


@pytest.mark.parametrize('text, bits', [
    ('w4a4', (4, 4)), ('w3a8', (3, 8)), ('w32a6', (32, 6)),
    ('w4a32', (4, 32))])
def test_bits(text, bits):
  assert recipes.parse_bits(text) == bits


@pytest.mark.parametrize('text', [
    '', 'w4', 'a4w4', 'w2a4', 'w9a4', 'w4a16', 'w4a4 ', 'W4A4', 'w-4a4'])
def test_other_bits_are_refused(text):
  with pytest.raises(ValueError, match='w4a4'):
    recipes.parse_bits(text)


@pytest.mark.parametrize('name, rounding', [
    ('msfp', 'nearest'), ('msfp+gptq', 'gptq'), ('nvfp4+gptq', 'gptq'),
    ('msfp+nearest', 'nearest')])
def test_a_recipe_by_name_with_its_rounding(name, rounding):
  found = recipes.get(name)
  assert found == dataclasses.replace(
      recipes.get(name.partition('+')[0]), rounding=rounding)
  for bits, needed in ((4, rounding == 'gptq'), (32, False)):
    assert ('gram' in found.needs_at(bits, 4)) == needed


@pytest.mark.parametrize('name', ['msfp+gptqq', 'fp+gptq', 'msfp+', '+gptq',
                                  'msfp+gptq+gptq'])
def test_other_names_are_refused(name):
  with pytest.raises(ValueError, match='msfp.*nearest.*gptq') as error:
    recipes.get(name)
  assert repr(name) in str(error.value)
  with pytest.raises(ValueError, match="rounding='up'.*nearest"):
    dataclasses.replace(recipes.get('msfp'), rounding='up')


def test_one_entry_is_all_that_a_recipe_takes(monkeypatch):
  """Tables, studies and benchmarks have it; its row in the docs is missed.

  What it then does in whole runs is in experiment/test_own_recipe.py.
  """
  test_docs.test_every_recipe_has_its_row()
  of = Dynamic(block_formats.nvfp4)
  monkeypatch.setitem(recipes.RECIPES, 'mine', recipes.Recipe(of, of, of))
  assert methods.expand(('fp', 'all'))[-1] == 'mine'
  names = ('mine', 'mine+gptq', 'mine:w6a6', 'mine+gptq:w6a6')
  methods.check_rows(names, '', 0)
  config = runpy.run_path(str(
      pathlib.Path(__file__).parents[1] / 'configs/digits.py'))
  for rows in config['STUDIES']['recipes']['groups'].values():
    assert config['get_config'](rows['mine']).quant.recipe == 'mine'
  assert calibration.expand([calibration.DATA_FREE])[-1] == 'mine'
  with pytest.raises(AssertionError):
    test_docs.test_every_recipe_has_its_row()


def test_ranges_of_16_channels_are_for_inputs_alone():
  recipe = recipes.get('int4_minmax_16')
  find = lambda fit: fit.quantizer(Seen(), 4, -1)
  for fit, group in ((recipe.weight, 64), (recipe.nal, 16), (recipe.aal, 16)):
    assert (find(fit).group, find(fit).bits) == (group, 4)
    assert not find(fit).fmt.signed
  assert not recipe.needs


@pytest.mark.parametrize('name, words', [
    ('msfp+differences', 'scales of its inputs are from calibration'),
    ('dual_scale+gptq+differences', "'dual_scale.gptq.differences'.*'msfp_ima"),
    ('nvfp4+differences+differences', r"and '\+differences'"),
    ('nvfp4+gptq+nearest', 'must be one of'),
    ('other+differences', 'must be one of'),
    ('int4_minmax+by_step', 'these have Dynamic'),
    ('msfp_image+by_step', "'msfp_image.by_step'.*BestOf"),
    ('dual_scale+by_step', 'FitDualScale'),
    ('hadamard+by_step', 'stands around its products'),
    ('msfp+by_step+differences', 'scales of its inputs are from calibration'),
    ('msfp+by_step+by_step', 'must be one of'),
    ('msfp+by_step+weighted', 'must be one of'),
    ('nvfp4+weighted', "'weighted' is for inputs"),
    ('msfp+by_step+smooth', 'stands around its products'),
])
def test_words_behind_a_name_that_it_cannot_have(name, words):
  with pytest.raises(ValueError, match=words):
    recipes.get(name)
