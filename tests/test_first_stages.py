"""First stages: what their configurations say, and the scale of the latents."""

import json

import checkpoints
import families
import foreign
import numpy as np
import pytest
import yaml

from configs import common
from msfp_jax import convert
from msfp_jax.convert import first_stage
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.models import decode_rows
from msfp_jax.run import experiment
from msfp_jax.run import teacher

NAMINGS = {'compvis': foreign.compvis_first_stage,
           'diffusers': foreign.diffusers_first_stage}
by_naming = pytest.mark.parametrize('naming', NAMINGS)


def written(folder, stage, naming):
  """Writes a small first stage: (its path, its configuration)."""
  tensors, config = tensors_of(stage, naming)
  return checkpoints.write(folder / 'stage.safetensors', {
      name: tensor.read() for name, tensor in tensors.items()}), config


def tensors_of(stage, naming='compvis'):
  """Its tensors as they lie in a file: (them, its configuration)."""
  config = families.STAGES[stage]
  return {name: LazyTensor.of(value) for name, value in NAMINGS[naming](
      families.state_of(config), config).items()}, config


def compvis(config, side=32):
  """The yaml of an autoencoder's training, as CompVis publishes it."""
  is_vq = config.kind == 'vq'
  name = 'VQModel' if is_vq else 'AutoencoderKL'
  return {'model': {
      'target': f'ldm.models.autoencoder.{name}',
      'params': {
          'embed_dim': config.embed_dim, 'monitor': 'val/rec_loss',
          'lossconfig': {'target': 'a.b.Loss', 'params': {'disc_start': 1}},
          **({'n_embed': config.codebook_size} if is_vq else {}),
          'ddconfig': {
              'double_z': not is_vq, 'z_channels': config.z_channels,
              'resolution': side, 'in_channels': 3, 'out_ch': 3,
              'ch': config.ch, 'ch_mult': list(config.ch_mult),
              'num_res_blocks': config.num_res_blocks,
              'attn_resolutions': [side >> i for i in config.attn_levels],
              'dropout': 0.0}}}}


def within(content, target=None, **outer):
  """The yaml of a latent diffusion model around that of its first stage."""
  stage = content['model']
  return {'model': {'params': outer | {'first_stage_config': stage | {
      'target': target or stage['target'].replace(
          'VQModel', 'VQModelInterface')}}}}


@by_naming
def test_a_scale_that_nothing_tells_is_asked_for(tmp_path, naming):
  """No number of other models': a picture decoded by it would look faded."""
  for stage in ('kl', 'kl, shift'):
    path, _ = written(tmp_path, stage, naming)
    if naming == 'diffusers':
      (tmp_path / 'config.json').write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match='(?s)stage.safetensors.*nothing tells '
                                         'the scale.*first_stage_scale'):
      convert.load_first_stage(path)
    model, _ = convert.load_first_stage(path, scale=0.5, shift=0.25)
    assert (model.config.scale, model.config.shift) == (0.5, 0.25)
    # A scale alone: without a shift there is none.
    assert convert.load_first_stage(path, scale=2.0)[0].config.shift == 0.0


@pytest.mark.parametrize('said, scale', [
    ({'scaling_factor': 0.18215}, 1.0), ({'scaling_factor': 3.0}, 0.25)])
def test_a_typed_scale_wins_over_the_file_and_the_log_has_both(
    tmp_path, caplog, said, scale):
  path, _ = written(tmp_path, 'vq', 'diffusers')
  (tmp_path / 'config.json').write_text(json.dumps(said))
  with caplog.at_level('INFO'):
    assert convert.load_first_stage(path, scale=scale)[0].config.scale == scale
  assert f'have scale {scale}' in caplog.text
  assert f'the files say {said["scaling_factor"]}' in caplog.text


@pytest.mark.parametrize('outer, held, expected', [
    ({'scale_factor': 0.3}, None, 0.3), ({'scale_factor': 0.3}, 0.7, 0.7),
    ({}, None, 1.0),  # what CompVis' LatentDiffusion takes
    ({'scale_by_std': True}, 0.7, 0.7),
    ({'scale_by_std': True, 'scale_factor': 0.3}, None, None)])
@pytest.mark.parametrize('stage', ['kl', 'vq'])
def test_the_scale_of_a_whole_model(stage, outer, held, expected):
  tensors, config = tensors_of(stage)
  content = within(compvis(config), **outer)
  if expected is None:  # a standard deviation that the file does not hold
    with pytest.raises(ValueError, match='nothing tells the scale'):
      first_stage.config(tensors, content, held)
  else:
    assert first_stage.config(tensors, content, held).scale == expected


