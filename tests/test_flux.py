"""FLUX's transformer: golden outputs, the published sizes, what it refuses."""

import dataclasses

import flux_oracle
import jax
import numpy as np
import pytest
import unet_oracle

from msfp_jax import convert
from msfp_jax.models import flux
from msfp_jax.models import registry
from msfp_jax.models.flux import Flux
from msfp_jax.models.flux import FluxConfig
from msfp_jax.quant import interception

TINY, GUIDED = flux_oracle.TINY, flux_oracle.GUIDED


@pytest.mark.parametrize('name', flux_oracle.CONFIGS)
def test_outputs_equal_golden(name):
  """diffusers' on the same weights, height other than width."""
  config = flux_oracle.CONFIGS[name]
  with np.load(unet_oracle.GOLDEN / 'flux.npz') as file:
    expected = file[name]
  actual = flux_oracle.output(
      config, flux_oracle.state_of(config), flux_oracle.inputs_of(config))
  assert unet_oracle.rel_l2(actual, expected) < 5e-6


def test_a_token_is_channels_of_two_by_two_places():
  x = np.random.default_rng(0).standard_normal((2, 4, 6, 3)).astype('f')
  tokens = np.asarray(flux.to_tokens(x))
  assert tokens.shape == (2, 6, 12)
  for row, column, c, dy, dx in np.ndindex(2, 3, 3, 2, 2):
    np.testing.assert_array_equal(
        tokens[:, row * 3 + column, c * 4 + dy * 2 + dx],
        x[:, 2 * row + dy, 2 * column + dx, c])
  np.testing.assert_array_equal(flux.from_tokens(tokens, 4, 6), x)


@pytest.mark.slow
# As published: tensors of diffusers' files and of BFL's, and parameters.
@pytest.mark.parametrize('config, tensors, fused, parameters', [
    (FluxConfig(), 1156, 776, 11_891_178_560),
    (FluxConfig(guidance_embeds=True), 1160, 780, 11_901_408_320)],
                         ids=['schnell', 'dev'])
def test_the_published_models(config, tensors, fused, parameters):
  """Names and shapes, without weights, are diffusers' but for proj_out."""
  published = flux_oracle.shapes(config)
  assert len(published) == tensors
  narrow = dataclasses.replace(
      config, num_heads=1, head_dim=2, axes_dims=(0, 2, 0), text_dim=1)
  assert len(flux_oracle.bfl(flux_oracle.state_of(narrow), narrow)) == fused
  model = Flux(config)
  shapes = unet_oracle.shapes_of(convert.abstract_params(model))
  whole = {}
  for name, shape in shapes.items():
    if name.endswith('.proj_out.mlp.weight'):
      continue
    if name.endswith('.proj_out.attn.weight'):
      other = shapes[name.replace('attn', 'mlp')]
      assert other[0] == shape[0]
      shape = (shape[0], shape[1] + other[1])
    whole[name.replace('proj_out.attn', 'proj_out')] = shape
  assert whole == published
  assert sum(np.prod(s, dtype=np.int64) for s in shapes.values()) == parameters


def test_every_product_is_a_layer_and_every_input_is_felt():
  model = Flux(GUIDED)
  params = flux_oracle.params_of(flux_oracle.state_of(GUIDED))
  inputs = flux_oracle.inputs_of(GUIDED, height=4, width=6)
  assert interception.list_layers(model, params, *inputs) == (
      flux_oracle.layers(GUIDED))
  run = jax.jit(lambda *inputs: model.apply({'params': params}, *inputs))
  out = run(*inputs)
  for i in range(len(inputs)):
    other = [a * 1.5 + 0.1 if j == i else a for j, a in enumerate(inputs)]
    assert unet_oracle.rel_l2(run(*other), out) > 1e-3, i


@pytest.mark.parametrize('config', flux_oracle.CONFIGS.values(),
                         ids=flux_oracle.CONFIGS)
def test_a_denoiser_of_the_registry(config, tmp_path):
  """By its name in files, with the conditions that it takes."""
  model = Flux(config)
  assert registry.from_dict(registry.to_dict(model)) == model
  width = config.image_width or config.image_size
  assert model.sample_shape == (config.image_size, width, config.in_channels)
  params = flux_oracle.params_of(flux_oracle.state_of(config))
  convert.save_pretrained(tmp_path / 'a.safetensors', model, params)
  loaded, found = convert.load_pretrained(str(tmp_path / 'a.safetensors'))
  assert loaded == model
  jax.tree.map(np.testing.assert_array_equal, found, params)
  names = [condition.name for condition in model.conditions]
  assert names == ['text', 'pooled', 'guidance'][:2 + config.guidance_embeds]
  for condition, value in zip(
      model.conditions, flux_oracle.inputs_of(config)[2:], strict=True):
    abstract = condition.abstract(4)
    assert abstract.dtype == value.dtype
    assert abstract.shape[2 - (condition.name != 'text'):] == (
        value.shape[2 - (condition.name != 'text'):])


@pytest.mark.parametrize('height, width, said', [
    (5, 4, 'latent side 5.*4 or 6.*multiple of 16'), (4, 7, 'latent side 7'),
    (0, 4, 'latent side 0.*2 or 4')])
def test_odd_latent_sides_are_refused(height, width, said):
  inputs = flux_oracle.inputs_of(TINY, height=height, width=width)
  with pytest.raises(ValueError, match=said):
    jax.eval_shape(Flux(TINY).init, jax.random.key(0), *inputs)


def test_guidance_where_it_belongs_alone():
  *inputs, guidance = flux_oracle.inputs_of(GUIDED)
  with pytest.raises(ValueError, match='needs guidance'):
    jax.eval_shape(Flux(GUIDED).init, jax.random.key(0), *inputs)
  inputs = flux_oracle.inputs_of(TINY)
  with pytest.raises(ValueError, match='takes no guidance'):
    jax.eval_shape(Flux(TINY).init, jax.random.key(0), *inputs, guidance)


@pytest.mark.parametrize('change, said', [
    ({'image_size': 7}, 'latent side 7'), ({'image_width': 9}, 'side 9'),
    ({'axes_dims': (2, 4)}, r'axes_dims=\[2, 4\].*head_dim=8'),
    ({'axes_dims': (2, 2, 2)}, 'add up to head_dim=8'),
    ({'axes_dims': (3, 3, 2)}, 'three even numbers'),
    ({'num_layers': 0}, 'num_layers=0'), ({'text_dim': 0}, 'text_dim=0')])
def test_configurations_that_contradict_themselves(change, said):
  with pytest.raises(ValueError, match=said):
    dataclasses.replace(TINY, **change)
