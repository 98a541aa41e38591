"""Every key of diffusers' schedulers does here what it does there.

Or is refused by name. As of models (test_parity_keys.py), for each key of a
class's `__init__` there are other values than its default: both step a
function that stands for a model from the same noise. The last images are
compared.
"""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unet_oracle

from msfp_jax import diffusion
from msfp_jax.convert import scheduler
from msfp_jax.diffusion import origin as origin_lib

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings(
    'ignore:__array__ impl:DeprecationWarning')]

INVENTED = 'dreamt_of'
# Of schedulers: every key of the classes that are ours, with other values.
_STEPPED = {
    'DDIMScheduler': {}, 'DDPMScheduler': {},
    'PNDMScheduler': {'skip_prk_steps': True},
    'DPMSolverMultistepScheduler': {}}
SCHEDULERS = {
    'num_train_timesteps': [500], 'beta_start': [0.001], 'beta_end': [0.03],
    'beta_schedule': ['scaled_linear', 'squaredcos_cap_v2', 'sigmoid'],
    'trained_betas': [[0.001 + 1e-5 * i for i in range(1000)]],
    'clip_sample': [True, False], 'clip_sample_range': [0.5],
    'set_alpha_to_one': [True, False], 'steps_offset': [1],
    'prediction_type': ['v_prediction', 'sample', 'flow_prediction'],
    'thresholding': [True], 'dynamic_thresholding_ratio': [0.5],
    'sample_max_value': [2.0],
    'timestep_spacing': ['leading', 'trailing', 'linspace'],
    'rescale_betas_zero_snr': [True],
    'variance_type': ['fixed_large', 'fixed_small_log', 'learned', None],
    'skip_prk_steps': [False], 'solver_order': [1, 3],
    'algorithm_type': ['dpmsolver', 'sde-dpmsolver++'],
    'solver_type': ['heun'], 'lower_order_final': [False],
    'euler_at_final': [True], 'use_karras_sigmas': [True],
    'use_exponential_sigmas': [True], 'use_beta_sigmas': [True],
    'use_lu_lambdas': [True], 'use_flow_sigmas': [True], 'flow_shift': [2.0],
    'final_sigmas_type': ['sigma_min'], 'lambda_min_clipped': [-5.1],
    'use_dynamic_shifting': [True], 'time_shift_type': ['linear'],
    INVENTED: [1]}
STEPS = 10


def keys_of(kind):
  import diffusers
  return [key for key in inspect.signature(
      getattr(diffusers, kind).__init__).parameters if key != 'self']


def predict(x, t, xp):
  """What stands for a model: smooth, and of every timestep another one."""
  return 0.4 * xp.tanh(x) + 0.0003 * t


def as_noise(kind, out, x, a, s):
  """The noise, by the definitions of v and of x_0 with x = a x_0 + s eps."""
  return {'eps': out, 'v': a * out + s * x, 'x0': (x - a * out) / s}[kind]


def stepped(kind, fields, x, monkeypatch):
  """Samples as diffusers' pipelines do; None where it cannot."""
  import diffusers
  import torch
  try:
    stepper = getattr(diffusers, kind)(**fields)
    stepper.set_timesteps(STEPS)
  except (ValueError, TypeError, NotImplementedError):
    return None
  position = [0]
  monkeypatch.setattr(
      inspect.getmodule(type(stepper)), 'randn_tensor',
      lambda *unused, **options: torch.from_numpy(np.array(jax.random.normal(
          jax.random.fold_in(jax.random.key(3), position[0]), x.shape))),
      raising=False)
  found = torch.from_numpy(np.array(x))
  for i, t in enumerate(stepper.timesteps):
    position[0] = i
    found = stepper.step(predict(found, t, torch), t, found).prev_sample
  return found.numpy()


@pytest.mark.parametrize('kind', _STEPPED)
@pytest.mark.parametrize('key, value', [
    pytest.param(key, value, id=f'{key}-{i}')
    for key, values in SCHEDULERS.items() for i, value in enumerate(values)])
def test_a_schedulers_key_does_what_it_does_there(
    tmp_path, monkeypatch, kind, key, value):
  keys = keys_of(kind)
  assert set(keys) <= SCHEDULERS.keys()
  if key not in keys and key != INVENTED:
    return  # diffusers ignores it, and ours may use it for another sampler
  fields = _STEPPED[kind] | {key: value}
  path = tmp_path / scheduler.FILE
  path.write_text(json.dumps({'_class_name': kind} | fields))
  try:
    origin = scheduler.read(path)
  except ValueError as error:
    assert key in str(error)
    return
  assert key != INVENTED
  if own := origin.refused.get(origin.sampler):
    assert key in own
    return
  x = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
  expected = stepped(kind, fields, x, monkeypatch)
  try:
    plan = origin_lib.choose(origin, {}, {'num_steps': STEPS}).plan
  except ValueError as error:  # steps that PLMS cannot take
    assert key == 'timestep_spacing' and 'spacing' in str(error)
    return
  alphas = origin.noise_schedule().alphas_cumprod
  # Rounded at last: in float32 little is left of 1 - alpha at t = 0.
  parts = [jnp.asarray(np.sqrt(part), jnp.float32)
           for part in (alphas, 1 - alphas)]

  def noise(x, t, unused_index):
    t = t[:, None, None, None]
    return as_noise(origin.predicts, predict(x, t, jnp), x,
                    *(part[t.astype(jnp.int32)] for part in parts))

  actual = diffusion.sample(noise, plan, x, jax.random.key(3))
  assert unet_oracle.rel_l2(np.asarray(actual), expected) < 1e-5
