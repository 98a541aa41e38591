"""FLUX's transformer against diffusers' (`make parity`)."""

import dataclasses
import inspect
import json

import flux_oracle
import jax
import ml_dtypes
import numpy as np
import pytest
import unet_oracle

from msfp_jax import convert
from msfp_jax import diffusion
from msfp_jax.convert import flux
from msfp_jax.convert import flux_keys
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.models.flux import Flux
from msfp_jax.models.flux import FluxConfig

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings(
    'ignore:__array__ impl:DeprecationWarning')]

by_config = pytest.mark.parametrize(
    'config', flux_oracle.CONFIGS.values(), ids=flux_oracle.CONFIGS)


@by_config
@pytest.mark.parametrize('height, width', [(8, 12), (6, 4)])
def test_the_transformer_equals_diffusers(config, height, width):
  import diffusers_oracle
  state = flux_oracle.state_of(config, seed=5)
  inputs = flux_oracle.inputs_of(config, 6, height, width)
  expected = diffusers_oracle.flux_output(config, state, *inputs)
  actual = flux_oracle.output(config, state, inputs)
  assert actual.shape == inputs[0].shape[:3] + (config.out_channels,)
  assert unet_oracle.rel_l2(actual, expected) < 5e-6


@by_config
def test_four_steps_equal_diffusers(tmp_path, config):
  """Latents by both transformers and both samplers, from one folder."""
  import diffusers
  import diffusers_oracle
  import torch
  config = dataclasses.replace(config, out_channels=config.in_channels)
  state = flux_oracle.state_of(config, seed=9)
  flux_oracle.save_folder(tmp_path / 'transformer', state, config)
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
  scheduler.save_pretrained(tmp_path / 'scheduler')
  model, params = convert.load_pretrained(str(tmp_path))
  plan = convert.load_plan(str(tmp_path), num_steps=4)
  noise, _, *conditions = flux_oracle.inputs_of(config, 10)
  scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4))
  theirs = diffusers_oracle.flux(config)
  theirs.load_state_dict({n: torch.from_numpy(v) for n, v in state.items()})
  x = torch.from_numpy(noise)
  for t in scheduler.timesteps:
    velocity = diffusers_oracle.run_flux(
        theirs, x.numpy(), np.full(len(x), t / 1000, np.float32), *conditions)
    x = scheduler.step(torch.from_numpy(velocity), t, x).prev_sample
  with jax.default_matmul_precision('highest'):
    actual = jax.jit(lambda noise, *conditions: diffusion.sample(
        lambda x, t, i: model.apply({'params': params}, x, t, *conditions),
        plan, noise))(noise, *conditions)
  assert unet_oracle.rel_l2(actual, x.numpy()) < 1e-5


@by_config
@pytest.mark.parametrize('naming', ['diffusers', 'bfl', 'bfl, prefix'])
def test_files_of_both_namings_compute_what_diffusers_does(
    tmp_path, config, naming):
  """bfloat16, as published; diffusers' in three shards."""
  import diffusers_oracle
  state = {name: value.astype(ml_dtypes.bfloat16)
           for name, value in flux_oracle.state_of(config, seed=7).items()}
  if naming == 'diffusers':
    path, described = flux_oracle.save_folder(
        tmp_path / 'pipe' / 'transformer', state, config, shards=3).parent, None
  else:
    path, described = flux_oracle.save_bfl(
        tmp_path / 'flux.safetensors', state, config,
        'model.diffusion_model.' * ('prefix' in naming))
  model, params = convert.load_pretrained(str(path), config=described)
  inputs = flux_oracle.inputs_of(config, 8)
  expected = diffusers_oracle.flux_output(
      config, {n: v.astype(np.float32) for n, v in state.items()}, *inputs)
  actual = flux_oracle.output_of(model, params, inputs)
  assert unet_oracle.rel_l2(actual, expected) < 5e-6


def test_our_way_back_to_bfl_is_undone_by_diffusers_own():
  """What our files of BFL's names hold is what diffusers takes them for."""
  from diffusers.loaders import single_file_utils
  import torch
  # Its conversion knows one width.
  config = FluxConfig(
      in_channels=1, out_channels=1, num_layers=1, num_single_layers=1,
      text_dim=2, pooled_dim=2)
  shapes = flux_oracle.shapes(config)
  rng = np.random.default_rng(0)
  state = {name: rng.integers(-9, 9, shape, np.int8)
           for name, shape in shapes.items()}
  back = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers({
      name: torch.from_numpy(value)
      for name, value in flux_oracle.bfl(state, config).items()})
  assert back.keys() == state.keys()
  for name, value in state.items():
    np.testing.assert_array_equal(back[name].numpy(), value)


