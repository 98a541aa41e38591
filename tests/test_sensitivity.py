"""What parts of a model cost, against models that have only those parts."""

import dataclasses
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from msfp_jax import data
from msfp_jax import diffusion
from msfp_jax.kernels import apply as apply_lib
from msfp_jax.metrics import similarity
from msfp_jax.quant.around import Around
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.quantizers import Full
from msfp_jax.report import page
from msfp_jax.report import sensitivity as section_lib
from msfp_jax.run import sensitivity

KEY = jax.random.key(2)
X = jax.random.normal(jax.random.key(0), (3, *toy.SHAPE))
ROLES = {'conv_in': 'in', 'temb': 'time', 'conv_out': 'out'}
NOTHING, INPUT, WEIGHT, BOTH = (False, False), (True, False), (False, True), (
    True, True)


@pytest.fixture(scope='module')
def deployed():
  """Two banks in the first layer, one a step; the time stays as it is."""
  return toy.deployed()


@pytest.fixture(scope='module')
def found(deployed):
  return sensitivity.Sensitivity(
      toy.Toy(), toy.params(), toy.plan(), X, key=KEY).of(deployed, ROLES)


def images(deployed, *steps):
  """Of a sampler whose model has, at each step, these parts quantized."""
  layers = [{
      name: {NOTHING: QLayer(None), INPUT: QLayer(None, layer.input),
             WEIGHT: layer.replace(input=Full()), BOTH: layer}[
                 parts.get(name, NOTHING)]
      for name, layer in deployed.layers.items()} for parts in steps]
  models = [dataclasses.replace(
      deployed, params=toy.params(), layers=found, choices={
          name: choice for name, choice in deployed.choices.items()
          if found[name].weight is not None}) for found in layers]

  def predict(x, t, index):
    return sum(jnp.where(index == i, model.eps_fn(x, t, i), 0)
               for i, model in enumerate(models))

  return np.asarray(data.to_uint8(diffusion.sample(
      predict, toy.plan(), X, KEY)))


def both(deployed, parts):
  return images(deployed, parts, parts)


ALL = {'conv_in': BOTH, 'conv_out': BOTH}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
CASES = [
    (('layers', 'conv_in', 'alone'), [{'conv_in': BOTH}] * 2),
    slow(('layers', 'conv_in', 'restored'), [{'conv_out': BOTH}] * 2),
    slow(('steps', 0, 'alone'), [ALL, {}]),
    (('steps', 0, 'restored'), [{}, ALL]),
    (('groups', 'weights', 'alone'), [dict.fromkeys(ALL, WEIGHT)] * 2),
    (('groups', 'inputs', 'alone'), [dict.fromkeys(ALL, INPUT)] * 2),
    slow(('groups', 'out', 'alone'), [{'conv_out': BOTH}] * 2),
    (('groups', 'out, inputs', 'restored'),
     [{'conv_in': BOTH, 'conv_out': WEIGHT}] * 2),
]


@pytest.mark.parametrize(('where', 'steps'), CASES, ids=str)
def test_a_part_costs_what_a_model_with_it_alone_shows(
    deployed, found, where, steps):
  kind, part, way = where
  cost = found[kind]
  part = list(cost)[part] if isinstance(part, int) else part
  expected = similarity.psnr(
      images(deployed, *steps), images(deployed, {}, {}))
  assert cost[part][way] == pytest.approx(expected, abs=0.02)
  assert 3 < expected < 60  # a cost, and not all


def test_all_of_it_is_what_the_model_samples(deployed, found):
  assert found['images'] == 3
  assert found['quantized'] == pytest.approx(similarity.psnr(
      np.asarray(data.to_uint8(deployed.sample(X, key=KEY))),
      images(deployed, {}, {})), abs=0.02)
  # What is in full precision, and its role, costs nothing and has no row.
  assert set(found['layers']) == {'conv_in', 'conv_out'}
  assert not any('time' in part for part in found['groups'])
  assert len(found['steps']) == 2


@pytest.mark.slow
def test_packed_weights_cost_the_same(deployed, found):
  other = sensitivity.Sensitivity(
      toy.Toy(), toy.params(), toy.plan(), X, key=KEY).of(
          deployed.packed(), ROLES)
  for kind in ('layers', 'steps', 'groups'):
    for part, cost in found[kind].items():
      assert other[kind][part] == pytest.approx(cost, abs=0.02)


