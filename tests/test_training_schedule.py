"""The schedule that a yaml, or Lightning, says of a training."""


import numpy as np
from origins import choose
import pytest

from msfp_jax import diffusion
from msfp_jax.convert import training
from msfp_jax.convert.tensors import LazyTensor
from msfp_jax.diffusion import origin as origin_lib
from msfp_jax.diffusion.origin import Origin
from msfp_jax.models.unet import UNetConfig

STABLE_DIFFUSION = {'name': 'scaled_linear', 'num_train_steps': 1000,
                    'beta_start': 0.00085, 'beta_end': 0.012}


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
