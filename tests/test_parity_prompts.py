"""From prompts to images: runs against diffusers' pipelines (`make parity`)."""

import importlib
import json

import jax
import numpy as np
import pytest
import test_parity_text
import unet_oracle

from msfp_jax.packed import model as packed_lib
from msfp_jax.run import draws
from msfp_jax.run import experiment as experiment_lib
from msfp_jax.run import prompts as prompts_lib

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings(
    'ignore::DeprecationWarning', 'ignore::FutureWarning',
    'ignore::UserWarning')]

# Seeds of their own, a negative prompt, and one that is longer than CLIP takes.
PROMPTS = [
    {'prompt': 'a cat sitting on a mat!', 'seed': 7,
     'negative_prompt': 'rain, blue'},
    {'prompt': 'a beautiful landscape with mountains and a river at sunset'},
    {'prompt': '', 'seed': 2**32 - 1}]


def vae_of(channels, **fields):
  import diffusers
  return test_parity_text.randomized(diffusers.AutoencoderKL(
      latent_channels=channels, block_out_channels=(8, 8), norm_num_groups=4,
      down_block_types=['DownEncoderBlock2D'] * 2,
      up_block_types=['UpDecoderBlock2D'] * 2, layers_per_block=1, **fields))


def drawn(config, folder, count):
  """What a run makes of full precision: noise, latents, images in [-1, 1]."""
  file = folder / 'prompts.jsonl'
  file.write_text('\n'.join(map(json.dumps, PROMPTS)))
  with config.unlocked():
    config.pretrained = config.first_stage = str(folder)
    config.text_encoder, config.prompts = str(folder), str(file)
  experiment_lib.check(config)
  experiment = experiment_lib.load(config, str(folder))
  model = packed_lib.full_precision(
      experiment.model, experiment.params, experiment.plan)
  draw = draws.drawer(experiment, count, model)
  with jax.default_matmul_precision('highest'):
    latents = draw(jax.random.key(0), 0)
    images = experiment.decode(latents)
  seeds, rounds, _ = experiment.prompts.batch(0, count)
  noise = prompts_lib.noise(seeds, rounds, experiment.sample_shape)
  return np.asarray(noise), np.asarray(latents), np.asarray(images)


def config_of(name, **changes):
  config = importlib.import_module(f'configs.{name}').get_config()
  config.update_from_flattened_dict(changes)
  return config


def channels_first(x):
  import torch
  return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


@pytest.mark.parametrize('predicts', ['epsilon', 'v_prediction'])
@pytest.mark.parametrize('scale', [7.5, 1.0])
def test_stable_diffusion_from_a_prompt(tmp_path, scale, predicts):
  """DDIM with guidance, against each prompt's negative one."""
  import diffusers
  import torch
  parts = test_parity_text.pipeline_parts(tmp_path, flux=False)
  unet = test_parity_text.randomized(diffusers.UNet2DConditionModel(
      sample_size=(8, 12), block_out_channels=(8, 16), layers_per_block=1,
      down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
      up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
      cross_attention_dim=24, attention_head_dim=2, norm_num_groups=4))
  pipeline = diffusers.StableDiffusionPipeline(
      **parts, vae=vae_of(4), unet=unet, scheduler=diffusers.DDIMScheduler(
          beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012,
          clip_sample=False, set_alpha_to_one=False, steps_offset=1,
          prediction_type=predicts),
      safety_checker=None, feature_extractor=None,
      requires_safety_checker=False)
  pipeline.save_pretrained(tmp_path)
  noise, latents, images = drawn(config_of(
      'stable_diffusion', **{'guidance.scale': scale,
                             'sampler.num_steps': 5}), tmp_path, 3)
  with torch.inference_mode():
    expected = pipeline(
        [one['prompt'] for one in PROMPTS], height=16, width=24,
        negative_prompt=[one.get('negative_prompt', '') for one in PROMPTS],
        num_inference_steps=5, guidance_scale=scale,
        latents=channels_first(noise), output_type='latent').images
    decoded = pipeline.vae.decode(
        expected / pipeline.vae.config.scaling_factor).sample
  assert unet_oracle.rel_l2(
      latents, expected.permute(0, 2, 3, 1).numpy()) < 1e-5
  assert unet_oracle.rel_l2(
      images, decoded.permute(0, 2, 3, 1).numpy()) < 1e-4


@pytest.mark.parametrize('guidance', [False, True], ids=['schnell', 'dev'])
def test_flux_from_a_prompt(tmp_path, guidance):
  """Four steps; dev with its strength of guidance and its dynamic shift."""
  import diffusers
  import torch
  parts = test_parity_text.pipeline_parts(tmp_path, flux=True)
  transformer = test_parity_text.randomized(
      diffusers.FluxTransformer2DModel(
          in_channels=16, num_layers=1, num_single_layers=2,
          attention_head_dim=12, num_attention_heads=2, joint_attention_dim=24,
          pooled_projection_dim=24, guidance_embeds=guidance,
          axes_dims_rope=(4, 4, 4)))
  pipeline = diffusers.FluxPipeline(
      **parts, transformer=transformer,
      vae=vae_of(4, scaling_factor=0.3611, shift_factor=0.1159,
                 use_quant_conv=False, use_post_quant_conv=False),
      scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
          use_dynamic_shifting=guidance, shift=3.0 if guidance else 1.0))
  pipeline.save_pretrained(tmp_path)
  # The shift depends on the size, which is not the transformer's own.
  changes = {'guidance.scale': 3.5, 'sampler.shift': 0.0} if guidance else {}
  noise, latents, images = drawn(config_of(
      'flux_schnell', image_size=(16, 32), text_length=16, first_stage_rows=0,
      **changes), tmp_path, 3)
  with torch.inference_mode():
    packed = pipeline._pack_latents(channels_first(noise), 3, 4, 8, 16)
    expected = pipeline(
        [one['prompt'] for one in PROMPTS], height=16, width=32,
        num_inference_steps=4, guidance_scale=3.5, latents=packed,
        max_sequence_length=16, output_type='latent').images
    expected = pipeline._unpack_latents(
        expected, 16, 32, pipeline.vae_scale_factor)
    vae = pipeline.vae
    decoded = vae.decode(expected / vae.config.scaling_factor
                         + vae.config.shift_factor).sample
  assert unet_oracle.rel_l2(
      latents, expected.permute(0, 2, 3, 1).numpy()) < 1e-5
  assert unet_oracle.rel_l2(
      images, decoded.permute(0, 2, 3, 1).numpy()) < 1e-4
