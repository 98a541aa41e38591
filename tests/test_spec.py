"""Specs as JSON."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantizers import Quantizer


def random_quantizer(fmt, shape, zero_point):
  """Draws a quantizer with scales of all 24 bits, over many binades."""
  rng = np.random.default_rng(len(shape))
  array = lambda a: jnp.asarray(a, jnp.float32)
  return Quantizer(
      FPFormat.parse(fmt), array(np.exp(rng.uniform(-30, 30, shape))),
      array(-rng.uniform(0, 1, shape)) if zero_point else None)


def example():
  return spec_lib.QuantSpec('msfp', {
      'conv_in': spec_lib.LayerSpec(
          'conv_in', 'NAL', random_quantizer('E4M3', (1, 1, 1, 5), False),
          random_quantizer('E2M1', (), False),
          {'act_min': -1 / 3, 'act_max': 1e-30}),
      'mid.block_1.temb_proj': spec_lib.LayerSpec(
          'temb_proj', 'AAL', random_quantizer('UE1M3', (1, 7), True),
          random_quantizer('UE2M2', (), True)),
      'a.b': spec_lib.LayerSpec('conv', 'AAL', None, None),
  })


def assert_same(a, b):
  assert (a.recipe, list(a.layers)) == (b.recipe, list(b.layers))
  for name, layer in a.layers.items():
    other = b.layers[name]
    assert (layer.role, layer.kind, dict(layer.stats)) == (
        other.role, other.kind, dict(other.stats))
    for part in ('weight', 'act'):
      one, two = getattr(layer, part), getattr(other, part)
      tiny.assert_trees_equal(one, two)  # the formats are in the structure
      if one is not None:
        assert np.shape(one.scale) == np.shape(two.scale)
        assert two.scale.dtype == jnp.float32


def test_json_there_and_back_is_exact():
  assert_same(spec_lib.QuantSpec.from_json(example().to_json()), example())


def test_file_there_and_back_is_exact(tmp_path):
  path = tmp_path / 'deep' / 'spec.json'
  example().save(path)
  assert_same(spec_lib.QuantSpec.load(path), example())
  assert [p.name for p in path.parent.iterdir()] == ['spec.json']


def test_json_can_be_read_by_people():
  text = example().to_json()
  content = json.loads(text)
  assert content['recipe'] == 'msfp'
  rows = content['layers']
  assert [row['layer'] for row in rows] == list(example().layers)
  assert rows[0]['role'] == 'conv_in' and rows[0]['class'] == 'NAL'
  assert rows[0]['weight']['format'] == 'E4M3'
  assert rows[0]['weight']['shape'] == [1, 1, 1, 5]
  assert len(rows[0]['weight']['scale']) == 5
  assert rows[0]['act']['format'] == 'E2M1'
  assert 'zero_point' not in rows[0]['act']
  assert rows[0]['stats'] == {'act_min': -1 / 3, 'act_max': 1e-30}
  assert rows[1]['act']['format'] == 'UE2M2'
  assert len(rows[1]['act']['zero_point']) == 1
  assert rows[2]['weight'] is None and rows[2]['act'] is None
  for name in example().layers:  # a line per layer, to grep for
    assert sum(f'"layer": "{name}"' in line for line in text.split('\n')) == 1


def damaged(change):
  content = json.loads(example().to_json())
  change(content)
  return json.dumps(content)


@pytest.mark.parametrize('text', [
    '', '[]', 'null', '3', '{}', example().to_json()[:-20],
    damaged(lambda c: c.update(format='msfp-jax/spec/99')),
    damaged(lambda c: c.pop('recipe')),
    damaged(lambda c: c.update(layers=None)),
    damaged(lambda c: c['layers'].append('conv')),
    damaged(lambda c: c['layers'][0].pop('class')),
    damaged(lambda c: c['layers'][0].update(act='E2M1')),
    damaged(lambda c: c['layers'][0]['act'].update(format='FP4')),
    damaged(lambda c: c['layers'][0]['act'].update(format=None)),
    damaged(lambda c: c['layers'][0]['act'].update(scale=['wide'])),
    damaged(lambda c: c['layers'][0]['weight'].update(shape=[3])),
])
def test_what_is_no_spec_is_refused(text):
  with pytest.raises(ValueError, match='not a quantization spec'):
    spec_lib.QuantSpec.from_json(text)


def test_errors_name_what_is_wrong():
  wrong = damaged(lambda c: c['layers'][0]['act'].update(format='E9'))
  with pytest.raises(ValueError, match='E9'):
    spec_lib.QuantSpec.from_json(wrong)
  other = damaged(lambda c: c.update(format='msfp-jax/spec/99'))
  with pytest.raises(ValueError, match='spec/99.*expected.*spec/1'):
    spec_lib.QuantSpec.from_json(other)


@pytest.mark.parametrize('scale', [0.0, -1.0, float('nan'), float('inf')])
def test_scales_that_cannot_be_are_refused(scale):
  """Scales of a file damaged by hand are refused, not turned to NaN images."""
  wrong = damaged(lambda c: c['layers'][0]['act'].update(scale=[scale]))
  with pytest.raises(ValueError, match='not a quantization spec.*scale'):
    spec_lib.QuantSpec.from_json(wrong)
