"""Checkpoints of every family load, tensor for tensor, or say why not."""

import copy
import json

import families
import foreign
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch_writer
import unet_oracle
import yaml

from msfp_jax import convert
from msfp_jax.convert import ddim
from msfp_jax.convert import diffusers_unet
from msfp_jax.convert import first_stage
from msfp_jax.convert import ldm
from msfp_jax.convert import load
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.models.autoencoder import Autoencoder
from msfp_jax.models.autoencoder import AutoencoderConfig
from msfp_jax.models.unet import UNetConfig


def state_of(name, seed=0):
  return families.state_of(families.CONFIGS[name], seed)


def save_list(path, state, config):
  """As ermongroup/ddim's training: model, optimizer, epoch, step, EMA."""
  trained = {f'module.{n}': v + 1 for n, v in state.items()}
  torch_writer.save_zip(path, [trained, {'lr': 1e-4}, 3, 4, dict(state)])


def save_state(path, state, config):
  torch_writer.save_legacy(path, dict(state))


def write_yaml(path, config):
  path.with_name('config.yaml').write_text(
      yaml.safe_dump(foreign.compvis_yaml(config)))


def save_ldm(path, state, config):
  write_yaml(path, config)
  raw = {n: v + 1 for n, v in state.items()}
  torch_writer.save_zip(
      path, foreign.ldm_checkpoint(raw, config, averaged=state))


def save_ldm_plain(path, state, config):
  write_yaml(path, config)
  safetensors.numpy.save_file(
      foreign.ldm_checkpoint(state, config)['state_dict'], path)


def save_diffusers(path, state, config, attention=None):
  path.mkdir()
  safetensors.numpy.save_file(
      foreign.diffusers(state, config, attention),
      path / 'diffusion_pytorch_model.safetensors')
  (path / 'config.json').write_text(
      json.dumps(foreign.diffusers_config(config)))


def save_diffusers_old(path, state, config):
  save_diffusers(path, state, config, foreign.OLD_ATTENTION)


def save_diffusers_shards(path, state, config):
  path.mkdir()
  tensors = foreign.diffusers(state, config)
  names, places = sorted(tensors), {}
  for i in range(2):
    file = f'diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors'
    part = {n: tensors[n] for n in names[i::2]}
    safetensors.numpy.save_file(part, path / file)
    places |= dict.fromkeys(part, file)
  (path / 'diffusion_pytorch_model.safetensors.index.json').write_text(
      json.dumps({'metadata': {}, 'weight_map': places}))
  (path / 'config.json').write_text(
      json.dumps(foreign.diffusers_config(config)))


def save_pipeline(path, state, config):
  path.mkdir()
  (path / 'model_index.json').write_text('{}')
  save_diffusers(path / 'unet', state, config)


CASES = {
    'ddim, ckpt.pth': ('ddim', save_list, 'ckpt.pth'),
    'ddim, EMA alone': ('ddim', save_state, 'ema_cifar10'),
    'ddim, three levels': ('ddim_three_levels', save_state, 'ema_x'),
    'ldm, beds': ('ldm_beds', save_ldm, 'model.ckpt'),
    'ldm, churches': ('ldm_churches', save_ldm, 'model.ckpt'),
    'ldm, class-conditional': ('ldm_class', save_ldm_plain, 'm.safetensors'),
    'ldm, Stable Diffusion 1': ('sd1', save_ldm_plain, 'm.safetensors'),
    'ldm, Stable Diffusion 2': ('sd2', save_ldm_plain, 'm.safetensors'),
    'diffusers, UNet2DModel': ('unet2d', save_diffusers, 'folder'),
    'diffusers, old attention': ('unet2d', save_diffusers_old, 'folder'),
    'diffusers, switches': ('unet2d_relative', save_diffusers, 'folder'),
    'diffusers, shards': ('unet2d', save_diffusers_shards, 'folder'),
    'diffusers, pipeline': ('unet2d', save_pipeline, 'folder'),
    'diffusers, Stable Diffusion 1': ('sd1', save_diffusers, 'folder'),
    'diffusers, Stable Diffusion 2': ('sd2', save_diffusers, 'folder'),
}


