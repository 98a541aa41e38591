"""The figures that benchmarks compute from the files of runs."""

import pathlib
import re

import jax.numpy as jnp
import marks
import numpy as np
import pytest
import toy

from benchmarks import calibration
from benchmarks import errors
from benchmarks import formats
from benchmarks import packed_layers
from benchmarks import ranks
from benchmarks import routing
from msfp_jax.quant import recipes
from msfp_jax.quant.around import Around
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Static
from msfp_jax.quant.spec import LayerSpec


def test_routing_by_hand():
  found = routing.summarize({
      'timesteps': [750, 500, 250, 0],
      'banks': {'a': [1, 1, 0, 0], 'b': [1, 1, 1, 1], 'c': [0, 1, 0, 1]}})
  assert found == {
      'layers': 3, 'one_bank': 1, 'changes': 2.0,
      'noisy_half': pytest.approx([1 / 6, 5 / 6]),
      'other_half': pytest.approx([3 / 6, 3 / 6])}


# Signal to noise in dB, by a program in NumPy on 2048 rows of its own;
# in the last, other channels are the outliers.
SQNR = {
    'INT4, a token': (16.93, 13.19, 8.09, 14.93, 9.84),
    'INT4, groups of 64': (19.36, 17.04, 14.86, 16.56, 15.31),
    'QuaRTZ, a token, 16, truncated': (13.78, 12.93, 12.79, 13.58, 16.60),
    'QuaRTZ, a token, 16': (18.85, 17.42, 16.19, 16.97, 17.64),
    'QuaRTZ, a token, 32': (18.21, 16.19, 14.61, 16.11, 15.84),
    'QuaRTZ, groups of 64, 16': (19.81, 18.17, 17.07, 17.07, 17.04),
    'QuaRTZ, unsigned, groups of 64, 16': (20.66, 18.92, 17.88, 23.61, 15.88),
    'MXFP4, floor': (18.79, 17.93, 17.00, 17.03, 15.79),
    'MXFP4, even': (19.03, 18.14, 17.16, 17.00, 16.58),
    'NVFP4': (20.44, 20.66, 20.88, 20.23, 21.71)}


@pytest.mark.parametrize('rows', marks.slow([768], [768, 2048]))
def test_formats_have_the_known_signal_to_noise(rows):
  found = {name: [float(text) for text in values]
           for name, _, *values in formats.table(rows)}
  for name, expected in SQNR.items():
    np.testing.assert_allclose(found[name], expected, atol=0.2, err_msg=name)


def test_formats_count_their_scales():
  bits = {name: formats.bits_of(quantizer)
          for name, quantizer in formats.FORMATS.items()}
  assert bits['QuaRTZ, a token, 16'] == 4 + 3 / 16 + 32 / 1024
  assert bits['MXFP4, floor'] == 4.25
  assert bits['NVFP4'] == 4.5 + 32 / (128 * 1024)


@pytest.mark.parametrize('name, words', [
    ('quartz', ('E1M2, f32 by token', 'UE1M3, f32 by token')),
    ('nvfp4', ('E2M1, e4m3 by 16', 'E2M1, e4m3 by 16')),
    ('msfp', ('E2M1, static', 'UE2M2, static, zero point')),
    ('svdquant', ('E1M2, bf16 by 64, smoothed',) * 2)])
def test_costs_are_of_a_recipes_own_inputs(name, words):
  """Normal numbers, and those after SiLU, for which some have other formats."""
  found = formats.inputs_of(recipes.get(name), channels=64).values()
  for one, expected in zip(found, words, strict=True):
    assert formats.shown(*one).startswith(expected)


def test_every_recipe_has_a_cost(monkeypatch):
  """Both kinds of its inputs, each once."""
  quantizer = Static(FPFormat.parse('E2M1'), np.float32(1))
  monkeypatch.setattr(formats, 'inputs_of', lambda recipe, channels: {
      part: (Around(rotation=32), quantizer) for part in ('nal', 'aal')})
  monkeypatch.setattr(formats.machine, 'paired', lambda *_, **__: (1, 1, 1))
  (names, through, *_), = formats.cost(channels=2**16)
  assert through == 'E2M1, static, 32 channels rotated'
  assert names.split(', ') == [
      f'{name} ({part})' for name in recipes.RECIPES for part in ('nal', 'aal')]


def test_recipes_without_data_are_those_of_the_documentation():
  text = pathlib.Path(__file__).parents[1].joinpath(
      'docs/recipes.md').read_text(encoding='utf-8')
  found = re.findall(r'^\| (`.*?`) \|.*\| nothing \|$', text, flags=re.M)
  assert calibration.expand(['msfp', calibration.DATA_FREE]) == [
      'msfp', *re.findall(r'`(\w+)`', ' '.join(found))]


def test_ranks_by_hand():
  rows = [{'fd': 1.0, 'psnr': 9.0, 'same': 3}, {'fd': 2.0, 'psnr': 7.0,
          'same': 3}, {'fd': 3.0, 'psnr': 8.0, 'same': 3}]
  assert ranks.correlations(rows, 'fd') == {'psnr': pytest.approx(-0.5)}


def test_errors_by_hand():
  """Geometric means over the layers of 4 bits of a role; others are left out.
  """
  weights = {'a': Static(FPFormat.parse('E2M1'), 1.0),
             'b': Static(FPFormat.parse('E1M2'), 1.0),
             'end': Static(FPFormat.parse('E4M3'), 1.0), 'full': Full()}
  # Of weights and inputs; of the layers left out the ratios are not 1 either.
  losses = {'int': {'a': (2, 3), 'b': (8, 12), 'end': (9, 1), 'full': (9, 1)},
            'signed_fp': {'a': (1, 4), 'b': (1, 1), 'end': (1, 1),
                          'full': (1, 1)},
            'msfp': {'a': (1, 1), 'b': (1, 1), 'end': (1, 1), 'full': (1, 1)}}
  layers = {recipe: {name: LayerSpec(
      'conv', '', weights[name], stats={'weight_mse': w, 'act_mse': a})
                     for name, (w, a) in rows.items()}
            for recipe, rows in losses.items()}
  assert errors.ratios(layers) == [['conv', '2', '4.00', '3.00', '6.00']]


@pytest.mark.slow
@pytest.mark.usefixtures('on_cpu')
def test_layers_of_a_packed_model_are_found_and_run():
  """Those of packed weights, the most work first; each runs by itself."""
  model = toy.deployed().packed()
  x = jnp.ones((2, *toy.SHAPE))
  found = packed_layers.cases(model, toy.params(), x, jnp.ones(2))
  assert [case.names for case in found] == [['conv_in'], ['conv_out']]
  for case, names, channels in zip(
      found, [('E2M1', 'UE2M2'), ('E1M1', 'E2M1')], [(1, 4), (4, 1)],
      strict=True):
    assert packed_layers.formats(case.layer) == names
    assert case.flop == 2 * 9 * 4 * (2 * 8 * 8)
    y = case.run(case.layer, jnp.ones(case.x), None)
    assert (case.x[-1], y.shape) == (channels[0], (2, 8, 8, channels[1]))
    assert case.fell_back() == ''
  assert packed_layers.count_fallen(found) == 0
