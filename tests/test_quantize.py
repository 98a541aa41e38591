"""Applying a spec: quantized kernels, quantized inputs, nothing forgotten."""

import dataclasses

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from msfp_jax.kernels.apply import apply
from msfp_jax.kernels.apply import QuantizedModel
from msfp_jax.quant import interception
from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.around import Around
from msfp_jax.quant.block import Block
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.qlayer import QLayer
from msfp_jax.quant.qtensor import QTensor
from msfp_jax.quant.quantize import quantize
from msfp_jax.quant.quantizers import Full
from msfp_jax.quant.quantizers import Quantizer
from msfp_jax.quant.quantizers import Static


def dequantized(qparams):
  """Puts plain arrays in place of quantized tensors."""
  return jax.tree.map(
      lambda leaf: leaf.dequantize() if isinstance(leaf, QTensor) else leaf,
      qparams, is_leaf=lambda leaf: isinstance(leaf, QTensor))


def without(spec, name):
  layers = {n: layer for n, layer in spec.layers.items() if n != name}
  return dataclasses.replace(spec, layers=layers)


def with_extra(spec, name):
  extra = next(iter(spec.layers.values()))
  return dataclasses.replace(spec, layers=spec.layers | {name: extra})


@pytest.mark.parametrize('recipe', ['msfp', 'int'])
def test_kernels_go_to_the_nearest_levels_of_their_channel(recipe):
  params, spec = tiny.params(tiny.NET), tiny.spec(tiny.NET, recipe)
  quantized = dequantized(quantize(params, spec))
  for name, layer in spec.layers.items():
    kernel = np.float64(params[name]['kernel'])
    scales = np.float64(layer.weight.scale).ravel()
    levels = layer.weight.fmt.levels()
    for c, scale in enumerate(scales):
      grid = levels * scale
      if layer.weight.zero_point is not None:
        grid = grid + np.float64(layer.weight.zero_point).ravel()[c]
      distances = np.abs(kernel[..., c, None] - grid)
      np.testing.assert_allclose(
          quantized[name]['kernel'][..., c], grid[distances.argmin(axis=-1)],
          rtol=1e-6, atol=1e-6 * np.abs(grid).max())
    assert len(set(scales)) == kernel.shape[-1]  # a scale for each


def test_biases_and_norms_stay():
  params = jax.device_get(tiny.params(tiny.UNET))
  quantized = jax.device_get(
      dequantized(quantize(params, tiny.spec(tiny.UNET))))
  changed = jax.tree.map(lambda a, b: (a != b).any(), params, quantized)
  for path, differs in jax.tree_util.tree_leaves_with_path(changed):
    assert differs == (path[-1].key == 'kernel'), path


def test_full_precision_layers_pass():
  spec = tiny.spec(tiny.NET)
  free = dataclasses.replace(
      spec.layers['body'], weight=Full(), act=Full())
  spec = dataclasses.replace(spec, layers=spec.layers | {'body': free})
  params = tiny.params(tiny.NET)
  tiny.assert_trees_equal(
      quantize(params, spec)['body'], params['body'])


def test_spec_and_parameters_must_name_the_same_layers():
  params, spec = tiny.params(tiny.NET), tiny.spec(tiny.NET)
  with pytest.raises(ValueError, match=r"does not cover: \['body'\]"):
    quantize(params, without(spec, 'body'))
  with pytest.raises(ValueError, match=r"model lacks: \['head'\]"):
    quantize(params, with_extra(spec, 'head'))


def test_a_kernel_of_nan_is_refused_by_name():
  params = tiny.params(tiny.NET)
  kernel = params['body']['kernel'].at[0, 0, 0, 0].set(np.nan)
  broken = params | {'body': params['body'] | {'kernel': kernel}}
  with pytest.raises(ValueError, match='body.*NaN'):
    quantize(broken, tiny.spec(tiny.NET))


class MLP(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3, name='b')(nn.relu(nn.Dense(5, name='a')(x)))