@pytest.mark.parametrize('name, save, file', CASES.values(), ids=CASES)
def test_every_family_tensor_for_tensor(tmp_path, name, save, file):
  state, config = state_of(name), families.CONFIGS[name]
  save(tmp_path / file, state, config)
  model, params = convert.load_pretrained(str(tmp_path / file))
  assert model.config == config
  expected = unet_oracle.from_state_dict(config, state)
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  assert jax.tree.structure(params) == jax.tree.structure(expected)


def test_ema_false_takes_the_trained_weights(tmp_path):
  for name, save in (('ddim', save_list), ('ldm_beds', save_ldm)):
    state, config = state_of(name), families.CONFIGS[name]
    save(tmp_path / f'{name}.ckpt', state, config)
    _, params = convert.load_pretrained(
        str(tmp_path / f'{name}.ckpt'), ema=False)
    expected = unet_oracle.from_state_dict(
        config, {n: v + 1 for n, v in state.items()})
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions(tmp_path, dtype):
  config = families.CONFIGS['ddim']
  state = {n: v.astype(dtype) for n, v in state_of('ddim').items()}
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


def test_a_yaml_tells_what_shapes_do_not(tmp_path):
  config = families.CONFIGS['ldm_beds']
  save_ldm(tmp_path / 'model.ckpt', state_of('ldm_beds'), config)
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


def write(path, tensors):
  safetensors.numpy.save_file(
      {n: np.ascontiguousarray(v) for n, v in tensors.items()}, path)
  return str(path)


@bare
def test_every_damage_is_listed(tmp_path, name, rename):
  state, config = state_of(name), families.CONFIGS[name]
  if name.startswith('ldm'):
    write_yaml(tmp_path / 'a', config)
  tensors = rename(state, config)
  assert convert.load_pretrained(write(tmp_path / 'a.safetensors', tensors))
  norms = [n for n in tensors if 'up' in n or 'output' in n]
  biases = sorted(n for n in norms if n.endswith('.bias'))
  weights = sorted(n for n in norms if tensors[n].ndim == 4
                   and tensors[n].shape[0] != tensors[n].shape[1])
  changed = dict(tensors)
  del changed[biases[0]]
  changed['extra.weight'] = np.zeros(3, np.float32)
  changed[biases[1]] = tensors[biases[1]][:-1]
  changed[biases[2]] = tensors[biases[2]].astype(np.int32)
  changed[weights[0]] = tensors[weights[0]].swapaxes(0, 1)
  with pytest.raises(ValueError) as error:
    convert.load_pretrained(write(tmp_path / 'b.safetensors', changed))
  message = str(error.value)
  assert 'b.safetensors' in message
  lines = message.splitlines()[1:]
  kinds = [line.strip().split()[0] for line in lines]
  assert kinds.count('missing') == 1
  assert kinds.count('unexpected') == (0 if name.startswith('ldm') else 1)
  assert sum('the model wants' in line for line in lines) == 2
  assert sum('int32, which holds no weights' in line for line in lines) == 1


@bare
def test_values_that_are_not_finite(tmp_path, name, rename):
  state, config = state_of(name), families.CONFIGS[name]
  if name.startswith('ldm'):
    write_yaml(tmp_path / 'a', config)
  tensors = rename(state, config)
  first = sorted(n for n in tensors if n.endswith('.bias'))[0]
  tensors[first] = np.full_like(tensors[first], np.nan)
  with pytest.raises(ValueError, match='not finite'):
    convert.load_pretrained(write(tmp_path / 'a.safetensors', tensors))


