"""LoRAs beside quantized products: what they add, and what they leave alone."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
import toy

import msfp_jax as msfp
from msfp_jax import kernels
from msfp_jax.convert.lora import Lora
from msfp_jax.convert.lora import LowRank
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import adapter as adapter_lib
from msfp_jax.quant.around import Around
from msfp_jax.quant.block import Block
from msfp_jax.quant.geometry import Geometry
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Static

E2M1 = FPFormat.parse('E2M1')
# What bfloat16 and float32 round by, relative.
HALF, SINGLE = 2.0**-8, 2.0**-24
# Compiling takes longer than running.
_jit = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def product(x, w, geometry):
  """The layer's product in float64, a tap at a time."""
  x, w = np.float64(x), np.float64(w)
  if geometry is None:
    return x @ w
  (stride, _), (pad, _) = geometry.strides, geometry.padding
  x = np.pad(x, [(0, 0), pad, pad, (0, 0)])
  rows, columns = ((n - k) // stride + 1
                   for n, k in zip(x.shape[1:3], w.shape[:2], strict=True))
  return sum(
      x[:, i:i + stride * rows:stride, j:j + stride * columns:stride] @ w[i, j]
      for i, j in np.ndindex(*w.shape[:2]))


def low_rank(x, parts, geometry):
  """What adapters add, in float64, and a sum of the sizes of all terms."""
  total = size = 0
  for down, up, factor in parts:
    total = total + factor * (product(x, down, geometry) @ np.float64(up))
    size = size + abs(factor) * (
        product(np.abs(x), np.abs(np.float64(down)), geometry)
        @ np.abs(np.float64(up)))
  return total, size


GEOMETRIES = {
    'dense': (None, ()), 'pointwise': (
        Geometry((1, 1), ((0, 0), (0, 0)), (1, 1)), (1, 1)),
    '3x3': (Geometry((1, 1), ((1, 1), (1, 1)), (1, 1)), (3, 3)),
    'stride': (Geometry((2, 2), ((1, 1), (1, 1)), (1, 1)), (3, 3))}
INPUTS = {'static': Static(E2M1, np.float32(0.4)),
          'block': Block(E2M1, group=4), 'full': Full()}
AROUNDS = {
    'nothing': Around(), 'moved': Around(
        smooth=np.float32([0.1, 9, 1, 4, 0.5, 2, 8, 0.3]), rotation=4),
    'branch': Around(down=normal(8, 2, seed=7).astype(ml_dtypes.bfloat16),
                     up=normal(2, 6, seed=8).astype(ml_dtypes.bfloat16))}


@pytest.mark.parametrize('place, around, act, exact', [
    ('dense', 'nothing', 'static', False), ('dense', 'moved', 'static', True),
    ('dense', 'branch', 'block', True), ('dense', 'nothing', 'full', True),
    ('pointwise', 'nothing', 'static', True), ('3x3', 'moved', 'static', True),
    ('stride', 'nothing', 'static', True), ('stride', 'moved', 'full', False)])
def test_a_layer_adds_what_loras_do_to_its_own_input(
    place, around, act, exact):
  """Of several LoRAs the sum, whatever the recipe does to the input.

  Values that bfloat16 holds come out as float32 has them; others within the
  rounding of both factors.
  """
  geometry, window = GEOMETRIES[place]
  x = normal(*((2, 6, 4, 8) if geometry else (3, 8)), seed=1)
  weight = Static(E2M1, jnp.float32(0.2)).quantize(
      jnp.asarray(normal(*window, 8, 6, seed=2)), axis=-2)
  layer = QLayer(weight, INPUTS[act], jnp.asarray(normal(6, seed=3)),
                 AROUNDS[around])
  parts = [(normal(*window, 8, 3, seed=4), normal(3, 6, seed=5), 0.75),
           (normal(*window, 8, 1, seed=6), normal(1, 6, seed=7), -2.0)]
  if exact:
    kinds = ml_dtypes.bfloat16, np.float16
    parts = [(down.astype(kind), up.astype(kind), factor)
             for (down, up, factor), kind in zip(parts, kinds, strict=True)]
  run = _jit(lambda layer, x: kernels.run(layer, x, geometry))
  without = np.float64(run(layer, x))
  actual = np.float64(run(layer.replace(adapter=adapter_lib.join(parts)), x))
  added, size = low_rank(x, parts, geometry)
  # float32's sums, of at most 9 x 8 terms, then 4; and of the layer's own.
  bound = 80 * SINGLE * (size + np.abs(without) + np.abs(actual))
  if not exact:
    bound = bound + ((1 + HALF)**2 - 1) * size
  assert (np.abs(actual - without - added) <= bound).all()
  assert np.abs(added).max() > 1


