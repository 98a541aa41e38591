"""Small checkpoints of other code bases, LoRAs and encoders, and readers."""

import functools
import json
import pathlib

import checkpoints
from damage import build_of
from damage import Kind
import families
import flux_oracle
import foreign
import lora_cases
import lora_files
import numpy as np
import schedulers
import text_oracle
import torch_writer

from msfp_jax import convert
from msfp_jax.convert import lora_config
from msfp_jax.convert import scheduler
from msfp_jax.convert import source
from msfp_jax.convert import text_encoder
from msfp_jax.models.unet import UNetConfig

SMALL = dict(ch=32, ch_mult=(1,), num_res_blocks=1)
CONFIGS = {
    'ddim': UNetConfig(image_size=32, attn_resolutions=(16,), **SMALL),
    'ldm': UNetConfig(image_size=64, attn_resolutions=(), head_channels=32,
                      **SMALL, **families.LDM),
    'diffusers': UNetConfig(image_size=32, attn_resolutions=(), dropout=0.0,
                            **SMALL)}


@functools.cache
def state(name):
  return families.state_of(CONFIGS[name])


def params_of(found):
  """What of a model's file is the same whatever its values are."""
  return build_of(found['params'])


# Checkpoints. Each is damaged where it lies, and read whole.


def pretrained(path, **options):
  model, params = convert.load_pretrained(str(path), **options)
  return {'model': str(getattr(model, 'config', model)), 'params': params}


def first_stage(path):
  model, params = convert.load_first_stage(str(path), scale=1.0)
  return {'model': str(model.config), 'params': params}


def checkpoint(save, name, whole, file=''):
  """A model's checkpoint.

  Args:
    save: of `checkpoints`.
    name: of CONFIGS.
    whole: what is given to a reader: a file or a folder.
    file: that is damaged, if it is another one: beside it, or in it.
  """
  def write(folder):
    save(folder / whole, state(name), CONFIGS[name])
    inside = (folder / whole).is_dir()
    return (folder / whole if inside else folder) / (file or whole)

  def read(path):
    return pretrained(path.parent if path.parent.name == whole
                      else path.with_name(whole))

  return Kind(write, read, build=params_of)


def write_flux(folder):
  config = flux_oracle.TINY
  return flux_oracle.save_folder(
      folder / 'f', flux_oracle.state_of(config), config
  ) / 'diffusion_pytorch_model.safetensors'


def write_flux_config(folder):
  return write_flux(folder).parent / 'config.json'


def write_bfl(folder):
  config = flux_oracle.TINY
  return flux_oracle.save_bfl(
      folder / 'flux.safetensors', flux_oracle.state_of(config), config)[0]


def write_stage(folder):
  config = families.STAGES['vq']
  return pathlib.Path(checkpoints.write(
      folder / 'stage.safetensors', foreign.compvis_first_stage(
          families.state_of(config), config)))


def write_script(folder):
  """As torch.jit.save: modules are dicts of their attributes."""
  name = '__torch__.Net'
  torch_writer.save_zip(folder / 'n.pt', lambda made: [
      made[name], {'w': np.ones((3, 2), np.float32)}], extra=[name])
  return folder / 'n.pt'


def tensors_of(path):
  return {name: tensor.read() for name, tensor
          in source.open_source(path).tensors.items()}


def sharded(suffix, file):
  save = {'bin': checkpoints.save_diffusers_half,
          'safetensors': checkpoints.save_diffusers_shards}[suffix]
  return checkpoint(
      save, 'diffusers', 'm', f'diffusion_pytorch_model{file}')


# LoRAs.


def write_lora(naming, **metadata):
  def write(folder):
    _, theirs, _ = lora_cases.flux()
    lora = lora_cases.lora_of(theirs, only=r'^transformer_blocks.0.attn')
    return lora_files.write(folder / 'adapter_model.safetensors',
                            naming(lora), **metadata)

  return write


