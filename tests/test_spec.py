"""Specs as JSON: there and back, for people, from version 1, and damaged."""

import json
import pathlib

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.around import Around
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Quantizer
from msfp_jax.quant.quantizers import Static

GOLDEN = pathlib.Path(__file__).parent / 'golden'


def random_quantizer(fmt, shape, zero_point, **options):
  """Draws a quantizer with scales of all 24 bits, over many binades."""
  rng = np.random.default_rng(len(shape))
  array = lambda a: jnp.asarray(a, jnp.float32)
  return Static(
      FPFormat.parse(fmt), array(np.exp(rng.uniform(-30, 30, shape))),
      array(-rng.uniform(0, 1, shape)) if zero_point else None, **options)


def example():
  """Layers with every kind of quantizer, and with all that stands around."""
  rng = np.random.default_rng(3)
  half = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
  return spec_lib.QuantSpec('msfp', {
      'conv_in': spec_lib.LayerSpec(
          'conv_in', 'NAL', random_quantizer('E4M3', (1, 1, 1, 5), False),
          random_quantizer('E2M1', (), False),
          stats={'act_min': -1 / 3, 'act_max': 1e-30}),
      'mid.block_1.temb_proj': spec_lib.LayerSpec(
          'temb_proj', 'AAL', random_quantizer('UE1M3', (1, 7), True),
          random_quantizer('UE2M2', (), True)),
      'a.b': spec_lib.LayerSpec('conv', 'AAL'),
      'steps': spec_lib.LayerSpec(
          'conv', 'NAL', Full(),
          random_quantizer('E2M1', (4,), False, by_step=True)),
      'blocks': spec_lib.LayerSpec(
          'conv', '', Block(FPFormat.parse('E2M1'), group=16,
                            scale_type='e4m3', two_level=True),
          Block(FPFormat.parse('UE2M2'), shared='token'),
          Around(smooth=jnp.asarray(rng.uniform(0.5, 2, 8), jnp.float32),
                 down=half(3, 3, 8, 2), up=half(2, 6), rotation=8))})