def test_apply_equals_a_hand_computation():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  params = {'a': {'kernel': draw(4, 5), 'bias': draw(5)},
            'b': {'kernel': draw(5, 3), 'bias': draw(3)}}
  quantizer = lambda fmt, scale, zero=None: Static(
      FPFormat.parse(fmt), jnp.asarray(scale, jnp.float32),
      None if zero is None else jnp.asarray(zero, jnp.float32))
  spec = spec_lib.QuantSpec('msfp', {
      'a': spec_lib.LayerSpec(
          'a', 'NAL', quantizer('E2M1', np.linspace(0.2, 0.4, 5)[None]),
          quantizer('E3M0', 0.17)),
      'b': spec_lib.LayerSpec(
          'b', 'AAL', quantizer('E1M2', np.linspace(0.3, 0.5, 3)[None]),
          quantizer('UE2M2', 0.3, -0.25))})
  x = draw(6, 4)

  hidden = tiny.fake_quant(x, spec.layers['a'].act) @ tiny.fake_quant(
      params['a']['kernel'], spec.layers['a'].weight) + params['a']['bias']
  hidden = np.maximum(hidden, 0)
  expected = tiny.fake_quant(hidden, spec.layers['b'].act) @ tiny.fake_quant(
      params['b']['kernel'], spec.layers['b'].weight) + params['b']['bias']

  qparams = quantize(params, spec)
  out = QuantizedModel(MLP(), spec).apply({'params': qparams}, x)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
  # The parameters alone serve as well.
  np.testing.assert_array_equal(
      QuantizedModel(MLP(), spec).apply(qparams, x), out)
  plain = MLP().apply({'params': params}, x)
  assert np.abs(out - plain).max() > 0.1  # or else it shows nothing


@pytest.mark.slow
def test_jitted_and_eager_agree():
  spec = tiny.spec(tiny.NET)
  params = quantize(tiny.params(tiny.NET), spec)
  model = QuantizedModel(tiny.NET, spec)
  x, t = tiny.noise(3), tiny.t_of(300)
  np.testing.assert_allclose(
      jax.jit(model.apply)({'params': params}, x, t),
      model.apply({'params': params}, x, t), rtol=1e-4, atol=1e-5)


def test_every_layer_of_the_unet_is_quantized_once():
  """In the order of execution, by the quantizer of its own name."""
  calls = []

  @flax.struct.dataclass
  class Spy(Full):
    name: str = flax.struct.field(pytree_node=False)

    def fake_quant(self, x, axis=-1):
      calls.append(self.name)
      return x

  names = list(tiny.layers(tiny.CONFIG))
  try:
    jax.eval_shape(lambda p: apply(
        tiny.UNET, p, {name: QLayer(None, Spy(name)) for name in names},
        tiny.noise(0), tiny.t_of(0)), tiny.params(tiny.UNET))
  finally:
    del Quantizer.KINDS['Spy']
  assert calls == names


@pytest.mark.parametrize('name', tiny.NET_ROLES.values())
def test_a_layer_without_quantizer_is_refused_by_name(name):
  """By the spec, and by the product where layers are given by hand."""
  model = QuantizedModel(tiny.NET, without(tiny.spec(tiny.NET), name))
  with pytest.raises(ValueError, match=rf"does not cover: \['{name}'\]"):
    model.apply({'params': tiny.params(tiny.NET)}, tiny.noise(0),
                tiny.t_of(0))
  layers = {n: QLayer(None) for n in tiny.NET_ROLES.values() if n != name}
  with pytest.raises(ValueError, match=f'no rule covers layer {name!r}'):
    apply(tiny.NET, tiny.params(tiny.NET), layers, tiny.noise(0),
          tiny.t_of(0))


