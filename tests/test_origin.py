"""The schedule and the sampler of a checkpoint, and what is typed over them."""

import json
import logging
import pathlib
import re

import checkpoints
import families
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import schedulers
import tiny
import yaml

from configs import common
import msfp_jax as msfp
from msfp_jax import convert
from msfp_jax import diffusion
from msfp_jax.convert import native
from msfp_jax.convert import scheduler
from msfp_jax.convert import training
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.diffusion import origin as origin_lib
from msfp_jax.diffusion.origin import Origin
from msfp_jax.models import registry
from msfp_jax.models.guided import Guided
from msfp_jax.models.prediction import AsNoise
from msfp_jax.models.unet import UNetConfig

STABLE_DIFFUSION = {'name': 'scaled_linear', 'num_train_steps': 1000,
                    'beta_start': 0.00085, 'beta_end': 0.012}


def read(tmp_path, fields):
  path = tmp_path / scheduler.FILE
  path.write_text(json.dumps(fields))
  return scheduler.read(path)


def choose(origin, **typed):
  """Chooses with a config in which only `typed` was typed."""
  config = common.get_config()
  for field, value in typed.items():
    part, _, name = field.partition('_')
    config[part][name] = value
  return origin_lib.choose(origin, config.schedule, config.sampler)


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


def training_of(family, given, tensors=None, **model):
  config = UNetConfig(**{'image_size': 32} | model)
  return training.origin(family, 'FILE', given, tensors or {}, config)


def compvis(**fields):
  return {'model': {'params': fields}}


def betas_of(schedule):
  """Betas as Lightning keeps them."""
  return {'betas': LazyTensor.of(np.float32(
      diffusion.make_schedule(**schedule).betas))}


def test_a_compvis_yaml_has_the_schedule():
  found = training_of('ldm', compvis(
      linear_start=0.0015, linear_end=0.0205, timesteps=500))
  assert found.schedule == {
      'name': 'scaled_linear', 'num_train_steps': 500, 'beta_start': 0.0015,
      'beta_end': 0.0205}
  assert choose(found).sampler_fields.items() >= {
      'name': 'ddim', 'convention': 'compvis', 'spacing': 'uniform'}.items()
  # The defaults of the class, which an own yaml may leave out.
  assert training_of('ldm', compvis()).schedule == {
      'name': 'scaled_linear', 'num_train_steps': 1000, 'beta_start': 1e-4,
      'beta_end': 2e-2}
  cosine = training_of('ldm', compvis(beta_schedule='cosine', cosine_s=0.01))
  assert choose(cosine).schedule_fields['offset'] == 0.01
  for field, value in (('beta_schedule', 'sqrt'), ('given_betas', [0.1]),
                       ('parameterization', 'logsnr')):
    with pytest.raises(ValueError, match=field):
      training_of('ldm', compvis(**{field: value}))


@pytest.mark.parametrize('kind', ['eps', 'v', 'x0'])
def test_a_compvis_yaml_has_the_parameterization(kind):
  assert training_of(
      'ldm', compvis(parameterization=kind)).predicts == kind


def test_betas_in_the_file_win_over_a_yaml():
  """They are what the model was trained on; by name where a name makes them."""
  tensors = betas_of(STABLE_DIFFUSION)
  found = training_of('ldm', compvis(linear_start=0.5, linear_end=0.6), tensors)
  assert found.schedule == STABLE_DIFFUSION
  odd = np.linspace(0.1, 0.4, 7)**3
  tensors = {'betas': LazyTensor.of(np.float32(odd))}
  found = training_of('ldm', None, tensors)
  np.testing.assert_allclose(found.schedule['betas'], odd, rtol=1e-6)


@pytest.mark.parametrize('family, model, end', [
    ('ldm', {'ch': 224, 'ch_mult': (1, 2, 3, 4)}, 0.0195),
    ('ldm', {'ch': 192, 'ch_mult': (1, 2, 2, 4, 4)}, 0.0155),
    ('ldm', {'ch': 320, 'ch_mult': (1, 2, 4, 4), 'context_dim': 768}, 0.012),
    ('diffusers', {'ch': 320, 'ch_mult': (1, 2, 4, 4), 'context_dim': 768},
     0.012),
    ('diffusers', {'ch': 128, 'ch_mult': (1, 2, 2, 2)}, 0.02),
    ('ddim', {'ch': 32, 'ch_mult': (1, 2)}, 0.02)])
def test_published_models_have_their_published_schedule(family, model, end):
  assert training_of(family, None, **model).schedule['beta_end'] == end


def test_a_schedule_that_nothing_tells_is_said(caplog):
  found = training_of('diffusers', {'_class_name': 'UNet2DModel'}, ch=32,
                      ch_mult=(1, 3))
  assert choose(found).schedule_fields == origin_lib.SCHEDULE
  assert 'nothing tells the schedule of FILE' in caplog.text


def test_stable_diffusion_2_may_predict_v(caplog):
  shapes = {'ch': 320, 'ch_mult': (1, 2, 4, 4), 'context_dim': 1024}
  training_of('ldm', compvis(parameterization='v'), **shapes)
  assert not caplog.text
  training_of('ldm', None, **shapes)
  assert 'or v (768): took the noise' in caplog.text


def test_an_original_yaml_of_ddim_has_the_schedule():
  found = training_of('ddim', {'diffusion': {
      'beta_schedule': 'quad', 'beta_start': 0.001, 'beta_end': 0.03,
      'num_diffusion_timesteps': 400}})
  assert found.schedule == {
      'name': 'scaled_linear', 'num_train_steps': 400, 'beta_start': 0.001,
      'beta_end': 0.03}
  with pytest.raises(ValueError, match="beta_schedule='jsd'"):
    training_of('ddim', {'diffusion': {'beta_schedule': 'jsd'}})