def test_pruned_files_keep_the_counters_of_the_average_only(tmp_path):
  config = families.CONFIGS['sd1']
  checkpoint = foreign.ldm_checkpoint(state_of('sd1'), config)
  checkpoint['state_dict'] |= {
      'model_ema.decay': np.array(0.9999, np.float32),
      'model_ema.num_updates': np.array(7, np.int32)}
  write_yaml(tmp_path / 'a', config)
  torch_writer.save_zip(tmp_path / 'sd.ckpt', checkpoint)
  _, params = convert.load_pretrained(str(tmp_path / 'sd.ckpt'))
  expected = unet_oracle.from_state_dict(config, state_of('sd1'))
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_an_average_that_does_not_fit(tmp_path):
  config = families.CONFIGS['ldm_beds']
  write_yaml(tmp_path / 'a', config)
  checkpoint = foreign.ldm_checkpoint(
      state_of('ldm_beds'), config, averaged=state_of('ldm_beds'))
  del checkpoint['state_dict']['model_ema.diffusion_modelout2weight']
  torch_writer.save_zip(tmp_path / 'm.ckpt', checkpoint)
  with pytest.raises(ValueError, match=r'lacks \[.out\.2\.weight'):
    convert.load_pretrained(str(tmp_path / 'm.ckpt'))
  assert convert.load_pretrained(str(tmp_path / 'm.ckpt'), ema=False)


@pytest.mark.parametrize('field, value', [
    ('act_fn', 'mish'), ('addition_embed_type', 'text_time'),
    ('down_block_types', ['KDownBlock2D', 'AttnDownBlock2D']),
    ('attn_norm_num_groups', 4)])
def test_an_architecture_that_is_not_ours(tmp_path, field, value):
  save_diffusers(tmp_path / 'f', state_of('unet2d'), families.CONFIGS['unet2d'])
  path = tmp_path / 'f' / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
  with pytest.raises(ValueError, match=rf'(?s)f/diffusion.*{value}'
                     if isinstance(value, str) else 'this UNet has no'):
    convert.load_pretrained(str(tmp_path / 'f'))


