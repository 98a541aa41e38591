"""The moving average is found under whatever names and in whatever folder."""

import logging

import checkpoints
import families
import foreign
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch_writer
import unet_oracle

from msfp_jax import convert


def assert_loads(path, name, state, **options):
  """The file or folder loads as these tensors."""
  _, params = convert.load_pretrained(str(path), **options)
  expected = unet_oracle.from_state_dict(families.CONFIGS[name], state)
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def sets(name):
  """Weights, and their moving average."""
  averaged = checkpoints.state_of(name)
  return {n: v + 1 for n, v in averaged.items()}, averaged


@pytest.mark.parametrize('raw, averaged', [
    ('', ''), ('module.', ''), ('module.', 'module.'),
    ('_orig_mod.', '_orig_mod.'), ('module._orig_mod.', '_orig_mod.')])
def test_a_list_of_ermongroup(tmp_path, raw, averaged):
  weights, mean = sets('ddim')
  path = tmp_path / 'ckpt.pth'
  torch_writer.save_zip(path, [
      {raw + n: v for n, v in weights.items()}, {'lr': 1e-4}, 3, 4,
      {averaged + n: v for n, v in mean.items()}])
  assert_loads(path, 'ddim', mean)
  if raw != averaged:
    assert_loads(path, 'ddim', weights, ema=False)


@pytest.mark.parametrize('raw, averaged', [
    # The whole of DiffusionWrapper, the UNet in it, or one block of that.
    (('model.', 'model._orig_mod.'), ('model_ema.', 'model_ema._orig_mod')),
    (('diffusion_model.', 'diffusion_model._orig_mod.'),
     ('diffusion_model', 'diffusion_model_orig_mod')),
    (('diffusion_model.', 'diffusion_model.module.'),
     ('diffusion_model', 'diffusion_modelmodule')),
    (('middle_block.', 'middle_block._orig_mod.'),
     ('middle_block', 'middle_block_orig_mod')),
    # Compiled for sampling, after the average was made; and the reverse.
    (('diffusion_model.', 'diffusion_model._orig_mod.'), ('', '')),
    (('', ''), ('diffusion_model', 'diffusion_model_orig_mod'))])
def test_a_file_of_lightning(tmp_path, raw, averaged, caplog):
  name = 'ldm_beds'
  config = families.CONFIGS[name]
  weights, mean = sets(name)
  content = foreign.ldm_checkpoint(weights, config, averaged=mean)
  content['state_dict'] = {
      n.replace(*averaged, 1) if n.startswith('model_ema.')
      else n.replace(*raw, 1): v for n, v in content['state_dict'].items()}
  path = tmp_path / 'model.ckpt'
  torch_writer.save_zip(path, content)
  checkpoints.write_yaml(path, config)
  with caplog.at_level(logging.INFO):
    assert_loads(path, name, mean)
  assert 'no moving average' not in caplog.text
  if not raw[0]:  # once is enough, loading takes a second
    assert_loads(path, name, weights, ema=False)


@pytest.mark.parametrize('folder', ['', 'unet'])
def test_a_folder_of_the_average_beside_that_of_the_weights(
    tmp_path, folder, caplog):
  name = 'unet2d'
  config = families.CONFIGS[name]
  weights, mean = sets(name)
  for part, state in (('unet', weights), ('unet_ema', mean)):
    checkpoints.save_diffusers(tmp_path / part, state, config)
  with caplog.at_level(logging.INFO):
    assert_loads(tmp_path / folder, name, mean)
  assert 'unet_ema; ema=False takes the weights' in caplog.text
  assert_loads(tmp_path / folder, name, weights, ema=False)
  # A file is the one that was named.
  assert_loads(tmp_path / 'unet' / 'diffusion_pytorch_model.safetensors', name,
               weights)


def test_files_that_are_no_average_by_name(tmp_path):
  name = 'unet2d'
  weights, mean = sets(name)
  checkpoints.save_diffusers(tmp_path / 'f', mean, families.CONFIGS[name])
  safetensors.numpy.save_file(
      foreign.diffusers(weights, families.CONFIGS[name]),
      tmp_path / 'f' / 'diffusion_pytorch_model.non_ema.safetensors')
  assert_loads(tmp_path / 'f', name, mean)
  assert_loads(tmp_path / 'f', name, weights, ema=False)


@pytest.mark.parametrize('wrapper', ['_orig_mod.', 'module._orig_mod.'])
def test_a_compiled_unet_of_diffusers(tmp_path, wrapper):
  name = 'unet2d'
  state = checkpoints.state_of(name)
  checkpoints.describe(tmp_path, name, families.CONFIGS[name])
  assert_loads(checkpoints.write(tmp_path / 'a.safetensors', {
      wrapper + n: v for n, v in foreign.diffusers(
          state, families.CONFIGS[name]).items()}), name, state)


def test_two_models_in_one_file_by_a_wrapper_alone(tmp_path):
  tensors = foreign.diffusers(
      checkpoints.state_of('unet2d'), families.CONFIGS['unet2d'])
  path = checkpoints.write(tmp_path / 'a.safetensors', tensors | {
      'module.conv_in.bias': tensors['conv_in.bias']})
  with pytest.raises(ValueError, match='conv_in.bias and.*one tensor by name'):
    convert.load_pretrained(path)


def test_the_origin_of_weights_whose_average_does_not_fit(tmp_path):
  """ema=False, the way out that the message names, is one for both."""
  name = 'ldm_beds'
  weights, mean = sets(name)
  content = foreign.ldm_checkpoint(weights, families.CONFIGS[name],
                                   averaged=mean)
  del content['state_dict'][next(
      n for n in content['state_dict'] if n.startswith('model_ema.diff'))]
  path = tmp_path / 'model.ckpt'
  torch_writer.save_zip(path, content)
  checkpoints.write_yaml(path, families.CONFIGS[name])
  with pytest.raises(ValueError, match='ema=False takes the weights'):
    convert.load_origin(str(path))
  assert convert.load_origin(str(path), ema=False).sampler == 'ddim'