@pytest.mark.parametrize('predicts', ['v', 'x0'])
def test_a_model_of_v_or_x0_becomes_one_of_the_noise(predicts):
  """With x_t = a x_0 + s eps, what it predicts leads back to eps."""
  bar = (0.9, 0.5, 0.01)
  rng = np.random.default_rng(0)
  x0, eps = rng.standard_normal((2, 3, 2, 2, 1))
  t = np.array([0, 1, 2])
  a, s = (np.sqrt(b)[:, None, None, None]
          for b in (np.array(bar), 1 - np.array(bar)))
  target = a * eps - s * x0 if predicts == 'v' else x0
  model = AsNoise(Given(jnp.asarray(target, jnp.float32)), predicts, bar)
  found = model.apply({}, jnp.asarray(a * x0 + s * eps, jnp.float32),
                      jnp.asarray(t, jnp.float32))
  np.testing.assert_allclose(found, eps, atol=2e-5)


def test_a_table_of_alphabar_is_one():
  for predicts, bar in (('eps', (0.5,)), ('v', ()), ('v', (1.0,)),
                        ('v', (0.5, float('nan')))):
    with pytest.raises(ValueError, match='predicts=|alphas_cumprod'):
      AsNoise(tiny.UNET, predicts, bar)


def test_files_know_models_of_v_also_with_guidance():
  model = Guided(AsNoise(tiny.UNET, 'v', (0.9, 0.25)), 2.0, 3)
  row = json.loads(json.dumps(registry.to_dict(model)))
  assert registry.from_dict(row) == model
  assert registry.from_dict(registry.to_dict(model.inner)) == model.inner
  with pytest.raises(TypeError, match="'speed'"):
    registry.from_dict(row | {'speed': 1})


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


def test_docs_have_every_key_of_a_schedulers_file():
  """Used, harmless or refused: one row for each, and no row for others."""
  text = (pathlib.Path(__file__).parents[1] / 'docs/checkpoints.md').read_text()
  table = text.split('Keys of `scheduler_config.json`')[1].split('\n\n')[1]
  found = [key for row in table.splitlines()[2:]
           for key in re.findall(r'`(\w+)`', row.split('|')[1])]
  assert sorted(found) == sorted(scheduler.KEYS)


def test_the_shipped_model_says_nothing():
  assert convert.load_origin('digits16') == Origin()


def test_a_damaged_origin_in_a_file(tmp_path):
  path = tmp_path / 'm.safetensors'
  native.write_safetensors(path, {}, {
      'format': native.FORMAT, 'origin': '{"speed": 1}'})
  with pytest.raises(ValueError, match='describes no origin.*speed'):
    convert.load_origin(str(path))


class Given(nn.Module):
  """A model that predicts what it was given."""

  value: jax.Array

  def __call__(self, x, t):
    return self.value


@pytest.mark.parametrize('fields, expected', [
    ({'linear_start': '1e-4'}, 1e-4), ({'linear_start': 1}, 1.0),
    ({'linear_start': 'low'}, None), ({'linear_start': True}, None),
    ({'linear_start': [1e-4]}, None), ({'timesteps': '1000'}, 1e-4),
    ({'timesteps': 999.5}, None)])
def test_numbers_that_yaml_reads_as_text(fields, expected):
  """PyYAML takes 1e-4 for text, the training that wrote it did not."""
  if expected is None:
    with pytest.raises(ValueError, match=f'{next(iter(fields))}=.*a number'):
      training_of('ldm', compvis(**fields))
  else:
    found = training_of('ldm', compvis(**fields)).schedule
    assert found['beta_start'] == expected
    assert found['num_train_steps'] == 1000


def test_a_cosine_has_no_betas():
  cosine = training_of('ldm', compvis(beta_schedule='cosine'))
  with pytest.raises(ValueError, match='schedule.beta_start=0.001.*no betas'):
    choose(cosine, schedule_beta_start=1e-3)
  chosen = choose(Origin(), schedule_name='cosine')
  assert chosen.schedule_fields.keys() == {'name', 'num_train_steps'}


@pytest.mark.parametrize('predicts', ['v', 'x0'])
def test_between_two_steps_the_schedule_is_on_a_line(predicts):
  """Real timesteps get their own noise level; outside of it all is NaN."""
  bar = np.array([0.9, 0.5, 0.1])
  given = np.random.default_rng(0).normal(size=(5, 2, 2, 1)).astype(np.float32)
  x = jnp.ones((5, 2, 2, 1))
  t = jnp.asarray([0.25, 1.5, 2.0, -0.5, 2.5])
  found = AsNoise(Given(jnp.asarray(given)), predicts, tuple(bar)).apply(
      {}, x, t)
  level = np.array([0.8, 0.3, 0.1])[:, None, None, None]
  signal, sigma = np.sqrt(level), np.sqrt(1 - level)
  expected = (signal * given[:3] + sigma if predicts == 'v'
              else (1 - signal * given[:3]) / sigma)
  np.testing.assert_allclose(found[:3], expected, rtol=1e-5, atol=1e-6)
  assert np.isnan(found[3:]).all()


@pytest.mark.parametrize('text', [
    '[]', '3', '{"options": 3}', '{"options": {"ddim": 3}}',
    '{"schedule": []}', '{"sampler": null}',
    '{"unknown": 1}'])
def test_a_text_that_is_no_origin(text):
  with pytest.raises((TypeError, ValueError)):
    Origin.from_json(text)