def write_peft(folder):
  write_lora(lambda lora: lora_files.peft(lora, 'base_model.model.'))(folder)
  (folder / lora_config.BESIDE).write_text(json.dumps({
      'peft_type': 'LORA', 'r': 2, 'lora_alpha': 4, 'bias': 'none',
      'use_rslora': False, 'alpha_pattern': {}, 'target_modules': ['to_q']}))
  return folder / lora_config.BESIDE


def lora(path):
  model, _, _ = lora_cases.flux()
  return convert.load_lora(path.parent, model).layers


def write_encoder(config, shapes, file):
  def write(folder):
    text_oracle.write(folder, config, text_oracle.state_of(shapes(config)))
    return folder / file

  return write


def encoder(path):
  model, params = text_encoder.load_text_encoder(path.parent)
  return {'model': str(model.config), 'params': params}


def write_scheduler(name):
  def write(folder):
    (folder / scheduler.FILE).write_text(json.dumps(
        schedulers.PUBLISHED.get(name) or {
            '_class_name': 'FlowMatchEulerDiscreteScheduler', 'shift': 3.0,
            'base_shift': 0.5, 'max_shift': 1.15, 'base_image_seq_len': 256,
            'max_image_seq_len': 4096, 'use_dynamic_shifting': True,
            'num_train_timesteps': 1000}))
    return folder / scheduler.FILE

  return write


def described(path):
  found = scheduler.read(path)
  return found.to_json()


CHECKPOINTS = {
    'ddim, zip': checkpoint(checkpoints.save_list, 'ddim', 'm.ckpt'),
    'ddim, stream': checkpoint(checkpoints.save_state, 'ddim', 'm.ckpt'),
    'TorchScript': Kind(write_script, tensors_of, build=lambda found: None),
    'ldm, zip': checkpoint(checkpoints.save_ldm, 'ldm', 'm.ckpt'),
    'ldm, safetensors': checkpoint(
        checkpoints.save_ldm_plain, 'ldm', 'm.safetensors'),
    'CompVis yaml': checkpoint(
        checkpoints.save_ldm, 'ldm', 'm.ckpt', 'config.yaml'),
    'diffusers': checkpoint(
        checkpoints.save_diffusers, 'diffusers', 'm',
        'diffusion_pytorch_model.safetensors'),
    'diffusers, config.json': checkpoint(
        checkpoints.save_diffusers, 'diffusers', 'm', 'config.json'),
    'shard': sharded('safetensors', '-00001-of-00002.safetensors'),
    'shard, zip': sharded('bin', '-00001-of-00002.bin'),
    'index of shards': sharded('safetensors', '.safetensors.index.json'),
    'FLUX': Kind(write_flux, lambda path: pretrained(path.parent),
                 build=params_of),
    'FLUX, config.json': Kind(
        write_flux_config, lambda path: pretrained(path.parent),
        build=params_of),
    "FLUX, BFL's": Kind(write_bfl, lambda path: pretrained(
        path, config=str(path.with_name('transformer.json'))),
                        build=params_of),
    'first stage': Kind(write_stage, first_stage, build=params_of),
    'scheduler': Kind(write_scheduler('stable-diffusion-2-1'), described),
    'scheduler of a flow': Kind(write_scheduler(''), described),
    'LoRA': Kind(write_lora(
        lora_files.peft, lora_adapter_metadata={'transformer.lora_alpha': 4,
                                                'transformer.r': 2}), lora),
    "LoRA, kohya's": Kind(write_lora(functools.partial(
        lora_files.kohya, alpha=1.0)), lora),
    'adapter_config.json': Kind(write_peft, lora),
    **{f'{name}, {file}': Kind(
        write_encoder(config, shapes, file), encoder, build=params_of)
       for name, config, shapes in (
           ('CLIP', text_oracle.CLIP, text_oracle.clip_shapes),
           ('T5', text_oracle.T5, text_oracle.t5_shapes))
       for file in ('model.safetensors', 'config.json')},
}
