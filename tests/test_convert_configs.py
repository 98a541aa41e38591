"""A checkpoint's model is told by its configuration, or by shapes alone."""

import copy
import dataclasses
import json

import checkpoints
import families
import foreign
import jax
import numpy as np
import pytest
import unet_oracle
import yaml

from configs import common
from msfp_jax import convert
from msfp_jax.convert import load
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.run import teacher


def test_a_yaml_tells_what_shapes_do_not(tmp_path):
  config = families.CONFIGS['ldm_beds']
  checkpoints.save_ldm(
      tmp_path / 'model.ckpt', checkpoints.state_of('ldm_beds'), config)
  (tmp_path / 'config.yaml').unlink()
  with pytest.raises(ValueError, match='no published model has.*yaml'):
    convert.load_pretrained(str(tmp_path / 'model.ckpt'))
  path = tmp_path / 'other.yaml'
  content = {'model': {'params': {'unet_config': {
      'params': {'image_size': 16, 'num_heads': 4}}}}}
  path.write_text(yaml.safe_dump(content))
  model, _ = convert.load_pretrained(
      str(tmp_path / 'model.ckpt'), config=str(path))
  assert model.config.image_size == 16
  assert (model.config.num_heads, model.config.head_channels) == (4, None)
  assert model.config.attn_resolutions == (8,)
  for field, value in (('use_new_attention_order', True), ('num_heads', -1),
                       ('conv_resample', False)):
    changed = copy.deepcopy(content)
    changed['model']['params']['unet_config']['params'][field] = value
    path.write_text(yaml.safe_dump(changed))
    with pytest.raises(ValueError, match=field):
      convert.load_pretrained(str(tmp_path / 'model.ckpt'), config=str(path))
  path.write_text('model: {}')
  with pytest.raises(ValueError, match='unet_config'):
    convert.load_pretrained(str(tmp_path / 'model.ckpt'), config=str(path))
  path.write_text('!!python/object/apply:os.system ["touch proof"]')
  with pytest.raises(ValueError, match='no configuration'):
    convert.load_pretrained(str(tmp_path / 'model.ckpt'), config=str(path))


@pytest.mark.parametrize('field, value', [
    ('act_fn', 'mish'), ('addition_embed_type', 'text_time'),
    ('down_block_types', ['KDownBlock2D', 'AttnDownBlock2D']),
    ('attn_norm_num_groups', 4)])
def test_an_architecture_that_is_not_ours(tmp_path, field, value):
  checkpoints.save_diffusers(
      tmp_path / 'f', checkpoints.state_of('unet2d'),
      families.CONFIGS['unet2d'])
  path = tmp_path / 'f' / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
  with pytest.raises(ValueError, match=rf'(?s)f/diffusion.*{value}'
                     if isinstance(value, str) else 'UNet does not support'):
    convert.load_pretrained(str(tmp_path / 'f'))


def test_an_original_yaml_of_ddim(tmp_path):
  """A yaml of ermongroup/ddim tells what shapes do not: side and attention."""
  config = families.CONFIGS['ddim']
  path = checkpoints.write(
      tmp_path / 'm.safetensors', checkpoints.state_of('ddim'))
  content = {'data': {'image_size': 64}, 'model': {
      'in_channels': 3, 'out_ch': 3, 'ch': 32, 'ch_mult': [1, 2],
      'num_res_blocks': 1, 'attn_resolutions': [32], 'dropout': 0.0,
      'resamp_with_conv': True}}
  (tmp_path / 'config.yaml').write_text(yaml.safe_dump(content))
  model, _ = convert.load_pretrained(path)
  assert model.config == dataclasses.replace(
      config, image_size=64, attn_resolutions=(32,), dropout=0.0)
  content['model']['resamp_with_conv'] = False
  (tmp_path / 'config.yaml').write_text(yaml.safe_dump(content))
  with pytest.raises(ValueError, match='resamp_with_conv'):
    convert.load_pretrained(path)
  (tmp_path / 'config.yaml').write_text('model: {}')
  with pytest.raises(ValueError, match='no model and data.image_size'):
    convert.load_pretrained(path)


@pytest.mark.parametrize('name, change', [
    ('unet2d', {'block_out_channels': [32, 96]}),
    ('unet2d', {'down_block_types': ['DownBlock2D', 'DownBlock2D'],
                'up_block_types': ['UpBlock2D', 'UpBlock2D']}),
    ('unet2d', {'num_class_embeds': 4}),
    ('sd1', {'cross_attention_dim': 96}),
    ('sd1', {'transformer_layers_per_block': 2}),
])
def test_a_config_that_the_tensors_contradict(tmp_path, name, change):
  """The configuration rules: what differs is listed, not taken over."""
  folder = tmp_path / 'f'
  checkpoints.save_diffusers(
      folder, checkpoints.state_of(name), families.CONFIGS[name])
  content = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(content | change))
  with pytest.raises(ValueError, match=r'(?s)does not fit.*(missing|unexpected'
                                       r'|the model wants)'):
    convert.load_pretrained(str(folder))


