"""The schedule and the sampler of a checkpoint, and what is typed over them."""

import json
import logging

import checkpoints
import families
import numpy as np
from origins import choose
import pytest
import schedulers
import yaml

import msfp_jax as msfp
from msfp_jax import convert
from msfp_jax import diffusion
from msfp_jax.convert import native
from msfp_jax.convert import scheduler
from msfp_jax.diffusion.origin import Origin
from msfp_jax.models.prediction import AsNoise

STABLE_DIFFUSION = {'name': 'scaled_linear', 'num_train_steps': 1000,
                    'beta_start': 0.00085, 'beta_end': 0.012}


def read(tmp_path, fields):
  path = tmp_path / scheduler.FILE
  path.write_text(json.dumps(fields))
  return scheduler.read(path)


def test_nothing_typed_and_nothing_known_is_ddim_on_ddpms_schedule():
  chosen = choose(Origin())
  assert chosen.schedule_fields == {
      'name': 'linear', 'num_train_steps': 1000, 'beta_start': 1e-4,
      'beta_end': 0.02}
  expected = diffusion.ddim_plan(chosen.schedule, 20)
  assert chosen.plan.to_dict() == expected.to_dict()


@pytest.mark.parametrize('name, sampler, options', [
    ('stable-diffusion-v1-4', 'plms', {
        'spacing': 'leading', 'offset': 1, 'convention': 'compvis'}),
    ('ldm-celebahq-256', 'ddim', {
        'spacing': 'leading', 'offset': 0, 'convention': 'ddim', 'clip': 0.0}),
    ('ddpm-cifar10-32', 'ddpm', {
        'spacing': 'leading', 'offset': 0, 'clip': 1.0, 'variance': 'large'}),
    ('linspace', 'ddim', {
        'spacing': 'linspace', 'offset': 0, 'convention': 'ddim', 'clip': 2.0}),
    ('dpm-solver++', 'dpm_solver', {'spacing': 'linspace', 'offset': 0})])
def test_a_published_file_names_its_sampler(tmp_path, name, sampler, options):
  found = read(tmp_path, schedulers.PUBLISHED[name])
  assert found.sampler == sampler
  assert found.options[sampler] == options
  chosen = choose(found)
  assert chosen.sampler_fields.items() >= {'name': sampler, **options}.items()


def test_typed_fields_win_one_by_one_and_the_log_has_both(tmp_path, caplog):
  found = read(tmp_path, schedulers.PUBLISHED['stable-diffusion-v1-4'])
  with caplog.at_level(logging.INFO):
    chosen = choose(found, sampler_name='ddim', sampler_spacing='quad',
                    schedule_beta_end=0.02)
  assert chosen.schedule_fields == STABLE_DIFFUSION | {'beta_end': 0.02}
  # What PNDM's file says of clipping and of the end goes over, as in diffusers.
  expected = diffusion.ddim_plan(
      chosen.schedule, 20, 'quad', convention='compvis', offset=1)
  assert chosen.plan.to_dict() == expected.to_dict()
  for text in ('beta_end=0.02 in place of 0.012', 'name=ddim in place of plms',
               'spacing=quad in place of leading', str(tmp_path)):
    assert text in caplog.text
  caplog.clear()
  choose(found)
  assert 'in place of' not in caplog.text


def test_a_convention_that_is_typed_brings_its_own_offset(tmp_path):
  found = read(tmp_path, schedulers.PUBLISHED['audioldm'])
  assert choose(found).plan.timesteps[-1] == 1
  assert choose(found, sampler_convention='ddim').plan.timesteps[-1] == 0
  typed = choose(found, sampler_convention='ddim', sampler_offset=2)
  assert typed.plan.timesteps[-1] == 2


def test_betas_one_by_one(tmp_path):
  found = read(tmp_path, schedulers.PUBLISHED['all betas'])
  betas = schedulers.PUBLISHED['all betas']['trained_betas']
  np.testing.assert_array_equal(choose(found).schedule.betas, betas)
  with pytest.raises(ValueError, match=r"one by one.*\['beta_end'\] alone"):
    choose(found, schedule_beta_end=0.5)
  typed = choose(found, **{
      f'schedule_{key}': value for key, value in STABLE_DIFFUSION.items()})
  assert typed.schedule_fields == STABLE_DIFFUSION


