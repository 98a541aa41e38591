"""FLUX's transformer from diffusers' and BFL's files; keys of its config.json.
"""

import dataclasses
import json

import flux_oracle
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from msfp_jax import convert
from msfp_jax.convert import flux
from msfp_jax.convert import flux_keys
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.models.flux import FluxConfig

TINY, GUIDED = flux_oracle.TINY, flux_oracle.GUIDED


def write(folder, naming, state, config):
  """Writes a file of a naming: (path, what to pass as config)."""
  if naming == 'shards':
    return flux_oracle.save_folder(folder / 'f', state, config, shards=3), None
  if naming == 'pipeline':
    flux_oracle.save_folder(folder / 'p' / 'transformer', state, config)
    return folder / 'p', None
  return flux_oracle.save_bfl(folder / 'flux.safetensors', state, config,
                              'model.diffusion_model.' * (naming != 'bfl'))


@pytest.mark.parametrize('config', flux_oracle.CONFIGS.values(),
                         ids=flux_oracle.CONFIGS)
@pytest.mark.parametrize('naming', ['shards', 'pipeline', 'bfl', 'prefixed'])
def test_both_namings_tensor_for_tensor(tmp_path, config, naming):
  """In bfloat16, as published; sides, which no file tells, are the default."""
  state = {name: value.astype(ml_dtypes.bfloat16)
           for name, value in flux_oracle.state_of(config).items()}
  path, described = write(tmp_path, naming, state, config)
  model, params = convert.load_pretrained(str(path), config=described)
  assert model.config == dataclasses.replace(
      config, image_size=128, image_width=None)
  expected = flux_oracle.params_of(
      {n: v.astype(np.float32) for n, v in state.items()})
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  assert jax.tree.structure(params) == jax.tree.structure(expected)


def test_the_rest_of_a_pipelines_one_file_is_left_alone(tmp_path):
  state = flux_oracle.state_of(TINY)
  path, described = flux_oracle.save_bfl(
      tmp_path / 'all.safetensors', state, TINY, 'model.diffusion_model.')
  tensors = safetensors.numpy.load_file(path)
  safetensors.numpy.save_file(
      tensors | {'vae.decoder.conv_in.weight': np.ones(3, np.float32)}, path)
  _, params = convert.load_pretrained(str(path), config=described)
  jax.tree.map(np.testing.assert_array_equal, params,
               flux_oracle.params_of(state))


# By naming: tensors to drop, cut, retype, transpose; and how many of ours a
# fused one is.
DAMAGE = {
    'diffusers': (
        'transformer_blocks.0.attn.to_q.bias', 'x_embedder.bias',
        'transformer_blocks.1.ff.net.2.bias',
        'single_transformer_blocks.1.proj_mlp.weight', 1),
    'bfl': (
        'double_blocks.0.txt_attn.qkv.bias', 'img_in.bias',
        'double_blocks.1.img_mlp.2.bias',
        'double_blocks.1.txt_mlp.0.weight', 3)}


def refusal(tmp_path, tensors):
  """What is said of a file of these tensors, described as TINY."""
  safetensors.numpy.save_file(tensors, tmp_path / 'a.safetensors')
  described = tmp_path / 'described.json'
  described.write_text(json.dumps(flux_oracle.config_json(TINY)))
  with pytest.raises(ValueError) as error:
    convert.load_pretrained(str(tmp_path / 'a.safetensors'),
                            config=str(described))
  return str(error.value)


@pytest.mark.parametrize('naming', DAMAGE)
def test_every_damage_is_listed(tmp_path, naming):
  dropped, cut, retyped, turned, parts = DAMAGE[naming]
  state = flux_oracle.state_of(TINY)
  tensors = (dict(state) if naming == 'diffusers'
             else flux_oracle.bfl(state, TINY))
  del tensors[dropped]
  tensors |= {'extra.weight': np.zeros(3, np.float32), cut: tensors[cut][:-1],
              retyped: tensors[retyped].astype(np.int32),
              turned: np.ascontiguousarray(tensors[turned].T)}
  message = refusal(tmp_path, tensors)
  for text, count in (('missing ', parts), ('unexpected extra.weight', 1),
                      ('the model wants', 2), ('holds no weights', 1)):
    assert message.count(text) == count, text