def test_with_a_config_a_missing_landmark_is_one_of_the_missing(tmp_path):
  config = families.CONFIGS['unet2d']
  tensors = foreign.diffusers(checkpoints.state_of('unet2d'), config)
  for name in ('conv_in.weight', 'down_blocks.0.resnets.0.conv1.weight'):
    del tensors[name]
  path = checkpoints.write(tmp_path / 'a.safetensors', tensors)
  with pytest.raises(ValueError, match='lacks .*configuration'):
    convert.load_pretrained(path)
  checkpoints.describe(tmp_path, 'unet2d', config)
  with pytest.raises(ValueError, match=r'(?s)missing conv_in.weight.*'
                                       r'missing down.0.block.0.conv1.weight'):
    convert.load_pretrained(path)


def test_without_a_config_only_published_models_are_assumed(tmp_path):
  path = checkpoints.write(tmp_path / 'a.safetensors', foreign.diffusers(
      checkpoints.state_of('unet2d'), families.CONFIGS['unet2d']))
  with pytest.raises(ValueError, match='no published model.*config.json'):
    convert.load_pretrained(path)
  (tmp_path / 'other.json').write_text('{"sample_size": 32}')
  with pytest.raises(ValueError, match='no config.json of diffusers'):
    convert.load_pretrained(path, config=str(tmp_path / 'other.json'))


def test_a_model_of_another_kind_is_told_by_its_scheduler(tmp_path):
  """Before its tensors are, of which the reasons would lead astray."""
  config = families.CONFIGS['unet2d']
  checkpoints.save_pipeline(
      tmp_path / 'p', checkpoints.state_of('unet2d'), config)
  scheduler = tmp_path / 'p' / 'scheduler'
  scheduler.mkdir()
  file = scheduler / 'scheduler_config.json'
  file.write_text('{"_class_name": "DDPMScheduler"}')
  assert convert.load_pretrained(str(tmp_path / 'p'))[0].config == config
  file.write_text('{"_class_name": "CMStochasticIterativeScheduler"}')
  (tmp_path / 'p' / 'unet' / 'config.json').write_text('{"act_fn": "mish"}')
  with pytest.raises(ValueError, match='CMStochasticIterativeScheduler'):
    convert.load_pretrained(str(tmp_path / 'p'))


def test_two_tensors_for_one_place(tmp_path):
  config = families.CONFIGS['unet2d']
  tensors = foreign.diffusers(checkpoints.state_of('unet2d'), config)
  name = next(n for n in tensors if n.endswith('to_q.weight'))
  tensors[name.replace('to_q', 'query')] = tensors[name]
  checkpoints.describe(tmp_path, 'unet2d', config)
  with pytest.raises(ValueError, match='unexpected .*the same as'):
    convert.load_pretrained(
        checkpoints.write(tmp_path / 'a.safetensors', tensors))


def test_fused_projections_of_another_width_are_listed(tmp_path):
  config = families.CONFIGS['ldm_beds']
  tensors = foreign.ldm_checkpoint(
      checkpoints.state_of('ldm_beds'), config)['state_dict']
  for name in [n for n in tensors if n.endswith('qkv.bias')][:2]:
    tensors[name] = tensors[name][:-3]
  checkpoints.describe(tmp_path, 'ldm_beds', config)
  with pytest.raises(ValueError) as error:
    convert.load_pretrained(
        checkpoints.write(tmp_path / 'a.safetensors', tensors))
  assert str(error.value).count('the model wants') == 6


@pytest.mark.parametrize('name, save, file', [
    ('ldm_beds', 'ldm', 'm.ckpt'), ('unet2d', 'diffusers', 'folder')])
def test_class_embeddings_in_foreign_names(tmp_path, name, save, file):
  config = dataclasses.replace(families.CONFIGS[name], num_classes=5)
  state = families.state_of(config)
  checkpoints.SAVE[save](tmp_path / file, state, config)
  model, params = convert.load_pretrained(str(tmp_path / file))
  assert model.config == config
  jax.tree.map(np.testing.assert_array_equal, params,
               unet_oracle.from_state_dict(config, state))


@pytest.mark.parametrize('stated, expected', [
    ({}, 0), ({'use_ema': False}, 1), ({'use_ema': True}, 0)])
