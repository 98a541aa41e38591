"""Checkpoints of every family load, tensor for tensor, or say why not."""

import json

import checkpoints
import families
import foreign
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch_writer
import unet_oracle

from msfp_jax import convert
from msfp_jax.convert import load
from msfp_jax.models.autoencoder import Autoencoder

# Name: model, how its file is written, the file's name.
CASES = {
    'ddim, ckpt.pth': ('ddim', 'list', 'ckpt.pth'),
    'ddim, EMA alone': ('ddim', 'state', 'ema_cifar10'),
    'ddim, three levels': ('ddim_three_levels', 'state', 'ema_x'),
    'ddim, bayesian': ('ddim', 'bayesian', 'ema_x'),
    'ldm, beds': ('ldm_beds', 'ldm', 'model.ckpt'),
    'ldm, churches': ('ldm_churches', 'ldm', 'model.ckpt'),
    'ldm, class-conditional': ('ldm_class', 'ldm_plain', 'm.safetensors'),
    'ldm, Stable Diffusion 1': ('sd1', 'ldm', 'model.ckpt'),
    'ldm, Stable Diffusion 2': ('sd2', 'ldm_plain', 'm.safetensors'),
    'diffusers, UNet2DModel': ('unet2d', 'diffusers', 'folder'),
    'diffusers, old attention': ('unet2d', 'diffusers_old', 'folder'),
    'diffusers, switches': ('unet2d_relative', 'diffusers', 'folder'),
    'diffusers, shards': ('unet2d', 'diffusers_shards', 'folder'),
    'diffusers, pipeline': ('unet2d', 'pipeline', 'folder'),
    'diffusers, Stable Diffusion 1': ('sd1', 'diffusers', 'folder'),
    'diffusers, Stable Diffusion 2': ('sd2', 'diffusers_linear', 'folder'),
}


@pytest.mark.parametrize('name, save, file', CASES.values(), ids=CASES)
def test_every_family_tensor_for_tensor(tmp_path, name, save, file):
  state, config = checkpoints.state_of(name), families.CONFIGS[name]
  checkpoints.SAVE[save](tmp_path / file, state, config)
  model, params = convert.load_pretrained(str(tmp_path / file))
  assert model.config == config
  expected = unet_oracle.from_state_dict(config, state)
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  assert jax.tree.structure(params) == jax.tree.structure(expected)


def test_ema_false_takes_the_trained_weights(tmp_path):
  for name, save in (('ddim', 'list'), ('ldm_beds', 'ldm')):
    state, config = checkpoints.state_of(name), families.CONFIGS[name]
    checkpoints.SAVE[save](tmp_path / f'{name}.ckpt', state, config)
    _, params = convert.load_pretrained(
        str(tmp_path / f'{name}.ckpt'), ema=False)
    expected = unet_oracle.from_state_dict(
        config, {n: v + 1 for n, v in state.items()})
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions(tmp_path, dtype):
  config = families.CONFIGS['ddim']
  state = {n: v.astype(dtype) for n, v in checkpoints.state_of('ddim').items()}
  torch_writer.save_zip(tmp_path / 'a.pth', state)
  names = ['a.pth']
  if dtype != np.float64:
    safetensors.numpy.save_file(state, tmp_path / 'a.safetensors')
    names.append('a.safetensors')
  for name in names:
    _, params = convert.load_pretrained(str(tmp_path / name))
    expected = unet_oracle.from_state_dict(
        config, {n: v.astype(np.float32) for n, v in state.items()})
    jax.tree.map(np.testing.assert_array_equal, params, expected)


# The families' bare state dicts, for damage.
BARE = {
    'ddim': ('ddim', lambda state, config: dict(state)),
    'ldm': ('ldm_beds', lambda state, config: foreign.ldm_checkpoint(
        state, config)['state_dict']),
    'ldm, transformer': ('ldm_class', lambda state, config:
                         foreign.ldm_checkpoint(state, config)['state_dict']),
    'diffusers': ('unet2d', foreign.diffusers),
    'diffusers, transformer': ('sd1', foreign.diffusers),
}
bare = pytest.mark.parametrize('name, rename', BARE.values(), ids=BARE)


