"""Final images against diffusers, with nothing typed but the path.

A UNet with random weights is written as a pipeline's folder with a published
scheduler_config.json. Ours is loaded as a run loads it; diffusers makes the
scheduler and the model from the same files.
"""

import inspect
import json

import checkpoints
import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import schedulers
import unet_oracle

from configs import common
from msfp_jax import diffusion
from msfp_jax.convert import scheduler
from msfp_jax.models.unet import UNetConfig
from msfp_jax.run import experiment

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings(
    'ignore:__array__ impl:DeprecationWarning')]
CONFIG = UNetConfig(image_size=8, ch=8, ch_mult=(1, 2), num_res_blocks=1,
                    attn_resolutions=(), norm_groups=4, dropout=0.0)
STEPS = 20


def weights(predicts_data=False):
  """Random weights of a model whose samples do not double every error.

  Where x_0 is clipped, a step is nearly the model itself, and 20 times a random
  model is chaos: rounding becomes 1e-3. One that predicts less does not. One of
  x_0 is asked for more, for else there would be nothing but rounding to see.
  """
  size = 0.4 if predicts_data else 0.05
  state = families.state_of(CONFIG, 31)
  return state | {name: size * state[name]
                  for name in ('conv_out.weight', 'conv_out.bias')}


def write(folder, fields):
  """Writes a pipeline: a UNet with random weights, and its scheduler."""
  state = weights(fields.get('predict_epsilon') is False)
  checkpoints.save_pipeline(folder, state, CONFIG)
  (folder / 'scheduler').mkdir()
  (folder / 'scheduler' / scheduler.FILE).write_text(json.dumps(fields))


def fresh(index, shape):
  """The noise that our samplers draw at a position."""
  key = jax.random.fold_in(jax.random.key(3), index)
  return np.array(jax.random.normal(key, shape))  # torch wants its own


def theirs(folder, steps, noise, monkeypatch, kind=None):
  """Samples as diffusers' pipelines do; images are NHWC, in and out."""
  import diffusers
  import diffusers_oracle
  import torch
  path = folder / 'scheduler'
  fields = json.loads((path / scheduler.FILE).read_text())
  predicts_data = fields.pop('predict_epsilon', True) is False
  if predicts_data:
    fields['prediction_type'] = 'sample'  # which is what it meant
  kind = getattr(diffusers, kind or fields['_class_name'])
  stepper = kind.from_config(fields)
  stepper.set_timesteps(steps)
  unet = diffusers_oracle.unet(CONFIG, weights(predicts_data))
  x = torch.from_numpy(np.array(noise)).permute(0, 3, 1, 2)
  position = [0]
  monkeypatch.setattr(
      inspect.getmodule(kind), 'randn_tensor', lambda *unused, **options:
      torch.from_numpy(fresh(position[0], noise.shape)).permute(0, 3, 1, 2),
      raising=False)
  with torch.no_grad():
    for i, t in enumerate(stepper.timesteps):
      position[0] = i
      out = unet(stepper.scale_model_input(x, t), t).sample
      x = stepper.step(out, t, x).prev_sample
  return x.permute(0, 2, 3, 1).numpy()


def ours(config, noise):
  """Samples as a run does, by the plan and the model that it loads."""
  loaded = experiment.load(config, '')
  with jax.default_matmul_precision('highest'):
    return np.asarray(jax.jit(lambda params, x: diffusion.sample(
        lambda x, t, index: loaded.model.apply({'params': params}, x, t),
        loaded.plan, x, jax.random.key(3)))(loaded.params, noise))


def config_of(folder, **sampler):
  """The defaults of all experiments, and a path."""
  config = common.get_config()
  config.pretrained, config.data.name = str(folder), ''
  config.sampler.update(num_steps=STEPS, **sampler)
  return config


def noise_of(side=8):
  return np.random.default_rng(5).standard_normal(
      (2, side, side, CONFIG.in_channels)).astype(np.float32)


@pytest.mark.parametrize('name', schedulers.PUBLISHED)
def test_final_images_equal_diffusers(tmp_path, monkeypatch, name):
  write(tmp_path / 'p', schedulers.PUBLISHED[name])
  noise = noise_of()
  expected = theirs(tmp_path / 'p', STEPS, noise, monkeypatch)
  actual = ours(config_of(tmp_path / 'p'), jnp.asarray(noise))
  assert unet_oracle.rel_l2(actual, expected) < 1e-5


def test_every_key_of_every_class_is_known_or_its_class_refused(tmp_path):
  """A key that nobody has thought of is refused, so that it is thought of."""
  import diffusers
  import diffusers.schedulers
  kinds = {name: getattr(diffusers, name) for name in dir(diffusers.schedulers)
           if name.endswith('Scheduler') and hasattr(diffusers, name)}
  assert {'DDIMScheduler', 'UniPCMultistepScheduler', 'LCMScheduler',
          'CMStochasticIterativeScheduler'} <= kinds.keys()
  path = tmp_path / scheduler.FILE
  for name, kind in kinds.items():
    parameters = inspect.signature(kind.__init__).parameters
    fields = {key: parameter.default for key, parameter in parameters.items()
              if key not in ('self', 'args', 'kwargs')
              and parameter.default is not inspect.Parameter.empty}
    path.write_text(json.dumps({'_class_name': name} | fields))
    if name in scheduler.CLASSES or name in scheduler.RELATIVES:
      found = scheduler.read(path)
      # By its own defaults a class steps here, but for PNDM's Runge-Kutta.
      assert (found.sampler in found.options) == (
          name in scheduler.CLASSES and name != 'PNDMScheduler'), name
    else:
      with pytest.raises(ValueError, match=f'_class_name={name!r}'):
        scheduler.read(path)
