"""Keys of foreign configurations: each used, harmless or refused."""

import dataclasses
import json
import pathlib
import re

import checkpoints
import families
import foreign
import numpy as np
import published_configs
import pytest

from msfp_jax import convert
from msfp_jax.convert import ddim
from msfp_jax.convert import diffusers_unet
from msfp_jax.convert import first_stage
from msfp_jax.convert import first_stage_keys
from msfp_jax.convert import flow_scheduler
from msfp_jax.convert import flux_keys
from msfp_jax.convert import ldm
from msfp_jax.convert import scheduler
from msfp_jax.convert import text_encoder_keys
from msfp_jax.convert import unet_keys
from msfp_jax.convert import unet_yaml_keys
from msfp_jax.convert.tensors import LazyTensor

DOC = pathlib.Path(__file__).parents[1] / 'docs/checkpoints.md'
# What stands before a table, and the keys that it must have.
TABLES = {
    'Keys of `scheduler_config.json`': scheduler.KEYS,
    'And of `FlowMatchEulerDiscreteScheduler`': flow_scheduler.KEYS,
    "Keys of a first stage's `config.json`": first_stage_keys.KEYS,
    "And of CompVis' yaml, its own or": (
        first_stage_keys.DDCONFIG_KEYS | first_stage_keys.AROUND_KEYS | {
            'target', 'scale_factor', 'scale_by_std'}) - {'ddconfig'},
    "Of diffusers' `config.json`": unet_keys.KEYS,
    "Of FLUX's `config.json`": flux_keys.KEYS,
    'Of a CompVis yaml': unet_yaml_keys.UNET_KEYS,
    'And the `params` of its `model`, around it': unet_yaml_keys.MODEL_KEYS,
    "Of CLIP's text encoder": text_encoder_keys.OWN_KEYS[
        text_encoder_keys.CLIP],
    "Of T5's encoder": text_encoder_keys.OWN_KEYS[text_encoder_keys.T5],
    'Of both text encoders': text_encoder_keys.BOTH_KEYS,
    "Of ermongroup's yaml": (
        unet_yaml_keys.DDIM_KEYS | unet_yaml_keys.DDIM_DIFFUSION_KEYS
        | unet_yaml_keys.DDIM_DATA.keys() | {'image_size'}),
}


@pytest.mark.parametrize('before', TABLES)
def test_docs_have_every_key_and_no_other(before):
  text = DOC.read_text()
  assert text.count(before) == 1
  # The table after it: rows, of which the first cell has the keys; one with a
  # colon is the section that they stand in.
  table = text.split(before)[1].split('\n\n')[1].splitlines()
  assert table[0].startswith('| key |')
  found = [key for row in table[2:]
           for key in re.findall(r'`(\w+)`(?!:)', row.split('|')[1])]
  assert sorted(found) == sorted(TABLES[before])


def changed(name, place, **fields):
  """A published configuration with other values at a place in it."""
  content = published_configs.complete(name)
  part = content
  for key in place.split('.') if place else ():
    part = part[key]
  part |= fields
  family = {'CIFAR10': diffusers_unet, 'STABLE_DIFFUSION_1': diffusers_unet,
            'STABLE_1': ldm, 'ERMONGROUP_CIFAR10': ddim}[name]
  return family, content


