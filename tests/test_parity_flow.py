"""Flow matching against diffusers' FlowMatchEulerDiscreteScheduler.

As FLUX's and Stable Diffusion 3's pipelines call it. As of other schedulers
(test_parity_scheduler_keys.py), every key of its class is tried with other
values than its default, and is sampled with or refused by its name.
"""

import ast
import functools
import inspect
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import unet_oracle

from msfp_jax import diffusion
from msfp_jax.convert import flow_scheduler
from msfp_jax.convert import scheduler
from msfp_jax.diffusion import origin as origin_lib

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings(
    'ignore:__array__ impl:DeprecationWarning')]

INVENTED, STEPS, TOKENS = 'dreamt_of', 10, 1024
DYNAMIC = {'use_dynamic_shifting': True}
# Published files, by what of them counts.
PUBLISHED = {'schnell': {}, 'dev': DYNAMIC | {'shift': 3.0},
             'sd3': {'shift': 3.0},
             'qwen': DYNAMIC | {'max_shift': 0.9, 'max_image_seq_len': 8192,
                                'shift_terminal': 0.02}}
# Other values of every key: (fields that are read, key that is refused).
KEYS = {
    'num_train_timesteps': [({'num_train_timesteps': 500}, True)],
    'shift': [({'shift': 3.0}, False), (DYNAMIC | {'shift': 3.0}, False)],
    'use_dynamic_shifting': [(DYNAMIC, False)],
    'base_shift': [({'base_shift': 0.7}, False),
                   (DYNAMIC | {'base_shift': 0.7}, False)],
    'max_shift': [({'max_shift': 1.5}, False),
                  (DYNAMIC | {'max_shift': 1.5}, False)],
    'base_image_seq_len': [(DYNAMIC | {'base_image_seq_len': 64}, False)],
    'max_image_seq_len': [(DYNAMIC | {'max_image_seq_len': 9000}, False)],
    'invert_sigmas': [({'invert_sigmas': True}, True)],
    'shift_terminal': [({'shift_terminal': 0.1}, False),
                       (DYNAMIC | {'shift_terminal': 0.1}, False)],
    'use_karras_sigmas': [({'use_karras_sigmas': True}, True)],
    'use_exponential_sigmas': [({'use_exponential_sigmas': True}, True)],
    'use_beta_sigmas': [({'use_beta_sigmas': True}, True)],
    'time_shift_type': [({'time_shift_type': 'linear'}, False),
                        (DYNAMIC | {'time_shift_type': 'linear'}, False)],
    'stochastic_sampling': [({'stochastic_sampling': True}, True)],
    INVENTED: [({INVENTED: 1}, True)]}


@functools.cache
def calculate_shift():
  """FLUX's pipeline's, read from its file: the whole needs transformers."""
  import diffusers
  path = pathlib.Path(diffusers.__file__).parent / 'pipelines/flux'
  (found,) = (node for node in ast.parse(
      (path / 'pipeline_flux.py').read_text()).body
              if getattr(node, 'name', '') == 'calculate_shift')
  names = {}
  exec(compile(ast.Module([found], []), 'pipeline_flux.py', 'exec'), names)
  return names['calculate_shift']


def theirs(fields, steps, tokens, spacing):
  """The scheduler as a pipeline sets it."""
  import diffusers
  stepper = diffusers.FlowMatchEulerDiscreteScheduler(**fields)
  config, options = stepper.config, {}
  if config.use_dynamic_shifting:
    options['mu'] = calculate_shift()(
        tokens, config.base_image_seq_len, config.max_image_seq_len,
        config.base_shift, config.max_shift)
  if spacing == 'uniform':
    options['sigmas'] = np.linspace(1.0, 1 / steps, steps)
  stepper.set_timesteps(
      **options, **({} if 'sigmas' in options else
                    {'num_inference_steps': steps}))
  return stepper


def ours(tmp_path, fields, **typed):
  path = tmp_path / scheduler.FILE
  path.write_text(json.dumps({'_class_name': flow_scheduler.CLASS} | fields))
  origin = scheduler.read(path)
  return origin_lib.choose(origin, {}, typed).plan