def test_what_is_no_checkpoint(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere'):
    convert.load_pretrained('nowhere')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match='no weights'):
    convert.load_pretrained(str(tmp_path / 'empty'))
  with pytest.raises(ValueError, match=r'no family.*such as'):
    convert.load_pretrained(write(tmp_path / 'a.safetensors',
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
  save_diffusers_shards(folder, state_of('unet2d'), families.CONFIGS['unet2d'])
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
    write(folder / 'diffusion_pytorch_model.safetensors',
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
  model, params = convert.load_first_stage(str(path))
  assert model.config.scale == pytest.approx(config.scale)
  expected = unet_oracle.restore(abstract, state)
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_unet_is_no_first_stage(tmp_path):
  path = write(tmp_path / 'a.safetensors', state_of('ddim'))
  with pytest.raises(ValueError, match='holds no autoencoder'):
    convert.load_first_stage(path)


@pytest.mark.parametrize('naming', ['compvis', 'diffusers'])
def test_the_scale_of_kl_latents_where_nothing_tells_it(tmp_path, naming):
  """Old config.json of Stable Diffusion's lack it; it is never 1."""
  for name, scale, shift in (('kl', 0.18215, 0.0),
                             ('kl, shift', 0.3611, 0.1159)):
    config = families.STAGES[name]
    rename = {'compvis': foreign.compvis_first_stage,
              'diffusers': foreign.diffusers_first_stage}[naming]
    path = write(tmp_path / 'vae.safetensors',
                 rename(families.state_of(config), config))
    (tmp_path / 'config.json').write_text('{"_class_name": "AutoencoderKL"}')
    model, _ = convert.load_first_stage(path)
    assert (model.config.scale, model.config.shift) == (scale, shift)


def lazy(state):
  return {n: LazyTensor.of(v) for n, v in state.items()}


def zeros(config):
  """A state dict of full size that takes no memory."""
  return {name: np.broadcast_to(np.float32(0), shape) for name, shape
          in unet_oracle.state_dict_shapes(config).items()}


def prefixed(state):
  return {f'model.diffusion_model.{n}': v for n, v in state.items()}


# Name: config, family, tensors and parameters of the published models.
REAL = {
    'cifar10': (UNetConfig(), ddim, lambda s, c: s, 328, 35_746_307),
    'celeba64': (UNetConfig(image_size=64, ch_mult=(1, 2, 2, 2, 4)), ddim,
                 lambda s, c: s, 390, 78_700_803),
    'bedrooms': (UNetConfig(
        image_size=64, ch=224, ch_mult=(1, 2, 3, 4),
        attn_resolutions=(64 // 2, 64 // 4, 64 // 8), head_channels=32,
        **families.LDM), ldm, lambda s, c: prefixed(foreign.ldm(s, c)),
                 368, 274_056_163),
    'churches': (UNetConfig(
        image_size=32, in_channels=4, out_channels=4, ch=192,
        ch_mult=(1, 2, 2, 4, 4), attn_resolutions=(32, 16, 8, 4), num_heads=8,
        resample='resblock', time_injection='scale_shift', **families.LDM),
                 ldm, lambda s, c: prefixed(foreign.ldm(s, c)),
                 520, 294_966_916),
    'cin256-v2': (UNetConfig(
        image_size=64, ch=192, ch_mult=(1, 2, 3, 5),
        attn_resolutions=(32, 16, 8), num_heads=1, context_dim=512,
        context_classes=1001, **families.LDM), ldm,
                  lambda s, c: foreign.ldm_checkpoint(s, c)['state_dict'],
                  689, 400_920_579 + 1001 * 512),
    'sd1': (UNetConfig(
        image_size=64, in_channels=4, out_channels=4, ch=320,
        ch_mult=(1, 2, 4, 4), attn_resolutions=(64, 32, 16), num_heads=8,
        context_dim=768, **families.LDM), ldm,
            lambda s, c: prefixed(foreign.ldm(s, c)), 686, 859_520_964),
    'sd1, diffusers': (UNetConfig(
        image_size=64, in_channels=4, out_channels=4, ch=320,
        ch_mult=(1, 2, 4, 4), attn_resolutions=(64, 32, 16), num_heads=8,
        context_dim=768, **families.LDM), diffusers_unet, foreign.diffusers,
                       686, 859_520_964),
    'ddpm-cifar10-32': (UNetConfig(dropout=0.0), diffusers_unet,
                        foreign.diffusers, 328, 35_746_307),
}


@pytest.mark.parametrize('config, family, rename, tensors, parameters',
                         REAL.values(), ids=REAL)
def test_the_real_models_are_told_by_their_shapes(
    config, family, rename, tensors, parameters):
  found = rename(zeros(config), config)
  weights = {n: v for n, v in found.items() if n != 'betas'}
  assert len(weights) == tensors
  assert sum(v.size for v in weights.values()) == parameters
  selected = family.select(lazy(found), True)
  assert family.config(selected, None) == config
  named, leftover = family.rename(selected, config)
  assert not leftover
  assert {n: t.shape for n, t in named.items()}.keys() == (
      unet_oracle.state_dict_shapes(config).keys())


# As published: tensors and parameters of first stages.
REAL_STAGES = {
    'vq-f4': (AutoencoderConfig('vq', ch_mult=(1, 2, 4), z_channels=3,
                                embed_dim=3, codebook_size=8192),
              205, 55_322_782),
    'vq-f8': (AutoencoderConfig('vq', ch_mult=(1, 2, 2, 4), attn_levels=(3,),
                                codebook_size=16384), 299, 67_717_295),
    'kl-f8': (AutoencoderConfig(scale=0.18215), 248, 83_653_863),
    'flux': (AutoencoderConfig(z_channels=16, embed_dim=16, quant_conv=False,
                               scale=0.3611, shift=0.1159), 244, 83_819_683),
}


@pytest.mark.parametrize('config, tensors, parameters', REAL_STAGES.values(),
                         ids=REAL_STAGES)
def test_the_real_first_stages_are_told_by_their_shapes(
    config, tensors, parameters):
  abstract = load.abstract_autoencoder(Autoencoder(config))
  shapes = unet_oracle.shapes_of(abstract)
  assert len(shapes) == tensors
  assert sum(np.prod(s, dtype=int) for s in shapes.values()) == parameters
  state = {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()}
  for rename in (foreign.compvis_first_stage, foreign.diffusers_first_stage):
    found = lazy(rename(state, config))
    assert first_stage.config(first_stage.select(found)) == config
    assert first_stage.rename(found, config)[0].keys() == shapes.keys()
