"""Writes tests/golden: what diffusers and torch-fidelity compute.

`make golden` runs it where PyTorch and both of them are installed. The weights
are renamed backwards, into the names of ermongroup/ddim, so that the files
stand in for an original checkpoint.
"""

import json
import re

import diffusers
import diffusers_oracle
import families
import flux_oracle
import inception_oracle
import lpips_oracle
import numpy as np
import torch
import unet_oracle

from msfp_jax.models.unet import UNetConfig

ATTENTION = {'group_norm': 'norm', 'to_q': 'q', 'to_k': 'k', 'to_v': 'v',
             'to_out.0': 'proj_out'}
RESNET = {'time_emb_proj': 'temb_proj', 'conv_shortcut': 'nin_shortcut'}
ROOT = {'time_embedding.linear_1': 'temb.dense.0',
        'time_embedding.linear_2': 'temb.dense.1',
        'class_embedding': 'label_emb',
        'conv_norm_out': 'norm_out'}


def diffusers_unet(config: UNetConfig) -> diffusers.UNet2DModel:
  """Builds the UNet2DModel that computes what `config` describes."""
  attn = [config.image_size // 2 ** i in config.attn_resolutions
          for i in range(len(config.ch_mult))]
  resblock = config.resample == 'resblock'
  plain = 'Resnet{}sampleBlock2D' if resblock else '{}Block2D'
  model = diffusers.UNet2DModel(
      sample_size=config.image_size,
      in_channels=config.in_channels,
      out_channels=config.out_channels,
      layers_per_block=config.num_res_blocks,
      block_out_channels=[config.ch * mult for mult in config.ch_mult],
      down_block_types=[
          'AttnDownBlock2D' if a else plain.format('Down') for a in attn],
      up_block_types=[
          'AttnUpBlock2D' if a else plain.format('Up') for a in attn[::-1]],
      norm_num_groups=config.norm_groups,
      norm_eps=config.norm_eps,
      attn_norm_num_groups=config.norm_groups,
      attention_head_dim=config.head_channels,
      downsample_padding=config.downsample_padding[0],
      downsample_type='resnet' if resblock else 'conv',
      upsample_type='resnet' if resblock else 'conv',
      resnet_time_scale_shift=(
          'scale_shift' if config.time_injection == 'scale_shift'
          else 'default'),
      flip_sin_to_cos=config.time_order == 'cos_sin',
      freq_shift=config.time_freq_shift,
      num_class_embeds=config.num_classes,
  )
  return model.eval()


def original_name(name: str, levels: int) -> str:
  """Renames a parameter of diffusers as ermongroup/ddim does."""
  module, leaf = name.rsplit('.', 1)

  def rest(part: str) -> str:
    return (ATTENTION | RESNET).get(part, part)

  if m := re.fullmatch(r'(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)', module):
    side, level, kind, j, part = m.groups()
    level = int(level) if side == 'down' else levels - 1 - int(level)
    kind = {'resnets': f'block.{j}', 'attentions': f'attn.{j}',
            'downsamplers': 'downsample', 'upsamplers': 'upsample'}[kind]
    module = f'{side}.{level}.{kind}.{rest(part)}'
  elif m := re.fullmatch(r'mid_block\.(resnets|attentions)\.(\d)\.(.+)',
                         module):
    kind, j, part = m.groups()
    kind = 'block' if kind == 'resnets' else 'attn'
    module = f'mid.{kind}_{int(j) + 1}.{rest(part)}'
  else:
    module = ROOT.get(module, module)
  return f'{module}.{leaf}'