@bare
def test_every_damage_is_listed(tmp_path, name, rename):
  state, config = checkpoints.state_of(name), families.CONFIGS[name]
  checkpoints.describe(tmp_path, name, config)
  tensors = rename(state, config)
  _, params = convert.load_pretrained(
      checkpoints.write(tmp_path / 'a.safetensors', tensors))
  jax.tree.map(np.testing.assert_array_equal, params,
               unet_oracle.from_state_dict(config, state))
  norms = [n for n in tensors if 'up' in n or 'output' in n]
  biases = sorted(n for n in norms if n.endswith('.bias'))
  weights = sorted(n for n in norms if tensors[n].ndim == 4
                   and tensors[n].shape[0] != tensors[n].shape[1])
  changed = dict(tensors)
  del changed[biases[0]]
  inside = 'model.diffusion_model.' if name.startswith('ldm') else ''
  changed[f'{inside}extra.weight'] = np.zeros(3, np.float32)
  changed[biases[1]] = tensors[biases[1]][:-1]
  changed[biases[2]] = tensors[biases[2]].astype(np.int32)
  changed[weights[0]] = tensors[weights[0]].swapaxes(0, 1)
  with pytest.raises(ValueError) as error:
    convert.load_pretrained(
        checkpoints.write(tmp_path / 'b.safetensors', changed))
  message = str(error.value)
  assert 'b.safetensors' in message
  lines = message.splitlines()[1:]
  kinds = [line.strip().split()[0] for line in lines]
  assert kinds.count('missing') == 1
  assert kinds.count('unexpected') == 1
  assert sum('the model wants' in line for line in lines) == 2
  assert sum('int32, which holds no weights' in line for line in lines) == 1


@bare
def test_values_that_are_not_finite(tmp_path, name, rename):
  state, config = checkpoints.state_of(name), families.CONFIGS[name]
  checkpoints.describe(tmp_path, name, config)
  tensors = rename(state, config)
  for bias in sorted(n for n in tensors if n.endswith('.bias'))[:2]:
    tensors[bias] = np.full_like(tensors[bias], np.nan)
  with pytest.raises(ValueError) as error:
    convert.load_pretrained(
        checkpoints.write(tmp_path / 'a.safetensors', tensors))
  # Fused projections are three of ours.
  assert str(error.value).count('not finite') >= 2


def test_pruned_files_keep_the_counters_of_the_average_only(tmp_path):
  config = families.CONFIGS['sd1']
  checkpoint = foreign.ldm_checkpoint(checkpoints.state_of('sd1'), config)
  checkpoint['state_dict'] |= {
      'model_ema.decay': np.array(0.9999, np.float32),
      'model_ema.num_updates': np.array(7, np.int32)}
  checkpoints.write_yaml(tmp_path / 'a', config)
  torch_writer.save_zip(tmp_path / 'sd.ckpt', checkpoint)
  _, params = convert.load_pretrained(str(tmp_path / 'sd.ckpt'))
  expected = unet_oracle.from_state_dict(config, checkpoints.state_of('sd1'))
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_an_average_that_does_not_fit(tmp_path):
  config = families.CONFIGS['ldm_beds']
  checkpoints.write_yaml(tmp_path / 'a', config)
  checkpoint = foreign.ldm_checkpoint(
      checkpoints.state_of('ldm_beds'), config,
      averaged=checkpoints.state_of('ldm_beds'))
  del checkpoint['state_dict']['model_ema.diffusion_modelout2weight']
  torch_writer.save_zip(tmp_path / 'm.ckpt', checkpoint)
  with pytest.raises(ValueError, match=r'lacks \[.out\.2\.weight'):
    convert.load_pretrained(str(tmp_path / 'm.ckpt'))
  _, params = convert.load_pretrained(str(tmp_path / 'm.ckpt'), ema=False)
  jax.tree.map(np.testing.assert_array_equal, params,
               unet_oracle.from_state_dict(
                   config, checkpoints.state_of('ldm_beds')))


def test_what_is_no_checkpoint(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere'):
    convert.load_pretrained('nowhere')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match='no weights'):
    convert.load_pretrained(str(tmp_path / 'empty'))
  with pytest.raises(ValueError, match=r'no family.*such as'):
    convert.load_pretrained(checkpoints.write(tmp_path / 'a.safetensors',
                                  {'x.weight': np.zeros(3, np.float32)}))
  torch_writer.save_zip(tmp_path / 'a.pth', {'step': 3})
  with pytest.raises(ValueError, match='holds no tensors'):
    convert.load_pretrained(str(tmp_path / 'a.pth'))
  (tmp_path / 'a.txt').write_text('hello')
  with pytest.raises(ValueError, match='expected a .safetensors'):
    convert.load_pretrained(str(tmp_path / 'a.txt'))
  (tmp_path / 'b.safetensors').write_bytes(b'junk')
  with pytest.raises(ValueError, match='no safetensors file'):
    convert.load_pretrained(str(tmp_path / 'b.safetensors'))