@pytest.mark.slow
def test_biases_that_were_trained_count(deployed):
  """Of a layer in full precision too, which then has a row."""
  moved = toy.params()
  moved['temb']['bias'] = moved['temb']['bias'] + 0.5
  model = dataclasses.replace(deployed, params={**deployed.params, **{
      'temb': moved['temb']}})
  other = sensitivity.Sensitivity(
      toy.Toy(), toy.params(), toy.plan(), X, key=KEY).of(model)
  assert other['quantized'] == pytest.approx(similarity.psnr(
      np.asarray(data.to_uint8(model.sample(X, key=KEY))),
      images(deployed, {}, {})), abs=0.02)
  assert set(other['layers']) == {'conv_in', 'temb', 'conv_out'}
  assert other['layers']['temb']['alone'] < 40


def test_what_stands_around_a_product_stays_with_either_side():
  """Smoothing, rotation and branch, against the formula in float64."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  kernel, bias, x = normal(8, 4), normal(4), normal(5, 8)
  around = Around(smooth=jnp.exp(normal(8)), rotation=4,
                  down=normal(8, 2).astype(jnp.bfloat16),
                  up=normal(2, 4).astype(jnp.bfloat16))
  quantizer = toy.quantizer('E2M1')
  weight = jax.tree.map(lambda part: part[None], toy.Static(
      quantizer.fmt, jnp.full((1, 4), 0.25)).quantize(
          around.residual(kernel), axis=-2)).bank(0)
  layer = QLayer(weight, quantizer, bias + 1, around)
  neither, inputs, weights, both = sensitivity._ways(
      layer, {'kernel': kernel, 'bias': bias}, None)
  module = nn.Dense(4)
  run = lambda way: np.float64(apply_lib.run_layer(module, x, way))
  exact = np.float64(x) @ np.float64(kernel) + np.float64(bias)
  np.testing.assert_allclose(run(neither), exact, rtol=1e-5, atol=1e-5)
  seen = np.float64(around.input(x))
  rounded = np.float64(quantizer.fake_quant(around.input(x)))
  rest, branch = np.float64(around.residual(kernel)), np.float64(
      around.low_rank())
  np.testing.assert_allclose(
      run(inputs), rounded @ rest + seen @ branch + np.float64(bias),
      rtol=1e-5, atol=1e-5)
  levels = np.float64(weight.dequantize())
  np.testing.assert_allclose(
      run(weights), seen @ (levels + branch) + np.float64(bias) + 1,
      rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(
      run(both), rounded @ levels + seen @ branch + np.float64(bias) + 1,
      rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_samples_that_run_away_are_left_out_and_not_black(deployed):
  """Bytes would make 0 of NaN, which compares like any image."""
  broken = dataclasses.replace(deployed, layers=deployed.layers | {
      'conv_out': deployed.layers['conv_out'].replace(
          bias=jnp.full((1,), jnp.nan))})
  with pytest.raises(ValueError, match='NaN'):
    sensitivity.Sensitivity(
        toy.Toy(), toy.params(), toy.plan(), X, key=KEY).of(broken)


def test_the_report_names_the_worst_and_sorts_by_number():
  cost = lambda alone, restored: {'alone': alone, 'restored': restored}
  layers = {f'layer{i}': cost(40.0, 20.0 + i / 8) for i in range(30)}
  rows = [{'name': 'fp'}, {'name': 'mine', 'sensitivity': {
      'images': 4, 'quantized': 20.0, 'layers': layers,
      'steps': {'0: t = 750': cost(30.0, 20.5)},
      'groups': {'inputs': cost(21.0, 27.0), 'weights': cost(27.0, 21.0)}}}]
  source = types.SimpleNamespace(results={'rows': rows}, row='mine')
  made = section_lib.section(source)
  text = made.content['text']
  assert ('20.0 dB with all of it quantized, 27.0 dB with its weights alone '
          'and 21.0 dB with its inputs alone') in text
  worst, best = text.split('cost least')
  assert 'layer29 (+3.62 dB)' in worst and 'layer20 (' in worst
  assert 'layer0 (+0.00 dB)' in best and 'layer10 (' not in best
  html = page.render('title', [made])
  assert html.count('<tr>') == 1 + 30 + 1 + 2
  assert 'data-value="3.625"' in html
  assert section_lib.section(types.SimpleNamespace(
      results={'rows': rows[:1]}, row='fp')) is None