def predict(x, t, xp):
  """What stands for a model of velocities: of every t another one."""
  return 0.8 * xp.tanh(x) + 0.0003 * t


def assert_equal(plan, stepper):
  """Noise levels to rounding, and the last image of a whole trajectory."""
  import torch
  # Ours are float64; each of diffusers' operations rounds to float32, half an
  # ULP below 1 being 6e-8.
  levels = np.append(plan.timesteps / 1000, 0)
  np.testing.assert_allclose(
      levels, stepper.sigmas.numpy(), rtol=0, atol=3e-7)
  np.testing.assert_allclose(
      plan.timesteps, stepper.timesteps.numpy(), rtol=0, atol=3e-4)
  noise = np.random.default_rng(0).standard_normal((2, 4, 6, 3)).astype(
      np.float32)
  x = torch.from_numpy(noise)
  for t in stepper.timesteps:
    x = stepper.step(predict(x, t, torch), t, x).prev_sample
  found = diffusion.sample(
      lambda x, t, index: predict(x, t[:, None, None, None], jnp), plan,
      jnp.asarray(noise))
  assert unet_oracle.rel_l2(np.asarray(found), x.numpy()) < 2e-6
  # It matters: another shift is far away.
  other = diffusion.sample(
      lambda x, t, index: predict(x, t[:, None, None, None], jnp),
      diffusion.flow_plan(max(plan.num_steps, 2), shift=9.0,
                          schedule=diffusion.FlowSchedule(1000)),
      jnp.asarray(noise))
  assert plan.num_steps < 3 or unet_oracle.rel_l2(
      np.asarray(other), x.numpy()) > 1e-4


@pytest.mark.parametrize('tokens', [256, 1536, 4096])
@pytest.mark.parametrize('steps', [1, 2, 4, 28, 50])
@pytest.mark.parametrize('spacing', ['uniform', 'linspace'])
@pytest.mark.parametrize('name', PUBLISHED)
def test_published_files(tmp_path, name, spacing, steps, tokens):
  if steps == 1 and 'shift_terminal' in PUBLISHED[name]:
    with pytest.raises(ValueError, match='one step'):  # divides by 0 there
      ours(tmp_path, PUBLISHED[name], num_steps=1, image_tokens=tokens)
    return
  assert_equal(
      ours(tmp_path, PUBLISHED[name], num_steps=steps, image_tokens=tokens,
           spacing=spacing),
      theirs(PUBLISHED[name], steps, tokens, spacing))


def test_every_key_is_tried():
  import diffusers
  parameters = inspect.signature(
      diffusers.FlowMatchEulerDiscreteScheduler.__init__).parameters
  assert {INVENTED, *parameters} - {'self'} == KEYS.keys()


@pytest.mark.parametrize('key, fields, refused', [
    pytest.param(key, fields, refused, id=f'{key}-{i}')
    for key, cases in KEYS.items()
    for i, (fields, refused) in enumerate(cases)])
def test_a_key_does_what_it_does_there(tmp_path, key, fields, refused):
  plan = lambda: ours(
      tmp_path, fields, num_steps=STEPS, image_tokens=TOKENS)
  if refused:
    with pytest.raises(ValueError, match=key):
      plan()
  else:
    assert_equal(plan(), theirs(fields, STEPS, TOKENS, 'uniform'))


def test_noised_images_are_diffusers():
  import torch
  stepper = theirs({}, STEPS, TOKENS, 'uniform')
  rng = np.random.default_rng(0)
  data, noise = rng.standard_normal((2, 4, 3, 5, 2)).astype(np.float32)
  t = stepper.timesteps[torch.tensor([0, 3, 7, 9])]
  expected = stepper.scale_noise(torch.from_numpy(data), t,
                                 torch.from_numpy(noise))
  found = diffusion.add_noise(
      diffusion.FlowSchedule(1000), jnp.asarray(data), jnp.asarray(noise),
      jnp.asarray(t.numpy()))
  np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-6)