@pytest.mark.parametrize('fields, message', [
    ({'_class_name': 'CMStochasticIterativeScheduler', 'sigma_min': 0.002},
     "_class_name='CMStochasticIterativeScheduler'.*none that are known"),
    ({'_class_name': 'LCMScheduler'}, 'LCMScheduler'),
    ({'beta_start': 0.1}, '_class_name=None'),
    ({'_class_name': 'DDIMScheduler', 'warp_factor': 9}, "warp_factor': 9"),
    ({'_class_name': 'DDIMScheduler', 'rescale_betas_zero_snr': True},
     'rescale_betas_zero_snr=True'),
    ({'_class_name': 'DDIMScheduler', 'beta_schedule': 'laplace'},
     "beta_schedule='laplace'"),
    ({'_class_name': 'DDIMScheduler', 'prediction_type': 'flow_prediction'},
     "prediction_type='flow_prediction'"),
    ({'_class_name': 'DDIMScheduler', 'timestep_spacing': 'cubic'}, 'cubic'),
    ({'_class_name': 'DDIMScheduler', 'clip_sample': 'no'}, "clip_sample='no'"),
    ({'_class_name': 'DDIMScheduler', 'beta_end': None}, 'beta_end=None'),
    ({'_class_name': 'DDIMScheduler', 'steps_offset': 0.5}, 'steps_offset=0.5'),
    ({'_class_name': 'DDPMScheduler', 'variance_type': 'learned_range'},
     'predicts a variance'),
    ({'_class_name': 'DDPMScheduler', 'predict_epsilon': True,
      'prediction_type': 'v_prediction'}, 'contradict'),
    ({'_class_name': 'EulerDiscreteScheduler', 'timestep_type': 'continuous'},
     'continuous')])
def test_what_no_sampler_here_can_do_is_refused_by_name(
    tmp_path, fields, message):
  with pytest.raises(ValueError, match=rf'(?s){scheduler.FILE}.*{message}'):
    read(tmp_path, fields)


@pytest.mark.parametrize('fields, message, another', [
    ({'_class_name': 'EulerDiscreteScheduler'},
     'EulerDiscreteScheduler is no sampler here', 'ddim'),
    ({'_class_name': 'DDIMScheduler', 'thresholding': True},
     'thresholding=True', 'plms'),
    ({'_class_name': 'PNDMScheduler'}, 'skip_prk_steps=False', 'ddim'),
    ({'_class_name': 'PNDMScheduler', 'skip_prk_steps': True,
      'prediction_type': 'v_prediction'}, 'v_prediction', 'ddim'),
    ({'_class_name': 'DDPMScheduler', 'variance_type': 'fixed_large_log'},
     'fixed_large_log', 'ddim'),
    ({'_class_name': 'DPMSolverMultistepScheduler', 'solver_order': 3},
     'solver_order=3', 'ddim'),
    ({'_class_name': 'DPMSolverMultistepScheduler', 'use_karras_sigmas': True},
     'use_karras_sigmas=True', 'ddim')])
def test_what_its_own_sampler_cannot_do_needs_another(
    tmp_path, fields, message, another):
  """The message says so, and that other one is taken when it is typed."""
  found = read(tmp_path, fields)
  with pytest.raises(ValueError, match=f'{message}.*name another.*{another}'):
    choose(found)
  assert choose(found, sampler_name=another).sampler_fields['name'] == another


def test_heuns_own_betas(tmp_path):
  found = read(tmp_path, {'_class_name': 'HeunDiscreteScheduler'})
  assert found.schedule == STABLE_DIFFUSION | {'name': 'linear'}


@pytest.mark.parametrize('place', ['', 'scheduler', '../scheduler'])
def test_a_file_is_found_beside_and_in_the_pipeline(tmp_path, place):
  weights = tmp_path / 'unet' / 'w.safetensors'
  folder = weights.parent / place
  weights.parent.mkdir()
  assert scheduler.find(weights) is None
  folder.mkdir(exist_ok=True)
  (folder / scheduler.FILE).write_text('{}')
  assert scheduler.find(weights).resolve() == (
      folder / scheduler.FILE).resolve()


