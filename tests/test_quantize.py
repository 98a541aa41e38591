"""Applying a spec: quantized kernels, quantized inputs, nothing forgotten."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from msfp_jax.quant import spec as spec_lib
from msfp_jax.quant.numbers import FPFormat
from msfp_jax.quant.quantize import apply
from msfp_jax.quant.quantize import quantize
from msfp_jax.quant.quantize import QuantizedModel
from msfp_jax.quant.quantizers import Quantizer


def without(spec, name):
  layers = {n: layer for n, layer in spec.layers.items() if n != name}
  return dataclasses.replace(spec, layers=layers)


def with_extra(spec, name):
  extra = next(iter(spec.layers.values()))
  return dataclasses.replace(spec, layers=spec.layers | {name: extra})


@pytest.mark.parametrize('recipe', ['msfp', 'int'])
def test_kernels_go_to_the_nearest_levels_of_their_channel(recipe):
  params, spec = tiny.params(tiny.NET), tiny.spec(tiny.NET, recipe)
  quantized = quantize(params, spec)
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
  quantized = jax.device_get(quantize(params, tiny.spec(tiny.UNET)))
  changed = jax.tree.map(lambda a, b: (a != b).any(), params, quantized)
  for path, differs in jax.tree_util.tree_leaves_with_path(changed):
    assert differs == (path[-1].key == 'kernel'), path


def test_full_precision_layers_pass():
  spec = tiny.spec(tiny.NET)
  free = dataclasses.replace(spec.layers['body'], weight=None, act=None)
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
  quantizer = lambda fmt, scale, zero=None: Quantizer(
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

  out = QuantizedModel(MLP(), spec).apply(
      {'params': quantize(params, spec)}, x)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
  plain = MLP().apply({'params': params}, x)
  assert np.abs(out - plain).max() > 0.1  # or else it shows nothing


def test_jitted_and_eager_agree():
  spec = tiny.spec(tiny.NET)
  params = quantize(tiny.params(tiny.NET), spec)
  model = QuantizedModel(tiny.NET, spec)
  x, t = tiny.noise(3), tiny.t_of(300)
  np.testing.assert_allclose(
      jax.jit(model.apply)({'params': params}, x, t),
      model.apply({'params': params}, x, t), rtol=1e-4, atol=1e-5)


class Spy:
  """Takes a quantizer's place: records its layer, passes the input."""

  def __init__(self, name, calls):
    self.name, self.calls = name, calls

  def fake_quant(self, x):
    self.calls.append(self.name)
    return x


def test_every_layer_of_the_unet_is_quantized_once():
  calls = []
  names = list(tiny.layers(tiny.CONFIG))
  jax.eval_shape(lambda p: apply(
      tiny.UNET, p, {name: Spy(name, calls) for name in names},
      tiny.noise(0), tiny.t_of(0)), tiny.params(tiny.UNET))
  assert calls == names


@pytest.mark.parametrize('name', tiny.NET_ROLES.values())
def test_a_layer_without_quantizer_is_refused_by_name(name):
  model = QuantizedModel(tiny.NET, without(tiny.spec(tiny.NET), name))
  with pytest.raises(ValueError, match=f'no rule covers layer {name!r}'):
    model.apply({'params': tiny.params(tiny.NET)}, tiny.noise(0),
                tiny.t_of(0))


def test_a_quantizer_without_layer_is_refused_by_name():
  model = QuantizedModel(tiny.NET, with_extra(tiny.spec(tiny.NET), 'head'))
  with pytest.raises(ValueError, match=r"model lacks: \['head'\]"):
    model.apply({'params': tiny.params(tiny.NET)}, tiny.noise(0),
                tiny.t_of(0))