@pytest.mark.parametrize('key, value, said', [
    ('joint_attention_dim', 16, 'context_embedder.weight .*16, 12.*s .16, 16'),
    ('num_attention_heads', 3, 'x_embedder.weight is .16.*wants .24'),
    ('num_layers', 3, 'missing transformer_blocks.2.attn.to_q.weight'),
    ('num_single_layers', 1, 'unexpected single_transformer_blocks.1.proj_out'),
    ('guidance_embeds', True, 'missing time_text_embed.guidance_embedder'),
    ('in_channels', 8, 'x_embedder.weight is .16, 12')])
def test_widths_that_the_tensors_contradict(tmp_path, key, value, said):
  folder = flux_oracle.save_folder(
      tmp_path / 'f', flux_oracle.state_of(TINY), TINY)
  (folder / 'config.json').write_text(json.dumps(
      flux_oracle.config_json(TINY) | {key: value}))
  with pytest.raises(ValueError, match=f'(?s)does not fit.*{said}'):
    convert.load_pretrained(str(folder))


def test_a_fused_tensor_of_another_width(tmp_path):
  """No seventh of its rows is q: it is named as it is in the file."""
  tensors = flux_oracle.bfl(flux_oracle.state_of(TINY), TINY)
  name = 'single_blocks.0.linear1.weight'
  tensors[name] = np.ascontiguousarray(tensors[name][:-1])
  message = refusal(tmp_path, tensors)
  assert f'unexpected {name} (111, 16)' in message
  assert message.count('missing') == 4


def test_absent_shards_are_all_named(tmp_path):
  folder = flux_oracle.save_folder(
      tmp_path / 'f', flux_oracle.state_of(TINY), TINY, shards=4)
  gone = [f'diffusion_pytorch_model-{i:05}-of-00004.safetensors'
          for i in (2, 4)]
  for name in gone:
    (folder / name).unlink()
  with pytest.raises(FileNotFoundError) as error:
    convert.load_pretrained(str(folder))
  assert all(name in str(error.value) for name in gone)
  assert '00001-of' not in str(error.value)


def zeros(shapes):
  return {name: LazyTensor.of(np.broadcast_to(np.float32(0), shape))
          for name, shape in shapes.items()}


@pytest.mark.parametrize('guidance', [False, True], ids=['schnell', 'dev'])
def test_the_published_models_are_told_by_their_shapes(guidance):
  config = FluxConfig(guidance_embeds=guidance)
  found = zeros(flux_oracle.shapes(config))
  assert flux.detect(found)
  assert flux.config(flux.select(found, True), None) == config
  # And by their config.json, which leaves out what later versions added.
  stated = flux_oracle.config_json(config)
  for key in ('axes_dims_rope', 'out_channels'):
    del stated[key]
  assert flux.config({}, stated) == config
  assert flux.config({}, stated | {'out_channels': None}) == config


@pytest.mark.parametrize('guidance, file', [
    (False, None), (True, None), (False, {'shift': 1.0}),
    (True, {'shift': 3.0, 'use_dynamic_shifting': True, 'base_shift': 0.5,
            'max_shift': 1.15, 'base_image_seq_len': 256,
            'max_image_seq_len': 4096})],
    ids=['schnell', 'dev', 'schnell, file', 'dev, file'])
def test_the_sampler_is_the_published(tmp_path, guidance, file):
  """From the pipeline's scheduler, or without it by what the model takes.

  t is sigma itself. dev's are shifted by e^1.15, as 1024 x 1024 pixels have
  4096 tokens; schnell's are not.
  """
  config = dataclasses.replace(TINY, guidance_embeds=guidance)
  flux_oracle.save_folder(
      tmp_path / 'transformer', flux_oracle.state_of(config), config)
  if file:
    (tmp_path / 'scheduler').mkdir()
    (tmp_path / 'scheduler' / 'scheduler_config.json').write_text(json.dumps(
        {'_class_name': 'FlowMatchEulerDiscreteScheduler',
         'num_train_timesteps': 1000} | file))
  plan = convert.load_plan(str(tmp_path), num_steps=4)
  sigmas = np.array([1, 0.75, 0.5, 0.25])
  if guidance:
    sigmas = np.exp(1.15) / (np.exp(1.15) + 1 / sigmas - 1)
  np.testing.assert_allclose(plan.timesteps, sigmas, rtol=1e-6)
  np.testing.assert_allclose(
      plan.eps_factor, sigmas - [*sigmas[1:], 0], rtol=1e-6)
  assert (plan.x_coef == 1).all() and not plan.noise_std.any()