UNET, OUTER = 'model.params.unet_config.params', 'model.params'
REFUSED = [
    # diffusers: what is invented, and what its models compute otherwise.
    ('CIFAR10', '', {'dreamt_of': 1}), ('CIFAR10', '', {'act_fn': 'gelu'}),
    ('CIFAR10', '', {'act_fn': ['silu']}),
    ('CIFAR10', '', {'downsample_padding': 2}),
    ('CIFAR10', '', {'mid_block_type': None}),
    ('CIFAR10', '', {'norm_num_groups': None}),
    ('CIFAR10', '', {'in_channels': True}),
    ('CIFAR10', '', {'attention_head_dim': [8, 16, 16, 16]}),
    ('CIFAR10', '', {'time_embedding_dim': 256}),
    ('CIFAR10', '', {'attn_norm_num_groups': 4}),
    ('CIFAR10', '', {'resnet_time_scale_shift': 'ada_group'}),
    ('CIFAR10', '', {'quantization_config': {'load_in_4bit': True}}),
    ('STABLE_DIFFUSION_1', '', {'num_attention_heads': 8}),
    ('STABLE_DIFFUSION_1', '', {'attention_head_dim': None}),
    ('STABLE_DIFFUSION_1', '', {'cross_attention_dim': None}),
    ('STABLE_DIFFUSION_1', '', {'mid_block_type': 'UNetMidBlock2D'}),
    ('STABLE_DIFFUSION_1', '', {'only_cross_attention': [False, True] * 2}),
    ('STABLE_DIFFUSION_1', '', {
        'transformer_layers_per_block': [[1, 1], [2, 2], 1, 1]}),
    ('STABLE_DIFFUSION_1', '', {'encoder_hid_dim': 16}),
    # CompVis.
    ('STABLE_1', UNET, {'dreamt_of': 1}), ('STABLE_1', OUTER, {'dreamt_of': 1}),
    ('STABLE_1', UNET, {'disable_middle_self_attn': True}),
    ('STABLE_1', UNET, {'num_attention_blocks': [1, 1, 1, 1]}),
    ('STABLE_1', UNET, {'adm_in_channels': 2816}),
    ('STABLE_1', UNET, {'extra_film_condition_dim': 512}),
    ('STABLE_1', UNET, {'use_spatial_transformer': False}),
    ('STABLE_1', UNET, {'context_dim': None}),
    ('STABLE_1', UNET, {'spatial_transformer_attn_type': 'linear'}),
    ('STABLE_1', 'model', {'dreamt_of': 1}),
    ('STABLE_1', 'model', {'guidance': {'scale': 2}}),
    ('STABLE_1', UNET.removesuffix('.params'), {'dreamt_of': 1}),
    ('STABLE_1', 'model', {'target': 'cldm.cldm.ControlLDM'}),
    ('STABLE_1', 'model.params.unet_config', {
        'target': 'cldm.cldm.ControlledUnetModel'}),
    ('STABLE_1', OUTER, {'control_stage_config': {}}),
    ('STABLE_1', OUTER, {'conditioning_key': 'film'}),
    ('STABLE_1', OUTER, {'v_posterior': 0.5}),
    # ermongroup.
    ('ERMONGROUP_CIFAR10', 'model', {'dreamt_of': 1}),
    ('ERMONGROUP_CIFAR10', 'model', {'type': 'guided'}),
    ('ERMONGROUP_CIFAR10', 'model', {'var_type': 'learned'}),
    ('ERMONGROUP_CIFAR10', 'model', {'conditional': True}),
    ('ERMONGROUP_CIFAR10', 'diffusion', {'sampling_timesteps': 10}),
    ('ERMONGROUP_CIFAR10', 'data', {'rescaled': False}),
    ('ERMONGROUP_CIFAR10', 'data', {'logit_transform': True}),
]


@pytest.mark.parametrize('name, place, fields', REFUSED)
def test_what_a_unet_does_not_have_is_named_by_its_key(name, place, fields):
  family, content = changed(name, place, **fields)
  key, = fields
  with pytest.raises(ValueError, match=key) as error:
    family.config({}, content)
  assert len(str(error.value)) < 500
  assert ('may be deleted' in str(error.value)) == (
      '(unknown)' in str(error.value))


@pytest.mark.parametrize('name, place, fields, expected', [
    ('CIFAR10', '', {'time_embedding_dim': 512}, {}),
    ('CIFAR10', '', {'attn_norm_num_groups': 32}, {}),
    # Blocks without attention do not ask how the others resample.
    ('CIFAR10', '', {
        'downsample_type': 'resnet',
        'down_block_types': [*['DownBlock2D'] * 3, 'AttnDownBlock2D'],
        'up_block_types': ['AttnUpBlock2D', *['UpBlock2D'] * 3]},
     {'attn_resolutions': (4,)}),
    ('CIFAR10', '', {'downsample_type': 'resnet'}, None),
    ('CIFAR10', '', {'down_block_types': ['DownBlock2D'] * 3}, None),
    # Names of blocks before diffusers 0.1.
    ('CIFAR10', '', {
        'down_block_types': ['UNetResDownBlock2D', 'UNetResAttnDownBlock2D',
                             *['UNetResDownBlock2D'] * 2],
        'up_block_types': [*['UNetResUpBlock2D'] * 2, 'UNetResAttnUpBlock2D',
                           'UNetResUpBlock2D']}, {}),
    ('CIFAR10', '', {'down_block_types': ['CrossAttnDownBlock2D'] * 4,
                     'up_block_types': ['CrossAttnUpBlock2D'] * 4}, None),
    ('STABLE_1', UNET, {'dropout': 0.1}, {'dropout': 0.1}),
    ('STABLE_1', UNET, {'legacy': True}, {}),
    ('STABLE_1', UNET, {'num_heads': 5, 'num_head_channels': 64},
     {'num_heads': None, 'head_channels': 64}),
    ('STABLE_1', OUTER, {'conditioning_key': 'hybrid'}, {}),
    ('ERMONGROUP_CIFAR10', 'model', {'type': 'bayesian'}, {}),
    ('ERMONGROUP_CIFAR10', 'model', {'ema': False}, {}),
])
def test_keys_whose_meaning_depends_on_others(name, place, fields, expected):
  """`expected` is what changes of ours; None: refused."""
  family, content = changed(name, place, **fields)
  if expected is None:
    with pytest.raises(ValueError, match='this UNet does not support: '):
      family.config({}, content)
  else:
    plain = family.config({}, published_configs.complete(name))
    assert family.config({}, content) == dataclasses.replace(
        plain, **expected)