def of_layers(layers, scale=1.0, source='mine'):
  return Lora(source, {name: LowRank(down, up, scale)
                       for name, (down, up) in layers.items()})


def lora(seed=0, scale=0.5):
  """For every layer of the toy; values that bfloat16 holds."""
  return of_layers({
      name: tuple(np.float32(half.astype(ml_dtypes.bfloat16)) for half in (
          0.5 * normal(*inputs, 2, seed=seed + i),
          0.5 * normal(2, outputs, seed=seed + 9 + i)))
      for i, (name, *inputs, outputs) in enumerate((
          ('conv_in', 3, 3, 1, 4), ('temb', 2, 4), ('conv_out', 3, 3, 4, 1)))},
                   scale)


@functools.cache
def deployed():
  return toy.deployed()


X, T = normal(3, *toy.SHAPE, seed=20), np.full(3, 500, np.float32)


def predict(model, index=1):
  return _jit(lambda arrays: model.with_arrays(arrays).eps_fn(X, T, index))(
      model.arrays)


def test_beside_full_precision_they_are_as_if_merged():
  """Every layer of a model, and two LoRAs at once."""
  loras = [(lora(), 1.5), (lora(5), -0.25)]
  model = packed_lib.full_precision(toy.Toy(), toy.params(), toy.plan())
  merged = msfp.merge_loras(toy.params(), loras)
  expected = toy.Toy().apply({'params': merged}, X, T)
  actual = predict(model.with_loras(loras))
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
  assert np.abs(actual - predict(model)).max() > 0.1


@pytest.mark.slow
def test_beside_codes_they_are_what_they_are_beside_the_simulation():
  """And neither is packed anew."""
  packed = deployed().packed()
  loras = [(lora(), 0.5)]
  both = [model.with_loras(loras) for model in (deployed(), packed)]
  np.testing.assert_array_equal(*map(predict, both))
  assert np.abs(predict(both[1]) - predict(packed)).max() > 0.1
  for name, layer in both[1].layers.items():
    assert layer.weight is packed.layers[name].weight
  tiny.assert_trees_equal(
      deployed().with_loras(loras).packed().arrays, both[1].arrays)


def test_they_are_where_the_model_is():
  """On the device of one that is there, on the host with what `pack` made."""
  packed = deployed().packed()
  on_device = packed.with_arrays(jax.device_put(packed.arrays))
  for model, kind in ((packed, np.ndarray), (on_device, jax.Array)):
    found = model.with_loras([(lora(), 0.5)])
    assert all(isinstance(leaf, kind) for leaf in jax.tree.leaves(found.arrays))


@pytest.mark.parametrize('implementation', kernels.IMPLEMENTATIONS)
def test_weights_in_a_kernels_layout_are_of_the_same_shape(implementation):
  packed = deployed().packed().with_implementation(implementation)
  found = packed.with_loras([(lora(), 0.5)]).layers
  assert all(layer.adapter is not None for layer in found.values())


@pytest.mark.parametrize('loras', [
    [], [(lora(), 0.0)], [(lora(), 0), (lora(5), -0.0)]])
def test_strength_0_is_no_lora(loras):
  """Not a bit differs: nothing is added, not even 0."""
  packed = deployed().packed()
  other = packed.with_loras([(lora(), 1.0)]).with_loras(loras)
  tiny.assert_trees_equal(other.arrays, packed.arrays)
  np.testing.assert_array_equal(
      np.asarray(predict(other)).view(np.uint32),
      np.asarray(predict(packed)).view(np.uint32))


def test_loras_of_strength_0_leave_the_others():
  packed = deployed().packed()
  tiny.assert_trees_equal(
      packed.with_loras([(lora(5), 0.0), (lora(), 0.5)]).arrays,
      packed.with_loras([(lora(), 0.5)]).arrays)