def test_shards_that_are_absent_or_disagree(tmp_path):
  folder = tmp_path / 'f'
  checkpoints.save_diffusers_shards(
      folder, checkpoints.state_of('unet2d'), families.CONFIGS['unet2d'])
  index = folder / 'diffusion_pytorch_model.safetensors.index.json'
  content = json.loads(index.read_text())
  content['weight_map']['ghost.weight'] = next(
      iter(content['weight_map'].values()))
  index.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=r'disagree.*ghost'):
    convert.load_pretrained(str(folder))
  (folder / content['weight_map']['ghost.weight']).unlink()
  with pytest.raises(FileNotFoundError, match='absent'):
    convert.load_pretrained(str(folder))


@pytest.mark.parametrize('naming', ['compvis', 'inside', 'diffusers'])
@pytest.mark.parametrize('config', families.STAGES.values(),
                         ids=families.STAGES)
def test_first_stages_tensor_for_tensor(tmp_path, config, naming):
  abstract = load.abstract_autoencoder(Autoencoder(config))
  state = unet_oracle.random_state_dict(
      unet_oracle.shapes_of(abstract), seed=1)
  if naming == 'diffusers':
    folder = tmp_path / 'vae'
    folder.mkdir()
    checkpoints.write(folder / 'diffusion_pytorch_model.safetensors',
          foreign.diffusers_first_stage(state, config))
    (folder / 'config.json').write_text(json.dumps({
        'scaling_factor': config.scale, 'shift_factor': config.shift}))
    path = folder
  else:
    tensors = foreign.compvis_first_stage(state, config)
    extra = {'loss.logvar': np.zeros((), np.float32)}
    if naming == 'inside':
      tensors = {f'first_stage_model.{n}': v for n, v in tensors.items()}
      extra = {'scale_factor': np.array(config.scale, np.float32)}
    path = tmp_path / 'model.ckpt'
    torch_writer.save_zip(path, {'state_dict': tensors | extra})
  # Alone, in CompVis' names, nothing tells it.
  typed = {'scale': config.scale} if naming == 'compvis' else {}
  model, params = convert.load_first_stage(str(path), **typed)
  assert model.config.scale == pytest.approx(config.scale)
  expected = unet_oracle.restore(abstract, state)
  jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize('rename', [
    foreign.compvis_first_stage, foreign.diffusers_first_stage],
                         ids=['compvis', 'diffusers'])
@pytest.mark.parametrize('stage', ['vq', 'kl'])
def test_every_damage_of_a_first_stage_is_listed(tmp_path, stage, rename):
  config = families.STAGES[stage]
  tensors = rename(families.state_of(config), config)
  biases = sorted(n for n in tensors if 'up' in n and n.endswith('.bias'))
  turned = next(n for n, v in sorted(tensors.items())
                if 'up' in n and v.ndim == 4 and v.shape[0] != v.shape[1])
  del tensors[biases[0]]
  tensors['decoder.extra.weight'] = np.zeros(3, np.float32)
  tensors[biases[1]] = tensors[biases[1]][:-1]
  tensors[biases[2]] = tensors[biases[2]].astype(np.int32)
  tensors[turned] = tensors[turned].swapaxes(0, 1)
  with pytest.raises(ValueError) as error:
    convert.load_first_stage(
        checkpoints.write(tmp_path / 'a.safetensors', tensors), scale=1.0)
  message = str(error.value)
  for text, count in (('missing ', 1), ('unexpected ', 1),
                      ('the model wants', 2), ('holds no weights', 1)):
    assert message.count(text) == count


def test_a_unet_is_no_first_stage(tmp_path):
  path = checkpoints.write(
      tmp_path / 'a.safetensors', checkpoints.state_of('ddim'))
  with pytest.raises(ValueError, match='holds no autoencoder'):
    convert.load_first_stage(path)
