"""scheduler_config.json of flow matching, and what its models take."""

import json

import checkpoints
import families
import numpy as np
from origins import choose
import pytest

import msfp_jax as msfp
from msfp_jax import convert
from msfp_jax import diffusion
from msfp_jax.convert import diffusers_unet
from msfp_jax.convert import flow_scheduler
from msfp_jax.convert import scheduler
from msfp_jax.diffusion.origin import Origin
from msfp_jax.models.unet import UNet

CLASS = {'_class_name': 'FlowMatchEulerDiscreteScheduler'}
# As their authors wrote them.
SCHNELL = CLASS | {
    '_diffusers_version': '0.30.0.dev0', 'base_image_seq_len': 256,
    'base_shift': 0.5, 'max_image_seq_len': 4096, 'max_shift': 1.15,
    'num_train_timesteps': 1000, 'shift': 1.0, 'use_dynamic_shifting': False}
DEV = SCHNELL | {'shift': 3.0, 'use_dynamic_shifting': True}
SD3 = CLASS | {'_diffusers_version': '0.29.0.dev0', 'num_train_timesteps': 1000,
               'shift': 3.0}


def read(tmp_path, fields):
  path = tmp_path / scheduler.FILE
  path.write_text(json.dumps(fields))
  return scheduler.read(path)


@pytest.mark.parametrize('fields, options', [
    (SCHNELL, {'shift': 1.0}), (SD3, {'shift': 3.0}), (CLASS, {'shift': 1.0}),
    (DEV, {'shift_by_tokens': [0.5, 1.15, 256, 4096],
           'shift_type': 'exponential'}),
    (DEV | {'time_shift_type': 'linear', 'max_shift': 2, 'shift_terminal': 0.1},
     {'shift_by_tokens': [0.5, 2, 256, 4096], 'shift_type': 'linear',
      'shift_terminal': 0.1}),
    (SCHNELL | {'time_shift_type': 'linear', 'base_shift': None,
                'shift_terminal': None}, {'shift': 1.0})])
def test_a_file_says_the_shift(tmp_path, fields, options):
  found = read(tmp_path, fields)
  assert found.sampler == 'flow' and found.predicts == 'eps'
  assert found.schedule == {'name': 'flow', 'num_train_steps': 1000}
  assert found.options == {'flow': {'spacing': 'uniform'} | options}
  assert Origin.from_json(found.to_json()) == found


def test_a_shift_by_size_needs_the_size(tmp_path):
  found = read(tmp_path, DEV)
  with pytest.raises(ValueError, match='image_tokens=0.*config.sampler.image_'):
    choose(found)
  typed = choose(found, sampler_image_tokens=4096, sampler_num_steps=2)
  # exp(1.15) at 4096 tokens, and odds of 1 in the middle.
  assert typed.plan.timesteps[1] / 1000 == pytest.approx(
      np.exp(1.15) / (np.exp(1.15) + 1), rel=1e-12)


@pytest.mark.parametrize('fields, message', [
    ({'invert_sigmas': True}, 'invert_sigmas=True'),
    ({'use_karras_sigmas': True}, 'use_karras_sigmas=True'),
    ({'use_exponential_sigmas': True}, 'use_exponential_sigmas=True'),
    ({'use_beta_sigmas': True}, 'use_beta_sigmas=True'),
    ({'stochastic_sampling': True}, 'stochastic_sampling=True'),
    ({'num_train_timesteps': 500}, 'num_train_timesteps=500'),
    ({'time_shift_type': 'cubic'}, 'time_shift_type'),
    ({'time_shift_type': ['linear']}, 'time_shift_type'),
    ({'shift': 0}, 'shift=0'), ({'shift': 'much'}, 'shift'),
    ({'use_dynamic_shifting': 1}, 'use_dynamic_shifting=1'),
    ({'use_dynamic_shifting': True, 'base_shift': None}, 'base_shift'),
    ({'max_image_seq_len': 0.5}, 'max_image_seq_len=0.5'),
    ({'warp_factor': 9}, 'warp_factor=9 .unknown')])
def test_what_is_not_computed_is_refused_by_its_key(tmp_path, fields, message):
  with pytest.raises(ValueError, match=rf'{scheduler.FILE}.*{message}'):
    read(tmp_path, CLASS | fields)


@pytest.mark.parametrize('kind', [
    'FlowMatchHeunDiscreteScheduler', 'FlowMatchLCMScheduler'])
def test_other_samplers_of_flow_matching_are_refused_by_class(tmp_path, kind):
  with pytest.raises(ValueError, match=f"_class_name='{kind}'"):
    read(tmp_path, {'_class_name': kind})


@pytest.fixture
def folder(tmp_path):
  """A UNet beside a flow's scheduler; it is given 1000 sigma."""
  checkpoints.save_diffusers(
      tmp_path / 'f', checkpoints.state_of('unet2d'),
      families.CONFIGS['unet2d'])
  (tmp_path / 'f' / scheduler.FILE).write_text(json.dumps(SD3))
  return tmp_path / 'f'


def test_a_unet_of_flow_matching_stays_as_it_is(folder, tmp_path):
  """And in our own file: its velocity is what the plan steps by."""
  model, params = convert.load_pretrained(str(folder))
  assert type(model) is UNet
  expected = diffusion.flow_plan(
      4, shift=3.0, schedule=diffusion.FlowSchedule(1000)).to_dict()
  assert msfp.load_plan(str(folder), num_steps=4).to_dict() == expected
  path = tmp_path / 'ours.safetensors'
  convert.save_pretrained(path, model, params, convert.load_origin(str(folder)))
  assert msfp.load_plan(str(path), num_steps=4).to_dict() == expected


def test_a_family_says_what_its_models_take(folder, monkeypatch):
  """As FLUX, which takes sigma, and sees one token for four latents."""
  monkeypatch.setattr(
      diffusers_unet, 'flow', lambda config: flow_scheduler.FlowModel(
          time=1, image_tokens=config.image_size**2 // 4, shifted=True),
      raising=False)
  (folder / scheduler.FILE).write_text(json.dumps(DEV))
  described = convert.load_origin(str(folder))
  assert described.schedule['num_train_steps'] == 1
  assert described.options['flow']['image_tokens'] == 256
  plan = choose(described).plan
  assert plan.timesteps[0] == 1
  assert choose(described, sampler_shift=2.0).plan.timesteps[0] == 1
  # Without a file it is FLUX.1-dev's, as the model has what -dev has.
  (folder / scheduler.FILE).unlink()
  assert choose(convert.load_origin(str(folder))).plan.to_dict() == (
      plan.to_dict())
  (folder / scheduler.FILE).write_text(
      json.dumps({'_class_name': 'DDIMScheduler'}))
  with pytest.raises(ValueError, match='scheduler of a model of the noise.*'
                                       'FlowMatchEulerDiscreteScheduler'):
    convert.load_origin(str(folder))