def test_a_flat_folder_of_v_is_a_model_of_the_noise(tmp_path):
  """And stays one in our own file, with its schedule and its sampler."""
  config = families.CONFIGS['unet2d']
  checkpoints.save_diffusers(
      tmp_path / 'f', checkpoints.state_of('unet2d'), config)
  fields = schedulers.PUBLISHED['stable-diffusion-2-1']
  (tmp_path / 'f' / scheduler.FILE).write_text(json.dumps(fields))
  model, params = convert.load_pretrained(str(tmp_path / 'f'))
  origin = convert.load_origin(str(tmp_path / 'f'))
  assert origin.schedule == STABLE_DIFFUSION
  bar = diffusion.make_schedule(**STABLE_DIFFUSION).alphas_cumprod
  assert model == AsNoise(type(model.inner)(config), 'v', tuple(bar))
  path = tmp_path / 'ours.safetensors'
  native.save_pretrained(path, model, params, origin)
  again, _ = convert.load_pretrained(str(path))
  assert again == model
  kept = convert.load_origin(str(path))
  assert kept.source == str(path)
  assert choose(kept).plan.to_dict() == choose(origin).plan.to_dict()
  with pytest.raises(ValueError, match='predicts v.*leave config.schedule out'):
    choose(kept, schedule_beta_end=0.02)


def test_a_yaml_goes_before_a_schedulers_file(tmp_path):
  config = families.CONFIGS['ldm_beds']
  checkpoints.save_ldm_plain(
      tmp_path / 'm.safetensors', checkpoints.state_of('ldm_beds'), config)
  (tmp_path / scheduler.FILE).write_text(json.dumps(
      schedulers.PUBLISHED['ddpm-cifar10-32']))
  assert convert.load_origin(
      str(tmp_path / 'm.safetensors')).source.endswith('m.safetensors')
  file = tmp_path / 'config.yaml'
  content = yaml.safe_load(file.read_text())
  content['model']['params']['parameterization'] = 'v'
  file.write_text(yaml.safe_dump(content))
  model, _ = convert.load_pretrained(str(tmp_path / 'm.safetensors'))
  assert model.predicts == 'v'


def test_the_plan_of_a_checkpoint_in_one_line(tmp_path):
  checkpoints.save_diffusers(
      tmp_path / 'f', checkpoints.state_of('unet2d'),
      families.CONFIGS['unet2d'])
  (tmp_path / 'f' / scheduler.FILE).write_text(json.dumps(
      schedulers.PUBLISHED['stable-diffusion-v1-4']))
  schedule = diffusion.make_schedule(**STABLE_DIFFUSION)
  for typed, expected in (
      ({}, diffusion.plms_plan(schedule, 20)),
      ({'num_steps': 5, 'name': 'ddim', 'eta': 1.0}, diffusion.ddim_plan(
          schedule, 5, eta=1.0, convention='compvis'))):
    plan = msfp.load_plan(str(tmp_path / 'f'), **typed)
    assert plan.to_dict() == expected.to_dict()


def test_the_shipped_model_is_of_the_schedule_that_is_taken():
  assert convert.load_origin('digits16') == Origin(
      schedule=choose(Origin()).schedule_fields)


def test_a_damaged_origin_in_a_file(tmp_path):
  path = tmp_path / 'm.safetensors'
  native.write_safetensors(path, {}, {
      'format': native.FORMAT, 'origin': '{"speed": 1}'})
  with pytest.raises(ValueError, match='describes no origin.*speed'):
    convert.load_origin(str(path))


@pytest.mark.parametrize('text', [
    '[]', '3', '{"options": 3}', '{"options": {"ddim": 3}}',
    '{"schedule": []}', '{"sampler": null}',
    '{"unknown": 1}'])
def test_a_text_that_is_no_origin(text):
  with pytest.raises((TypeError, ValueError)):
    Origin.from_json(text)