def assert_same(a, b):
  assert (a.recipe, list(a.layers)) == (b.recipe, list(b.layers))
  for name, layer in a.layers.items():
    other = b.layers[name]
    assert (layer.role, layer.kind, dict(layer.stats)) == (
        other.role, other.kind, dict(other.stats))
    for part in ('weight', 'act', 'around'):
      one, two = getattr(layer, part), getattr(other, part)
      assert type(one) is type(two)
      # Formats, groups and the like are in the structure.
      tiny.assert_trees_equal(one, two)
      for x, y in zip(leaves(one), leaves(two), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


def leaves(tree):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


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
  assert (content['format'], content['recipe']) == ('msfp-jax/spec/2', 'msfp')
  rows = content['layers']
  assert [row['layer'] for row in rows] == list(example().layers)
  assert rows[0]['role'] == 'conv_in' and rows[0]['kind'] == 'NAL'
  assert rows[0]['weight']['fmt'] == 'E4M3'
  assert rows[0]['weight']['scale']['shape'] == [1, 1, 1, 5]
  assert len(rows[0]['weight']['scale']['values']) == 5
  assert rows[0]['act']['fmt'] == 'E2M1'
  assert 'zero_point' not in rows[0]['act']
  assert rows[0]['stats'] == {'act_min': -1 / 3, 'act_max': 1e-30}
  assert rows[1]['act']['fmt'] == 'UE2M2'
  assert -1 < rows[1]['act']['zero_point']['value'] < 0
  assert rows[2]['weight'] == rows[2]['act'] == {'kind': 'Full'}
  assert rows[4]['weight'] == {
      'kind': 'Block', 'fmt': 'E2M1', 'group': 16, 'scale_type': 'e4m3',
      'two_level': True}
  for name in example().layers:  # a line per layer, to grep for
    assert sum(f'"layer": "{name}"' in line for line in text.split('\n')) == 1


# As version 1 wrote it.
FIRST = '''{"format": "msfp-jax/spec/1", "recipe": "msfp", "layers": [
{"layer": "conv", "role": "conv", "class": "AAL",
 "weight": {"format": "E2M1", "shape": [1, 2], "scale": [0.25, 0.1]},
 "act": {"format": "UE2M2", "shape": [], "scale": [0.3],
         "zero_point": [-0.2]}, "stats": {"act_mse": 0.5}},
{"layer": "out", "role": "conv_out", "class": "NAL", "weight": null,
 "act": null, "stats": {}}
]}'''


def test_specs_of_version_1_load():
  array = lambda value: jnp.asarray(value, jnp.float32)
  assert_same(spec_lib.QuantSpec.from_json(FIRST), spec_lib.QuantSpec('msfp', {
      'conv': spec_lib.LayerSpec(
          'conv', 'AAL', Static(FPFormat.parse('E2M1'), array([[0.25, 0.1]])),
          Static(FPFormat.parse('UE2M2'), array(0.3), array(-0.2)),
          stats={'act_mse': 0.5}),
      'out': spec_lib.LayerSpec('conv_out', 'NAL')}))


def damaged(change):
  content = json.loads(example().to_json())
  del content['digest']  # as of a file that was written by hand
  change(content)
  return json.dumps(content)


@pytest.mark.parametrize('text', [
    '', '[]', 'null', '3', '{}', example().to_json()[:-20],
    damaged(lambda c: c.update(format='msfp-jax/spec/99')),
    damaged(lambda c: c.pop('recipe')),
    damaged(lambda c: c.update(layers=None)),
    damaged(lambda c: c['layers'].append('conv')),
    damaged(lambda c: c['layers'][0].pop('kind')),
    damaged(lambda c: c['layers'][0].update(act='E2M1')),
    damaged(lambda c: c['layers'][0]['act'].update(fmt='FP4')),
    damaged(lambda c: c['layers'][0]['act'].update(fmt=None)),
    damaged(lambda c: c['layers'][0]['act'].update(colour=3)),
    damaged(lambda c: c['layers'][0]['act'].update(kind='Odd')),
    damaged(lambda c: c['layers'][0]['act'].update(scale=['wide'])),
    damaged(lambda c: c['layers'][0]['weight']['scale'].update(shape=[3])),
    damaged(lambda c: c['layers'][0]['act'].update(by_step='no')),
    damaged(lambda c: c['layers'][0]['act'].update(scale='wide')),
    damaged(lambda c: c['layers'][0]['act'].pop('scale')),
    damaged(lambda c: c['layers'][4]['weight'].update(group=0)),
    damaged(lambda c: c['layers'][4]['weight'].update(scale_type='e3m3')),
    damaged(lambda c: c['layers'][4]['around']['down'].update(dtype='int64')),
    damaged(lambda c: c['layers'][4]['around']['down'].update(base64='%')),
    damaged(lambda c: c['layers'][4]['around'].update(rotation=3)),
    damaged(lambda c: c['layers'][4]['around'].update(sideways=0)),
    FIRST.replace('[0.3]', '[-0.3]'), FIRST.replace('UE2M2', 'FP4'),
])
def test_what_is_no_spec_is_refused(text):
  with pytest.raises(ValueError, match='not a quantization spec'):
    spec_lib.QuantSpec.from_json(text)


def test_errors_name_what_is_wrong():
  wrong = damaged(lambda c: c['layers'][0]['act'].update(fmt='E9'))
  with pytest.raises(ValueError, match='E9'):
    spec_lib.QuantSpec.from_json(wrong)
  other = damaged(lambda c: c.update(format='msfp-jax/spec/99'))
  with pytest.raises(ValueError, match='spec/99.*expected.*spec/2'):
    spec_lib.QuantSpec.from_json(other)


@pytest.mark.parametrize('scale', [0.0, -1.0, float('nan'), float('inf')])
def test_scales_that_cannot_be_are_refused(scale):
  """Scales of a file damaged by hand are refused, not turned to NaN images."""
  wrong = damaged(
      lambda c: c['layers'][0]['act'].update(scale={'value': scale}))
  with pytest.raises(ValueError, match='not a quantization spec.*(scale|fini)'):
    spec_lib.QuantSpec.from_json(wrong)


@pytest.mark.parametrize('field', ['smooth', 'down', 'up'])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_what_stands_around_a_layer_is_finite(field, value):
  around = example().layers['blocks'].around
  wrong = getattr(around, field).at[0].set(value)
  spec = spec_lib.QuantSpec('mine', {'a': spec_lib.LayerSpec(
      'conv', '', around=around.replace(**{field: wrong}))})
  with pytest.raises(ValueError, match=f'not a quantization spec.*{field}'):
    spec_lib.QuantSpec.from_json(spec.to_json())


def test_a_quantizer_of_ones_own_comes_back():
  """A subclass is known by its name: nothing is registered by hand."""

  @flax.struct.dataclass
  class Halves(Quantizer):
    fmt: FPFormat = flax.struct.field(pytree_node=False)
    share: jax.Array
    bits = property(lambda self: self.fmt.bits)

  try:
    spec = spec_lib.QuantSpec('mine', {'a': spec_lib.LayerSpec(
        'conv', '', Halves(FPFormat.parse('E2M1'), jnp.float32(0.3)), Full())})
    assert_same(spec_lib.QuantSpec.from_json(spec.to_json()), spec)
  finally:
    del Quantizer.KINDS['Halves']


def test_a_spec_that_version_1_wrote_loads():
  """What the file says, read by hand: scales, zero points, None for full."""
  path = GOLDEN / 'spec_1.json'
  content = json.loads(path.read_text())
  assert content['format'] == 'msfp-jax/spec/1'
  spec = spec_lib.QuantSpec.load(path)
  assert spec.recipe == content['recipe']
  assert list(spec.layers) == [row['layer'] for row in content['layers']]
  zero_points = 0
  for row, layer in zip(content['layers'], spec.layers.values(), strict=True):
    assert (layer.role, layer.kind, dict(layer.stats)) == (
        row['role'], row['class'], row['stats'])
    for side in ('weight', 'act'):
      quantizer, written = getattr(layer, side), row[side]
      if written is None:
        assert quantizer.is_full
        continue
      assert str(quantizer.fmt) == written['format']
      for key in ('scale', 'zero_point'):
        value = getattr(quantizer, key)
        assert (value is None) == (key not in written)
        if value is not None:
          assert list(value.shape) == written['shape']
          np.testing.assert_array_equal(
              np.ravel(value), np.float32(written[key]))
      zero_points += quantizer.zero_point is not None
  assert zero_points and any(
      layer.weight.is_full for layer in spec.layers.values())
  # Written again it is of version 2, and the same.
  assert_same(spec_lib.QuantSpec.from_json(spec.to_json()), spec)


@pytest.mark.parametrize('change', [
    lambda row: row['act'].update(scale=[0.0]),
    lambda row: row['act'].update(scale=[float('nan')]),
    lambda row: row['act'].update(zero_point=[float('inf')]),
    lambda row: row['weight'].update(shape=[3]),
    lambda row: row['act'].pop('format')])
def test_a_damaged_spec_of_version_1_is_refused(change):
  content = json.loads((GOLDEN / 'spec_1.json').read_text())
  change(content['layers'][0])
  with pytest.raises(ValueError, match='not a quantization spec'):
    spec_lib.QuantSpec.from_json(json.dumps(content))


def test_a_file_that_is_no_spec_is_named(tmp_path):
  for content in (b'{', b'\xff', example().to_json().encode()[:300]):
    (tmp_path / 'a.json').write_bytes(content)
    with pytest.raises(ValueError, match='a.json: '):
      spec_lib.QuantSpec.load(tmp_path / 'a.json')


@pytest.mark.parametrize('change', [
    {'stats': 7}, {'stats': ['a']}, {'role': None}, {'kind': 5}])
def test_what_no_layer_has(change):
  content = json.loads(example().to_json())
  del content['digest']
  content['layers'][0] |= change
  with pytest.raises(ValueError, match='not a quantization spec.*a layer of'):
    spec_lib.QuantSpec.from_json(json.dumps(content))


@pytest.mark.parametrize('path, value', [
    (('weight', 'scale', 'values', 0), 1e300),
    (('act', 'scale', 'value'), 1e39)])
def test_numbers_beyond_float32_are_refused_without_a_warning(path, value):
  content = json.loads(example().to_json())
  del content['digest']
  place = content['layers'][0]
  for key in path[:-1]:
    place = place[key]
  place[path[-1]] = value
  with pytest.raises(ValueError, match='not a quantization spec'):
    spec_lib.QuantSpec.from_json(json.dumps(content))
