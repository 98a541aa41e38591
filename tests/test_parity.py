"""Live comparison with diffusers on random weights (`make parity`).

The imports of PyTorch stand inside the tests: without it these tests are
collected, and fail when they are asked for.
"""

import families
import numpy as np
import pytest
import unet_oracle

from msfp_jax import diffusion
from msfp_jax.models.unet import UNetConfig

pytestmark = pytest.mark.parity


@pytest.mark.parametrize('config, height, width', [
    (unet_oracle.TINY, 16, 24),
    (unet_oracle.TINY_RELATIVE, 24, 16),
    (UNetConfig(image_size=16, ch=32, ch_mult=(1, 2, 2), norm_groups=8,
                num_res_blocks=1, attn_resolutions=(16, 4)), 8, 32),
    (UNetConfig(), 32, 32),
    (UNetConfig(image_size=64, ch_mult=(1, 2, 2, 2, 4)), 32, 48),
], ids=['tiny', 'relative', 'attention_at_two_levels', 'cifar10', 'celeba64'])
def test_unet_equals_diffusers(config, height, width):
  import make_golden
  state = unet_oracle.random_state_dict(
      unet_oracle.state_dict_shapes(config), seed=11)
  inputs = unet_oracle.random_inputs(config, height, width, seed=12)
  expected = make_golden.diffusers_output(config, state, *inputs)
  actual = unet_oracle.apply(config, state, *inputs)
  assert unet_oracle.rel_l2(actual, expected) < 5e-6


def test_golden_files_are_what_the_oracles_compute():
  import make_golden
  for name, contents in make_golden.all_golden().items():
    with np.load(unet_oracle.GOLDEN / f'{name}.npz') as file:
      assert file.keys() == contents.keys()
      outputs = {'out'} if 'out' in contents else contents.keys()
      for key in contents.keys() - outputs:
        np.testing.assert_array_equal(file[key], contents[key])
      for key in outputs:
        assert unet_oracle.rel_l2(contents[key], file[key]) < 3e-6


@pytest.mark.parametrize('config', families.CONFIGS.values(),
                         ids=families.CONFIGS)
def test_every_family_equals_diffusers(config):
  import diffusers_oracle
  state = families.state_of(config, seed=21)
  inputs = families.inputs_of(config, seed=22)
  expected = diffusers_oracle.unet_output(config, state, *inputs)
  actual = families.output_of(config, state, inputs)
  assert unet_oracle.rel_l2(actual, expected) < 5e-6


@pytest.mark.parametrize('config', families.STAGES.values(),
                         ids=families.STAGES)
def test_first_stages_equal_diffusers(config):
  import diffusers_oracle
  state = families.state_of(config, seed=23)
  expected = diffusers_oracle.first_stage_outputs(
      config, state, families.images_of(config), families.latents_of(config))
  for ours, theirs in zip(
      families.first_stage_outputs(config, state), expected, strict=True):
    assert unet_oracle.rel_l2(ours, theirs) < 5e-6


SCHEDULERS = {
    'ddim': ('DDIMScheduler', dict(clip_sample=False), {}),
    'ddim, compvis': (
        'DDIMScheduler',
        dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        dict(name='ddim', convention='compvis')),
    'plms': (
        'PNDMScheduler',
        dict(skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1), {}),
    'dpm_solver': (
        'DPMSolverMultistepScheduler', dict(final_sigmas_type='zero'), {}),
}


@pytest.mark.filterwarnings('ignore:__array__ impl:DeprecationWarning')
@pytest.mark.parametrize('name', SCHEDULERS)
def test_samplers_equal_diffusers(name):
  import diffusers
  import torch
  kind, fields, options = SCHEDULERS[name]
  schedule = diffusion.make_schedule(
      'scaled_linear', num_train_steps=1000, beta_start=0.0015, beta_end=0.0195)
  plan = diffusion.make_plan(
      schedule, **({'name': name} | options), num_steps=20)
  scheduler = getattr(diffusers, kind)(
      beta_schedule='scaled_linear', beta_start=0.0015, beta_end=0.0195,
      **fields)
  scheduler.set_timesteps(20)
  x = np.random.default_rng(0).standard_normal((2, 4, 4, 3))
  eps_fn = lambda x, t: 0.4 * x + 0.001 * t
  expected = torch.from_numpy(x)
  for t in scheduler.timesteps:
    expected = scheduler.step(
        eps_fn(expected, t.double()), t, expected).prev_sample
  assert plan.timesteps.tolist() == scheduler.timesteps.tolist()
  actual = diffusion.sample(
      lambda x, t, i: eps_fn(x, t[:, None, None, None]), plan,
      x.astype(np.float32))
  assert unet_oracle.rel_l2(actual, expected.numpy()) < 1e-5