@pytest.mark.parametrize('guidance', [False, True], ids=['schnell', 'dev'])
def test_the_published_models_have_diffusers_tensors(guidance):
  """Every name and shape of the full size, without weights, and their sum."""
  import diffusers_oracle
  config = FluxConfig(guidance_embeds=guidance)
  theirs = {name: tuple(value.shape) for name, value
            in diffusers_oracle.flux(config, 'meta').state_dict().items()}
  assert theirs == flux_oracle.shapes(config)
  lazy = {name: LazyTensor.of(np.broadcast_to(np.float32(0), shape))
          for name, shape in theirs.items()}
  assert flux.detect(lazy)
  assert flux.config(lazy, None) == config
  named, leftover = flux.rename(lazy, config)
  ours = convert.abstract_params(Flux(config))
  assert {n: t.shape for n, t in named.items()} == unet_oracle.shapes_of(ours)
  assert not leftover
  count = sum(leaf.size for leaf in jax.tree.leaves(ours))
  assert count == sum(np.prod(s, dtype=np.int64) for s in theirs.values())


class No(dict):
  """Fields that are refused by their key's name; all others must load."""


TINY = flux_oracle.TINY
# Other values of every key of the class, which may need others beside them.
KEYS = {
    'patch_size': [No(patch_size=2)],
    'in_channels': [{'in_channels': 16}, No(in_channels=10)],
    'out_channels': [{'out_channels': None}, {'out_channels': 4},
                     No(out_channels=6)],
    'num_layers': [{'num_layers': 1}],
    'num_single_layers': [{'num_single_layers': 3}],
    'attention_head_dim': [
        {'attention_head_dim': 12, 'axes_dims_rope': [4, 4, 4]},
        No(attention_head_dim=12)],
    'num_attention_heads': [{'num_attention_heads': 1}],
    'joint_attention_dim': [{'joint_attention_dim': 7}],
    'pooled_projection_dim': [{'pooled_projection_dim': 9}],
    'guidance_embeds': [{'guidance_embeds': True}],
    'axes_dims_rope': [{'axes_dims_rope': [4, 2, 2]},
                       No(axes_dims_rope=[2, 2, 2]),
                       No(axes_dims_rope=[8])],
    'dreamt_of': [No(dreamt_of=1)]}


def test_every_key_of_the_class_is_known_and_tried():
  import diffusers
  stated = inspect.signature(
      diffusers.FluxTransformer2DModel.__init__).parameters.keys() - {'self'}
  assert stated <= flux_keys.KEYS
  assert stated == KEYS.keys() - {'dreamt_of'}


@pytest.mark.parametrize('fields', [
    pytest.param(fields, id=f'{key}-{i}') for key, listed in KEYS.items()
    for i, fields in enumerate(listed)])
def test_a_key_does_what_it_does_there(tmp_path, fields):
  import diffusers
  import diffusers_oracle
  import torch
  stated = flux_oracle.config_json(TINY) | fields
  if isinstance(fields, No):
    with pytest.raises(ValueError, match=f'{next(iter(fields))}='):
      flux.config({}, stated)
    return
  theirs = diffusers.FluxTransformer2DModel(
      **{k: v for k, v in stated.items() if not k.startswith('_')})
  state = unet_oracle.random_state_dict(
      {n: tuple(v.shape) for n, v in theirs.state_dict().items()}, 3)
  folder = flux_oracle.save_folder(tmp_path / 'f', state, TINY)
  (folder / 'config.json').write_text(json.dumps(stated))
  model, params = convert.load_pretrained(str(folder))
  inputs = flux_oracle.inputs_of(model.config, 4)
  theirs.load_state_dict({n: torch.from_numpy(v) for n, v in state.items()})
  expected = diffusers_oracle.run_flux(theirs, *inputs)
  actual = flux_oracle.output_of(model, params, inputs)
  assert unet_oracle.rel_l2(actual, expected) < 5e-6