@pytest.mark.parametrize('value', [[0.1, 0.2], [], 0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_is_none(tmp_path, value):
  tensors, _ = tensors_of('vq')
  path = checkpoints.write(tmp_path / 'stage.safetensors', {
      f'first_stage_model.{name}': tensor.read()
      for name, tensor in tensors.items()} | {
          'scale_factor': np.array(value, np.float32)})
  with pytest.raises(ValueError, match='stage.safetensors: scale(_factor has '
                                       'shape|=.*must be numbers)'):
    convert.load_first_stage(path)


@pytest.mark.parametrize('place, key, value', [
    ('ddconfig', 'attn_type', 'linear'), ('ddconfig', 'attn_type', 'none'),
    ('ddconfig', 'use_linear_attn', True), ('ddconfig', 'tanh_out', True),
    ('ddconfig', 'give_pre_end', True), ('ddconfig', 'resamp_with_conv', False),
    ('ddconfig', 'double_z', None), ('ddconfig', 'mel_bins', 64),
    ('ddconfig', 'num_res_blocks', [1, 2]),
    ('ddconfig', 'resolution', [32, 64]),
    ('params', 'subband', 4), ('params', 'embed_dim', [3]),
    ('params', 'sigma', 1), ('model', 'dreamt_of', 1),
    ('model', 'target', 'taming.vqgan.GumbelVQ')])
@pytest.mark.parametrize('stage', ['kl', 'vq'])
def test_what_a_yaml_asks_for_is_named_by_its_key(stage, place, key, value):
  tensors, config = tensors_of(stage)
  content = compvis(config)
  places = {'model': content['model'], 'params': content['model']['params'],
            'ddconfig': content['model']['params']['ddconfig']}
  # Written out, what it takes as well is no obstacle.
  places['ddconfig'] |= {'attn_type': 'vanilla-xformers', 'tanh_out': False}
  assert first_stage.config(tensors, content, scale=config.scale) == config
  if key == 'double_z':
    value = not places[place][key]
  elif key == 'embed_dim':
    value = [config.embed_dim, 5]
  places[place][key] = value
  with pytest.raises(ValueError, match=key) as error:
    first_stage.config(tensors, content, scale=1.0)
  assert len(str(error.value)) < 500


def test_a_codebook_that_a_whole_model_does_not_use(tmp_path):
  """Around a plain VQModel, CompVis' decoder leaves latents as they are."""
  path, config = written(tmp_path, 'vq', 'compvis')
  file = tmp_path / 'config.yaml'
  file.write_text(yaml.safe_dump(within(compvis(config))))
  assert convert.load_first_stage(path)[0].config == config
  file.write_text(yaml.safe_dump(within(
      compvis(config), target='ldm.models.autoencoder.VQModel')))
  with pytest.raises(ValueError, match='target=.*VQModelInterface'):
    convert.load_first_stage(path)


@pytest.mark.parametrize('key, value', [
    ('act_fn', 'gelu'), ('norm_type', 'spatial'), ('_class_name', 'Dreamt'),
    ('mid_block_add_attention', False), ('lookup_from_codebook', True),
    ('latents_mean', [0.1] * 4), ('latents_std', [2.0] * 4),
    ('use_post_quant_conv', False), ('tiling', 3),
    ('down_block_types', ['DownEncoderBlock2D', 'KDownBlock2D']),
    ('up_block_types', ['UpDecoderBlock2D', 'AttnUpDecoderBlock2D'])])
def test_what_a_first_stage_does_not_have_is_named_by_its_key(key, value):
  tensors, config = tensors_of('kl', 'diffusers')
  content = {'_class_name': 'AutoencoderKL', 'force_upcast': True,
             'down_block_types': ['DownEncoderBlock2D'] * 3,
             'norm_num_groups': 32, 'scaling_factor': 0.18215}
  assert first_stage.config(tensors, content) == config
  with pytest.raises(ValueError, match='autoencoder does not support: .*' + (
      'other levels' if key == 'up_block_types' else key)) as error:
    first_stage.config(tensors, content | {key: value})
  assert len(str(error.value)) < 500


def test_a_scale_that_diffusers_gives_every_vq_model_is_said(tmp_path, caplog):
  config = families.STAGES['vq']
  path = checkpoints.write(
      tmp_path / 'vq.safetensors',
      foreign.diffusers_first_stage(families.state_of(config), config))
  for scale, said in ((1.0, False), (0.18215, True)):
    (tmp_path / 'config.json').write_text(json.dumps({
        '_class_name': 'VQModel', 'scaling_factor': scale,
        'num_vq_embeddings': 16}))
    caplog.clear()
    assert convert.load_first_stage(path)[0].config.scale == scale
    assert ('writes into every VQModel' in caplog.text) == said


def test_latents_with_a_scale_for_every_channel(tmp_path):
  config = families.STAGES['kl']
  path = checkpoints.write(tmp_path / 'vae.safetensors',
                           foreign.diffusers_first_stage(
                               families.state_of(config), config))
  (tmp_path / 'config.json').write_text('{"latents_mean": [1, 2, 3, 4]}')
  with pytest.raises(ValueError, match='latents_mean'):
    convert.load_first_stage(path)


@pytest.mark.parametrize('naming', ['compvis', 'diffusers'])
def test_a_first_stage_described_by_a_config(tmp_path, naming):
  config = families.STAGES['vq, attention']
  rename = {'compvis': foreign.compvis_first_stage,
            'diffusers': foreign.diffusers_first_stage}[naming]
  path = checkpoints.write(tmp_path / 'vq.safetensors',
                           rename(families.state_of(config), config))
  if naming == 'compvis':
    content = {'model': {'params': {'embed_dim': 4, 'n_embed': 8, 'ddconfig': {
        'double_z': False, 'z_channels': 4, 'resolution': 32, 'in_channels': 3,
        'out_ch': 3, 'ch': 32, 'ch_mult': [1, 2], 'num_res_blocks': 1,
        'attn_resolutions': [16], 'dropout': 0.0}}}}
    file, key = tmp_path / 'config.yaml', 'ch_mult'
    inner = content['model']['params']['ddconfig']
  else:
    content = inner = {
        '_class_name': 'VQModel', 'block_out_channels': [32, 64],
        'layers_per_block': 1, 'latent_channels': 4, 'num_vq_embeddings': 8,
        'down_block_types': ['DownEncoderBlock2D', 'AttnDownEncoderBlock2D']}
    file, key = tmp_path / 'config.json', 'block_out_channels'
  file.write_text(json.dumps(content))
  assert convert.load_first_stage(path)[0].config == config
  inner[key] = [1, 3] if naming == 'compvis' else [32, 96]
  file.write_text(json.dumps(content))
  with pytest.raises(ValueError, match='does not fit'):
    convert.load_first_stage(path)


@pytest.mark.slow
def test_an_experiment_decodes_by_the_scale_of_its_config(tmp_path):
  path, _ = written(tmp_path, 'kl, shift', 'compvis')

  def decode(z, **typed):
    run, shape = teacher.load_decoder(
        path, (4, 4, 16), described_by='', fields={}, seed=0, **typed)
    assert shape == (8, 8, 3)
    return run(z)

  z = np.random.default_rng(0).normal(size=(1, 4, 4, 16)).astype(np.float32)
  # A UNet's latents are (z - shift) * scale; powers of two are exact.
  np.testing.assert_array_equal(
      decode((z - 0.5) * 4, scale=4.0, shift=0.5),
      decode((z - 0.5) * 4 / 4 + 0.5, scale=1.0, shift=None))


def test_an_experiment_decodes_by_the_rows_of_its_config(
    tmp_path, monkeypatch):
  path, stage = written(tmp_path, 'kl, shift', 'compvis')
  monkeypatch.setattr(
      decode_rows, 'decode', lambda model, params, z, rows: (
          rows + 0 * params['decoder']['conv_in']['bias'][0] + z))
  run, _ = teacher.load_decoder(
      path, (4, 4, 16), described_by='', fields={}, seed=0, rows=64,
      scale=stage.scale, shift=stage.shift)
  np.testing.assert_array_equal(run(np.ones((1, 4, 4, 16))), 65)
  config = common.get_config()
  config.update({'pretrained': 'random', 'first_stage': path})
  config.first_stage_rows = 64
  experiment.check(config)


@pytest.mark.parametrize('fields, message', [
    ({'first_stage_scale': 0.5}, "first_stage='': only the first stage"),
    ({'first_stage_shift': 0.5, 'first_stage': 'random'}, "'random': only"),
    ({'first_stage_rows': 64}, "first_stage_rows=64, first_stage=''"),
    ({'first_stage_rows': -1, 'first_stage': 'x'}, 'first_stage_rows=-1'),
    ({'first_stage_scale': -1.0, 'first_stage': 'x'}, '-1.0: must be'),
    ({'first_stage_scale': np.inf, 'first_stage': 'x'}, 'inf: must be'),
    ({'first_stage_shift': np.nan, 'first_stage': 'x'}, 'nan: must be')])
def test_a_scale_is_looked_at_before_anything_is_loaded(fields, message):
  config = common.get_config()
  config.update({'pretrained': 'random'} | fields)
  with pytest.raises(ValueError, match=message):
    experiment.check(config)