def test_a_head_that_is_not_the_published_needs_a_configuration(tmp_path):
  path, _ = flux_oracle.save_bfl(
      tmp_path / 'a.safetensors', flux_oracle.state_of(TINY), TINY)
  with pytest.raises(ValueError, match='axes_dims_rope of a head of 8: pass'):
    convert.load_pretrained(str(path))


def test_what_a_configuration_leaves_out_the_shapes_tell():
  stated = flux_oracle.config_json(GUIDED)
  for key in flux_keys.USED.keys() - {'axes_dims_rope', 'attention_head_dim'}:
    found = flux.config(zeros(flux_oracle.shapes(GUIDED)),
                        {k: v for k, v in stated.items() if k != key})
    expected = dataclasses.replace(GUIDED, image_size=128)
    if key == 'out_channels':  # diffusers': that of the inputs
      expected = dataclasses.replace(expected, out_channels=2)
    assert found == expected, key


def test_every_key_is_stated_by_the_tests_own_file():
  assert flux_oracle.config_json(TINY).keys() == flux_keys.KEYS


WRONG = {'whole': [0, -1, 2.0, '2', None, True, [2]],
         'whole or none': [0, -1, 2.0, '2', True, [2]],
         'flag': ['yes', 1, None, 0.0], 'axes': [[2, 4], [2, 4, 0], 8, None]}
KINDS = {
    'in_channels': 'whole', 'out_channels': 'whole or none',
    'num_layers': 'whole', 'num_single_layers': 'whole',
    'attention_head_dim': 'whole', 'num_attention_heads': 'whole',
    'joint_attention_dim': 'whole', 'pooled_projection_dim': 'whole',
    'guidance_embeds': 'flag', 'axes_dims_rope': 'axes'}


@pytest.mark.parametrize('key, value', [
    *((key, value) for key, kind in KINDS.items() for value in WRONG[kind]),
    ('patch_size', 2), ('_class_name', 'SD3Transformer2DModel'),
    ('_class_name', None), ('in_channels', 10), ('out_channels', 7),
    ('axes_dims_rope', [2, 4, 4]), ('axes_dims_rope', [1, 5, 2]),
    ('axes_dims_rope', [2, 2, 2, 2]), ('attention_head_dim', 10),
    ('quantization_config', {'quant_method': 'bitsandbytes'}),
    ('mlp_ratio', 4.0)])
def test_values_that_are_refused_by_their_key(key, value):
  with pytest.raises(ValueError, match=f'{key}=') as error:
    flux.config({}, flux_oracle.config_json(TINY) | {key: value})
  assert '\n' not in str(error.value)


def test_no_config_json():
  with pytest.raises(ValueError, match='no config.json of diffusers'):
    flux.config({}, {'model': {'params': {}}})


def test_relatives_are_not_taken_for_it():
  """By the names that they have and it has not, and the other way round."""
  for names in (
      # FLUX.2, whose adaLN is shared by all blocks, in both namings.
      ['double_blocks.0.img_attn.qkv.weight', 'img_in.weight',
       'double_stream_modulation_img.lin.weight'],
      ['single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight',
       'context_embedder.weight'],
      # HunyuanVideo, Stable Diffusion 3.
      ['single_transformer_blocks.0.norm.linear.weight',
       'context_embedder.proj_in.weight'],
      ['transformer_blocks.0.norm1.linear.weight', 'context_embedder.weight']):
    assert not flux.detect(zeros({name: (2, 2) for name in names}))
