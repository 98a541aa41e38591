"""Checkpoint files of every family, written as their authors do."""

import json

import families
import foreign
import numpy as np
import safetensors.numpy
import torch_writer
import yaml


def state_of(name, seed=0):
  return families.state_of(families.CONFIGS[name], seed)


def save_list(path, state, config):
  """Saves as ermongroup/ddim's training: model, optimizer, steps, EMA."""
  trained = {f'module.{n}': v + 1 for n, v in state.items()}
  torch_writer.save_zip(path, [trained, {'lr': 1e-4}, 3, 4, dict(state)])


def save_state(path, state, config):
  torch_writer.save_legacy(path, dict(state))


def save_bayesian(path, state, config):
  save_state(path, state | {'logvar': np.zeros(1000, np.float32)}, config)


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


def save_diffusers_linear(path, state, config):
  """Saves as Stable Diffusion 2, whose projections are matrices."""
  state = {n: v[:, :, 0, 0] if '.proj_' in n and v.ndim == 4 else v
           for n, v in state.items()}
  save_diffusers(path, state, config)


def save_sharded(path, tensors, config, suffix, save):
  """Saves two files and their index, as diffusers writes large models."""
  path.mkdir()
  names, places = sorted(tensors), {}
  for i in range(2):
    file = f'diffusion_pytorch_model-0000{i + 1}-of-00002.{suffix}'
    save({n: tensors[n] for n in names[i::2]}, path / file)
    places |= dict.fromkeys(names[i::2], file)
  (path / f'diffusion_pytorch_model.{suffix}.index.json').write_text(
      json.dumps({'metadata': {}, 'weight_map': places}))
  (path / 'config.json').write_text(
      json.dumps(foreign.diffusers_config(config)))


def save_diffusers_half(path, state, config):
  """Saves shards by torch.save in half precision."""
  tensors = {n: v.astype(np.float16)
             for n, v in foreign.diffusers(state, config).items()}
  save_sharded(path, tensors, config, 'bin',
               lambda part, file: torch_writer.save_zip(file, part))


def save_diffusers_shards(path, state, config):
  save_sharded(path, foreign.diffusers(state, config), config, 'safetensors',
               safetensors.numpy.save_file)


def save_pipeline(path, state, config):
  path.mkdir()
  (path / 'model_index.json').write_text('{}')
  save_diffusers(path / 'unet', state, config)


def write(path, tensors):
  safetensors.numpy.save_file(
      {n: np.ascontiguousarray(v) for n, v in tensors.items()}, path)
  return str(path)


def describe(folder, name, config):
  """Writes the configuration that a bare file of a family needs beside it."""
  if name.startswith(('ldm', 'cin')):
    write_yaml(folder / 'a', config)
  elif not name.startswith('ddim'):
    (folder / 'config.json').write_text(
        json.dumps(foreign.diffusers_config(config)))


SAVE = {
    'list': save_list, 'state': save_state, 'bayesian': save_bayesian,
    'ldm': save_ldm, 'ldm_plain': save_ldm_plain, 'diffusers': save_diffusers,
    'diffusers_old': save_diffusers_old,
    'diffusers_linear': save_diffusers_linear,
    'diffusers_half': save_diffusers_half,
    'diffusers_shards': save_diffusers_shards, 'pipeline': save_pipeline,
}