def test_a_quantizer_without_layer_is_refused_by_name():
  """By the spec, and by the product where layers are given by hand."""
  params = tiny.params(tiny.NET)
  model = QuantizedModel(tiny.NET, with_extra(tiny.spec(tiny.NET), 'head'))
  with pytest.raises(ValueError, match=r"model lacks: \['head'\]"):
    model.apply({'params': params}, tiny.noise(0), tiny.t_of(0))
  layers = {n: QLayer(None) for n in [*tiny.NET_ROLES.values(), 'head']}
  with pytest.raises(ValueError, match=r"model lacks: \['head'\]"):
    apply(tiny.NET, params, layers, tiny.noise(0), tiny.t_of(0))


@pytest.mark.parametrize('nested', [True, False])
def test_parameters_that_are_not_quantized_are_refused(nested):
  """Full-precision weights would run in silence, and pass for quantized."""
  spec, params = tiny.spec(tiny.NET), tiny.params(tiny.NET)
  given = {'params': params} if nested else params
  with pytest.raises(ValueError, match=(
      "layer 'temb' are not quantized: pass what quantize")):
    QuantizedModel(tiny.NET, spec).apply(given, tiny.noise(0), tiny.t_of(0))


BLOCK = Block(FPFormat.parse('E2M1'), group=16)


def test_weights_are_quantized_once():
  """A second pass of a block format would move them; nothing makes one.

  E2M3 reaches 7.5, in steps of 0.5: where a scale of 3 bits is rounded up, the
  largest value of a group goes to 7, and so would the next pass's scale.
  """
  params = {'a': {'kernel': jnp.asarray(
      np.random.default_rng(0).normal(size=(480, 64)), jnp.float32)}}
  quantizer = Block(FPFormat.parse('E2M3'), group=16, scale_type='e4m3')
  spec = spec_lib.QuantSpec('mine', {
      'a': spec_lib.LayerSpec('', '', quantizer, Full())})
  values = quantize(params, spec)['a']['kernel'].dequantize()
  np.testing.assert_array_equal(values, quantizer.quantize(
      params['a']['kernel'], axis=-2).dequantize())
  again = quantize({'a': {'kernel': values}}, spec)['a']['kernel'].dequantize()
  assert (again != values).mean() > 0.05


def test_what_stands_around_is_taken_off_first():
  """Q(H^-1 (s W) - A B), with the Hadamard matrix written out in NumPy."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  kernel = draw(3, 3, 4, 6)
  around = Around(jnp.exp(draw(4)), draw(3, 3, 4, 2), draw(2, 6), rotation=4)
  # 127 / 32 is its largest level, and 1 / 32 its step.
  fine = Static(FPFormat.parse('E1M6'), jnp.full((1, 1, 1, 6), 8.0))
  spec = spec_lib.QuantSpec('mine', {
      'a': spec_lib.LayerSpec('', '', fine, Full(), around)})
  h = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
  smooth, down, up = (np.float64(part) for part in (
      around.smooth, around.down, around.up))
  moved = np.einsum('ij,xyjo->xyio', h / 2, smooth[:, None] * kernel)
  residual = moved - np.einsum('xyir,ro->xyio', down, up)
  found = quantize({'a': {'kernel': kernel}}, spec)['a']['kernel']
  assert np.abs(residual).max() < 8 * 127 / 32  # no value leaves the range
  assert np.abs(found.dequantize() - residual).max() <= 8 / 64 * 1.001


def test_bits_of_quantized_parameters_by_hand():
  """Codes of 4 bits, a float32 scale for every group begun: ceil(40 / 16)."""
  params = {'a': {'kernel': jnp.ones((3, 3, 40, 5)), 'bias': jnp.zeros(5)}}
  spec = spec_lib.QuantSpec('mine', {
      'a': spec_lib.LayerSpec('', '', BLOCK, Full())})
  tensor = quantize(params, spec)['a']['kernel']
  assert tensor.nbits == 9 * 40 * 5 * 4 + 9 * 3 * 5 * 32
  assert interception.leaves(quantize(params, spec), 'bias').keys() == {'a'}