def test_a_side_that_nothing_states_is_said(caplog):
  content = published_configs.CIFAR10 | {'sample_size': None}
  with caplog.at_level('INFO'):
    assert diffusers_unet.config({}, content).image_size == 32
  assert 'has no sample_size: took 32' in caplog.text


@pytest.mark.parametrize('kind', [
    'ControlNetModel', 'UNetMotionModel', 'Kandinsky3UNet',
    'UNet3DConditionModel', 'FlaxUNet2DConditionModel', 'Transformer2DModel'])
def test_other_classes_are_refused_by_name(tmp_path, kind):
  folder = tmp_path / 'f'
  checkpoints.save_diffusers(
      folder, checkpoints.state_of('unet2d'), families.CONFIGS['unet2d'])
  path = folder / 'config.json'
  path.write_text(json.dumps(
      json.loads(path.read_text()) | {'_class_name': kind}))
  with pytest.raises(ValueError, match=f'_class_name={kind!r}: no UNet'):
    convert.load_pretrained(str(folder))
  # And one whose tensors are nobody's here.
  checkpoints.write(folder / 'diffusion_pytorch_model.safetensors', {
      'transformer_blocks.0.weight': np.zeros((2, 2), np.float32)})
  with pytest.raises(ValueError, match=f'of no family.*json says {kind}'):
    convert.load_pretrained(str(folder))


@pytest.mark.parametrize('inside', [True, False])
@pytest.mark.parametrize('stage', ['kl', 'vq'])
def test_a_first_stages_average_is_left_out_with_a_word(
    tmp_path, caplog, stage, inside):
  """CompVis' encodes and decodes with the weights, whatever `use_ema` says."""
  config = families.STAGES[stage]
  names = foreign.compvis_first_stage(families.state_of(config), config)
  averaged = {f'model_ema.{name.replace(".", "")}': value + 1
              for name, value in names.items()}
  prefix = 'first_stage_model.' if inside else ''
  alone = {prefix + name: value for name, value in names.items()}
  loaded = {}
  for name, tensors in {
      'alone': alone,
      'both': alone | {prefix + n: v for n, v in averaged.items()}}.items():
    path = checkpoints.write(tmp_path / f'{name}.safetensors', tensors)
    caplog.clear()
    with caplog.at_level('INFO'):
      _, params = convert.load_first_stage(path, scale=1.0)
    loaded[name] = params['decoder']['conv_in']['bias']
    assert ('left out the moving average of the first stage' in caplog.text
           ) == (name == 'both')
  np.testing.assert_array_equal(loaded['both'], loaded['alone'])
  np.testing.assert_array_equal(
      loaded['both'], names['decoder.conv_in.bias'])


@pytest.mark.parametrize('fields', [
    {'vq_embed_dim': 5}, {'num_vq_embeddings': 7}])
def test_a_codebook_that_the_tensors_contradict(tmp_path, fields):
  config = families.STAGES['vq']
  state = families.state_of(config)
  path = checkpoints.write(tmp_path / 'a.safetensors',
                           foreign.diffusers_first_stage(state, config))
  (tmp_path / 'config.json').write_text(json.dumps(
      {'_class_name': 'VQModel', 'scaling_factor': 1.0} | fields))
  with pytest.raises(ValueError, match='(?s)does not fit.*quantize.weight'):
    convert.load_first_stage(path)
  assert first_stage.config(
      {n: LazyTensor.of(v) for n, v in
       foreign.diffusers_first_stage(state, config).items()},
      {'_class_name': 'VQModel', 'scaling_factor': 1.0, 'vq_embed_dim': 3,
       'num_vq_embeddings': 16}) == config


def test_sections_beside_the_model_are_not_looked_at():
  content = published_configs.complete('STABLE_1')
  beside = {'data': {'target': 'main.DataModuleFromConfig', 'params': {}},
            'lightning': {'trainer': {'benchmark': True}}}
  assert ldm.config({}, content | beside) == ldm.config({}, content)


@pytest.mark.parametrize('section', ['x', 3, [{}]])
def test_a_first_stage_config_that_is_no_section(section):
  with pytest.raises(ValueError, match='first_stage_config=.*a section'):
    first_stage.config({}, {'model': {'params': {
        'first_stage_config': section}}}, scale=1.0)
