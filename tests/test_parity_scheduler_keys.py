"""Every key of diffusers' schedulers does here what it does there.

Or is refused by name. As of models (test_parity_keys.py), for each key of a
class's `__init__` there are other values than its default. Those that are not
ours (`No`) are refused; of all others both step a function that stands for a
model from the same noise. The last images are compared.
"""

import dataclasses
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
# What a class is given beside the key that is tried.
_STEPPED = {
    'DDIMScheduler': {}, 'DDPMScheduler': {},
    'PNDMScheduler': {'skip_prk_steps': True},
    'DPMSolverMultistepScheduler': {}}


@dataclasses.dataclass(frozen=True)
class No:
  """A value that our samplers do not compute: refused by its key's name.

  All others must be read and sampled with.
  """

  value: object


_SHARED = {
    'num_train_timesteps': [500], 'beta_start': [0.001], 'beta_end': [0.03],
    'beta_schedule': ['scaled_linear', 'squaredcos_cap_v2', No('sigmoid')],
    'trained_betas': [[0.001 + 1e-5 * i for i in range(1000)]],
    'steps_offset': [1],
    'prediction_type': ['v_prediction', 'sample', No('flow_prediction')],
    'timestep_spacing': ['leading', 'trailing', 'linspace'],
    INVENTED: [No(1)]}
_THRESHOLD = {
    'thresholding': [No(True)], 'dynamic_thresholding_ratio': [0.5],
    'sample_max_value': [2.0], 'rescale_betas_zero_snr': [No(True)]}
_CLIP = {'clip_sample': [True, False], 'clip_sample_range': [0.5]}
_VARIANCE = {'variance_type': ['fixed_large', 'fixed_small_log', No('learned'),
                               None]}
# Of every class that is ours all keys, with other values.
SCHEDULERS = {
    'DDIMScheduler': _SHARED | _THRESHOLD | _CLIP | {
        'set_alpha_to_one': [True, False]},
    'DDPMScheduler': _SHARED | _THRESHOLD | _CLIP | _VARIANCE,
    'PNDMScheduler': _SHARED | {
        'set_alpha_to_one': [True, False], 'skip_prk_steps': [No(False)],
        'prediction_type': [No('v_prediction'), No('sample'),
                            No('flow_prediction')],
        # Ten steps of it are not evenly spaced, as PLMS needs them.
        'timestep_spacing': ['leading', 'trailing', No('linspace')]},
    'DPMSolverMultistepScheduler': _SHARED | _THRESHOLD | _VARIANCE | {
        'solver_order': [No(1), No(3)],
        'algorithm_type': [No('dpmsolver'), No('sde-dpmsolver++')],
        'solver_type': [No('heun')], 'lower_order_final': [False],
        'euler_at_final': [True], 'use_karras_sigmas': [No(True)],
        'use_exponential_sigmas': [No(True)], 'use_beta_sigmas': [No(True)],
        'use_lu_lambdas': [No(True)], 'use_flow_sigmas': [No(True)],
        'flow_shift': [2.0], 'final_sigmas_type': [No('sigma_min')],
        'lambda_min_clipped': [No(-5.1)], 'use_dynamic_shifting': [No(True)],
        'time_shift_type': ['linear']}}
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
  """Samples as diffusers' pipelines do."""
  import diffusers
  import torch
  stepper = getattr(diffusers, kind)(**fields)
  stepper.set_timesteps(STEPS)
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


@pytest.mark.parametrize('kind', SCHEDULERS)
def test_every_key_is_tried(kind):
  assert {INVENTED, *keys_of(kind)} == SCHEDULERS[kind].keys()


@pytest.mark.parametrize('kind, key, value', [
    pytest.param(kind, key, value, id=f'{kind}-{key}-{i}')
    for kind, keys in SCHEDULERS.items() for key, values in keys.items()
    for i, value in enumerate(values)])
def test_a_schedulers_key_does_what_it_does_there(
    tmp_path, monkeypatch, kind, key, value):
  loads = not isinstance(value, No)
  fields = _STEPPED[kind] | {key: value if loads else value.value}
  path = tmp_path / scheduler.FILE
  path.write_text(json.dumps({'_class_name': kind} | fields))

  def read():
    origin = scheduler.read(path)
    return origin, origin_lib.choose(origin, {}, {'num_steps': STEPS}).plan

  if not loads:
    said = 'spacing' if key == 'timestep_spacing' else key
    with pytest.raises(ValueError, match=said):
      read()
    return
  origin, plan = read()
  x = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
  expected = stepped(kind, fields, x, monkeypatch)
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