def test_the_yaml_says_whether_to_average(tmp_path, stated, expected):
  config, state = families.CONFIGS['ldm_beds'], checkpoints.state_of('ldm_beds')
  checkpoints.save_ldm(tmp_path / 'm.ckpt', state, config)
  content = foreign.compvis_yaml(config)
  content['model']['params'] |= stated
  (tmp_path / 'config.yaml').write_text(yaml.safe_dump(content))
  path, run = str(tmp_path / 'm.ckpt'), common.get_config()
  # From Python, and in a run whose config says nothing.
  for _, params in (convert.load_pretrained(path), teacher.load(
      path, '', described_by='', ema=run.ema, fields=run.model, seed=0,
      loras=run.loras)):
    np.testing.assert_array_equal(
        params['conv_in']['bias'], state['conv_in.bias'] + expected)


@pytest.mark.parametrize('field, value', [
    ('num_res_blocks', [1, 2]), ('num_classes', 'sequential'),
    ('attention_resolutions', [3]), ('num_heads_upsample', 4),
    ('disable_self_attentions', [True])])
def test_fields_of_a_yaml_that_are_not_ours(tmp_path, field, value):
  config = families.CONFIGS['ldm_beds']
  checkpoints.save_ldm(
      tmp_path / 'm.ckpt', checkpoints.state_of('ldm_beds'), config)
  content = foreign.compvis_yaml(config)
  content['model']['params']['unet_config']['params'][field] = value
  (tmp_path / 'config.yaml').write_text(yaml.safe_dump(content))
  with pytest.raises(ValueError, match=rf'm.ckpt.*{field}'):
    convert.load_pretrained(str(tmp_path / 'm.ckpt'))


def test_one_number_for_all_levels_may_be_a_list(tmp_path):
  config = families.CONFIGS['sd1']
  folder = tmp_path / 'f'
  checkpoints.save_diffusers(folder, checkpoints.state_of('sd1'), config)
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {
      'only_cross_attention': [False, False], 'layers_per_block': [1, 1],
      'cross_attention_dim': [768, 768]}))
  assert convert.load_pretrained(str(folder))[0].config == config


def test_several_models_in_one_file(tmp_path):
  state = checkpoints.state_of('ddim')
  path = checkpoints.write(tmp_path / 'm.safetensors', {
      f'{root}.{n}': v for n, v in state.items() for root in ('ema', 'model')})
  with pytest.raises(ValueError, match='several models'):
    convert.load_pretrained(path)


def test_half_precision_shards_of_torch_save(tmp_path):
  state, config = checkpoints.state_of('unet2d'), families.CONFIGS['unet2d']
  checkpoints.save_diffusers_half(tmp_path / 'f', state, config)
  model, params = convert.load_pretrained(str(tmp_path / 'f'))
  assert model.config == config
  expected = unet_oracle.from_state_dict(
      config, {n: v.astype(np.float16) for n, v in state.items()})
  jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize('stated, shape', [
    (48, (48, 48)), ([48, 48], (48, 48)), ([48, 64], (48, 64)),
    ([64, 48], (64, 48))])
@pytest.mark.parametrize('name', ['unet2d', 'ldm_beds', 'ddim'])
def test_height_and_width_are_as_the_configuration_says(name, stated, shape):
  family, state, given = sided(name, stated)
  config = family.config(state, given)
  assert family.MODEL(config).sample_shape[:2] == shape
  # Attention stands at the same levels whatever the sides.
  square = family.config(state, sided(name, 32)[2])
  if name != 'ddim':  # whose yaml says at which side
    assert [shape[0] >> i in config.attn_resolutions for i in range(2)] == [
        32 >> i in square.attn_resolutions for i in range(2)]


@pytest.mark.parametrize('stated', [
    [48], [48, 48, 48], '48', [48.0, 48.0], -8, [0, 8], True, {'height': 8}])
@pytest.mark.parametrize('name', ['unet2d', 'ldm_beds', 'ddim'])
def test_sides_that_are_none(name, stated):
  family, state, given = sided(name, stated)
  with pytest.raises(ValueError, match=r'(sample|image)_size=.*height and'):
    family.config(state, given)


def sided(name, stated):
  """A family, tensors in its names, and a configuration with these sides."""
  config = families.CONFIGS[name]
  state = families.state_of(config)
  if name == 'unet2d':
    found = foreign.diffusers(state, config)
    given = foreign.diffusers_config(config) | {'sample_size': stated}
  elif name == 'ldm_beds':
    found, given = foreign.ldm(state, config), foreign.compvis_yaml(config)
    given['model']['params']['image_size'] = stated
  else:
    found, given = state, {'model': {}, 'data': {'image_size': stated}}
  family = load.FAMILIES[{'unet2d': 'diffusers', 'ldm_beds': 'ldm'}.get(
      name, name)]
  tensors = {n: LazyTensor.of(v) for n, v in found.items()}
  return family, family.select(tensors, False), given