def diffusers_output(config: UNetConfig, state: dict[str, np.ndarray],
                     x: np.ndarray, t: np.ndarray,
                     labels: np.ndarray | None) -> np.ndarray:
  """Loads `state` (ermongroup names) and runs; `x` and the result NHWC."""
  model = diffusers_unet(config)
  levels = len(config.ch_mult)
  wanted = {original_name(name, levels): (name, value.shape)
            for name, value in model.state_dict().items()}
  assert wanted.keys() == state.keys(), sorted(wanted.keys() ^ state.keys())
  model.load_state_dict({
      name: torch.from_numpy(state[original].astype(np.float32)).reshape(shape)
      for original, (name, shape) in wanted.items()})
  with torch.no_grad():
    out = model(
        torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2),
        torch.from_numpy(t),
        None if labels is None else torch.from_numpy(labels)).sample
  return out.permute(0, 2, 3, 1).contiguous().numpy()


def golden(config: UNetConfig, seed: int) -> dict[str, np.ndarray]:
  """The contents of a golden file with its weights; half precision is exact."""
  shapes = unet_oracle.state_dict_shapes(config)
  state = {name: value.astype(np.float16) for name, value in
           unet_oracle.random_state_dict(shapes, seed).items()}
  x, t, labels = unet_oracle.random_inputs(config, 16, 24, seed)
  x = x.astype(np.float16)
  out = diffusers_output(config, state, x, t, labels)
  arrays = {'x': x, 't': t, 'out': out,
            'config': np.array(json.dumps(config.to_dict()))}
  if labels is not None:
    arrays['labels'] = labels
  return state | arrays


def golden_cifar10(seed: int) -> dict[str, np.ndarray]:
  """Makes the full-size case; the test draws its weights again."""
  config = UNetConfig()
  state = unet_oracle.random_state_dict(
      unet_oracle.state_dict_shapes(config), seed)
  inputs = unet_oracle.random_inputs(config, 16, 24, seed)
  return {'out': diffusers_output(config, state, *inputs),
          'config': np.array(json.dumps(config.to_dict()))}


def golden_families() -> dict[str, np.ndarray]:
  """Makes outputs of every family; the test draws weights and inputs again."""
  found = {}
  for name, config in families.CONFIGS.items():
    state = families.state_of(config)
    found[name] = diffusers_oracle.unet_output(
        config, state, *families.inputs_of(config))
  for name, config in families.STAGES.items():
    outputs = diffusers_oracle.first_stage_outputs(
        config, families.state_of(config), families.images_of(config),
        families.latents_of(config))
    found[f'{name} encoded'], found[f'{name} decoded'] = outputs
  return found


def golden_flux() -> dict[str, np.ndarray]:
  """Makes FLUX's outputs; the test draws weights and inputs again."""
  return {name: diffusers_oracle.flux_output(
      config, flux_oracle.state_of(config), *flux_oracle.inputs_of(config))
          for name, config in flux_oracle.CONFIGS.items()}


def golden_inception() -> dict[str, np.ndarray]:
  """Makes Inception's outputs; the test draws weights and images again."""
  images = inception_oracle.random_images(inception_oracle.GOLDEN_SHAPE)
  return inception_oracle.outputs(
      inception_oracle.random_state(), images)._asdict()


def golden_lpips() -> dict[str, np.ndarray]:
  """Makes LPIPS's distances; the test draws weights and images again."""
  return {name: lpips_oracle.distances(
      name, lpips_oracle.random_state(name), *lpips_oracle.random_pairs())
          for name in lpips_oracle.FEATURES}


def all_golden() -> dict[str, dict[str, np.ndarray]]:
  return {
      'families': golden_families(),
      'flux': golden_flux(),
      'inception': golden_inception(),
      'lpips': golden_lpips(),
      'unet_tiny': golden(unet_oracle.TINY, seed=0),
      'unet_tiny_relative': golden(unet_oracle.TINY_RELATIVE, seed=1),
      'unet_cifar10': golden_cifar10(seed=2),
  }


if __name__ == '__main__':
  for filename, contents in all_golden().items():
    path = unet_oracle.GOLDEN / f'{filename}.npz'
    np.savez_compressed(path, **contents)
    print(f'{path}: {path.stat().st_size / 1000:.0f} kB')
