"""The figures that benchmarks compute from the files of runs."""

import jax.numpy as jnp
import pytest
import toy

from benchmarks import errors
from benchmarks import packed_layers
from benchmarks import ranks
from benchmarks import routing
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


@pytest.mark.usefixtures('on_cpu')
def test_layers_of_a_packed_model_are_found_and_run():
  """Those of packed weights, the most work first; each runs by itself."""
  model = toy.deployed().packed()
  x = jnp.ones((2, *toy.SHAPE))
  found = packed_layers.cases(model, toy.params(), x, jnp.ones(2))
  assert [case.names for case in found] == [['conv_in'], ['conv_out']]
  for case, formats, channels in zip(
      found, [('E2M1', 'UE2M2'), ('E1M1', 'E2M1')], [(1, 4), (4, 1)],
      strict=True):
    assert packed_layers.formats(case.layer) == formats
    assert case.flop == 2 * 9 * 4 * (2 * 8 * 8)
    y = case.run(case.layer, jnp.ones(case.x), None)
    assert (case.x[-1], y.shape) == (channels[0], (2, 8, 8, channels[1]))
    assert case.fell_back() == ''
  assert packed_layers.count_fallen(found) == 0