class Counted(nn.Module):
  """The toy's layers, which note when they are traced."""

  traces = []

  @nn.compact
  def __call__(self, x, t):
    Counted.traces.append(x.shape)
    h = nn.Conv(4, (3, 3), name='conv_in')(x)
    time = jnp.stack([t, 1000 - t], axis=-1) / 1000
    h = h + nn.Dense(4, name='temb')(time)[:, None, None]
    return nn.Conv(x.shape[-1], (3, 3), name='conv_out')(nn.silu(h))


@pytest.mark.slow
def test_another_strength_compiles_nothing():
  """Nor does another LoRA of the same rank; strength 0 is what was before."""
  packed = deployed().packed()
  packed = packed_lib.PackedModel(
      Counted(), packed.params, packed.layers, packed.choices, packed.plan)
  draw = lambda model: np.asarray(model.sample(X, key=jax.random.key(0)))
  count = lambda: len(Counted.traces)
  without = draw(packed)
  first = draw(packed.with_loras([(lora(), 0.5)]))
  traced = count()
  changed = packed.with_loras([(lora(), 0.75)])
  seen = [without, first, draw(changed), draw(changed.with_loras(
      [(lora(5), 0.75)]))]
  np.testing.assert_array_equal(draw(changed.with_loras([])), without)
  np.testing.assert_array_equal(
      draw(changed.with_loras([(lora(), 0.5)])), first)
  assert count() == traced > 0
  for i, one in enumerate(seen):
    for other in seen[:i]:
      assert np.abs(one - other).max() > 1e-2


def test_a_traced_strength():
  """One program for all of them, by which there are gradients."""
  model = deployed()
  mean = _jit(jax.value_and_grad(lambda strength: model.with_loras(
      [(lora(), strength), (lora(5), 0.5)]).eps_fn(X, T, 1).mean()))
  value, slope = mean(0.75)
  expected = predict(model.with_loras([(lora(), 0.75), (lora(5), 0.5)])).mean()
  np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
  assert slope != 0


@pytest.mark.parametrize('loras, error, part', [
    ([(of_layers({'body': (np.ones((3, 1)), np.ones((1, 4)))}), 1)],
     ValueError, r"mine belongs to another model: 1 of its 1.*\['body'\]"),
    ([(of_layers({'conv_in': (np.ones((3, 3, 2, 1)), np.ones((1, 4)))}), 1)],
     ValueError, 'belongs to another model'),
    ([(of_layers({'conv_in': (np.ones((3, 3, 1, 1)), np.ones((1, 5)))}), 1)],
     ValueError, 'belongs to another model'),
    ([(of_layers({'temb': (np.ones((3, 1)), np.ones((1, 4)))}), 1)],
     ValueError, 'belongs to another model'),
    ([(lora(), np.inf)], ValueError, 'strength inf of mine'),
    (['style.safetensors'], TypeError, 'must be pairs'),
    ([('style.safetensors', 1)], TypeError, 'what msfp.load_lora')])
@pytest.mark.parametrize('packs', [True, False])
def test_loras_of_other_models_are_refused_by_name(loras, error, part, packs):
  model = deployed().packed() if packs else deployed()
  with pytest.raises(error, match=part):
    model.with_loras(loras)


def test_no_file_of_a_model_loses_its_loras_in_silence(tmp_path):
  packed = deployed().packed().with_loras([(lora(), 0.5)])
  with pytest.raises(ValueError, match=r'save model.with_loras\(\[\]\)'):
    msfp.save(tmp_path / 'a.safetensors', packed)
  assert not list(tmp_path.iterdir())


def test_their_effect_is_not_taken_for_drift():
  """And a drift that is corrected stays so where LoRAs are added."""
  loras = [(lora(), 0.5)]
  with pytest.raises(ValueError, match=r'correct model.with_loras\(\[\]\)'):
    msfp.correct_drift(deployed().with_loras(loras), toy.params(), X)
  corrected = dataclasses.replace(
      deployed(), drift=np.full((2, 1), 0.5, np.float32))
  np.testing.assert_allclose(
      predict(corrected.with_loras(loras)),
      predict(deployed().with_loras(loras)) - 0.5, atol=1e-6)
