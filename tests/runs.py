"""Tiny runs of train.py and eval.py, for the tests in experiment/."""

import itertools
import os
import signal

import jax
import numpy as np
import safetensors

from configs import images as images_config
from msfp_jax.run import experiment as experiment_lib
from msfp_jax.run import train
from msfp_jax.tune import step as step_lib

SMALL = {
    'model.ch_mult': (1,), 'model.num_res_blocks': 0,
    'sampler.num_steps': 2, 'calibrate.batch_size': 4,
    'calibrate.samples_per_layer': 256,
    'pretrain.num_steps': 6, 'pretrain.warmup': 2, 'pretrain.save_every': 2,
    'pretrain.log_every': 1, 'pretrain.sample_every': 6,
    'finetune.num_updates': 6, 'finetune.save_every': 2,
    'finetune.batch_size': 2, 'finetune.rank': 2, 'eval.report': False,
}


def smooth(count, height, width, channels, seed=0):
  """Draws random smooth images, uint8."""
  rng = np.random.default_rng(seed)
  rows, columns = (np.linspace(0, np.pi, n) for n in (height, width))
  a = rng.uniform(0.5, 3, (4, count, 1, 1, channels))
  x = np.sin(a[0] * rows[:, None, None] + a[1]) * np.cos(
      a[2] * columns[:, None] + a[3])
  return np.round((x + 1) * 127.5).astype(np.uint8)


def config_of(path, changes=None):
  config = images_config.get_config('smoke')
  config.update_from_flattened_dict(
      {'data.path': str(path)} | SMALL | (changes or {}))
  return config


def interrupt(patch, module, at):
  """Sends this process SIGTERM during step `at` of the module's loop."""
  make_step = module.make_step

  class Stopped(step_lib.Step):

    def __init__(self, step):
      self.__dict__.update(vars(step))
      self.count = itertools.count(1)

    def __call__(self, state):
      if next(self.count) == at:
        os.kill(os.getpid(), signal.SIGTERM)
      return super().__call__(state)

  def patched(*args, **options):
    return Stopped(make_step(*args, **options))

  patch.setattr(module, 'make_step', patched)


def contents(folder):
  """Reads all files, {path: bytes}; of events, which hold times, only paths."""
  return {str(path.relative_to(folder)):
          b'' if 'tfevents' in path.name else path.read_bytes()
          for path in sorted(folder.rglob('*')) if path.is_file()}


def times(folder):
  return {str(path): path.stat().st_mtime_ns
          for path in sorted(folder.rglob('*')) if path.is_file()}


def teacher(workdir):
  """Reads the tensors of the teacher's file."""
  with safetensors.safe_open(
      workdir / 'pretrain/model.safetensors', 'np') as opened:
    return {key: opened.get_tensor(key) for key in opened.keys()}


def final_parameters(config, workdir):
  """Reads all arrays of the fine-tuned model."""
  experiment = experiment_lib.load(config, str(workdir))
  spec = train.calibrated_spec(experiment, str(workdir))
  deployed, spec = train.fit(experiment, spec, str(workdir))
  return jax.tree.leaves((
      deployed.arrays, deployed.choices,
      [(layer.weight, layer.act) for layer in spec.layers.values()]))


def assert_same_run(config, workdir, reference):
  """Checks that teacher, result and records of two runs agree bit for bit."""
  for name in ('metrics.jsonl', 'pretrain/metrics.jsonl', 'quant_spec.json',
               'router.json'):
    assert ((workdir / name).read_bytes()
            == (reference / name).read_bytes()), name
  expected = teacher(reference)
  found = teacher(workdir)
  assert found.keys() == expected.keys()
  for key, value in expected.items():
    np.testing.assert_array_equal(found[key], value, key)
  for a, b in zip(final_parameters(config, workdir),
                  final_parameters(config, reference), strict=True):
    np.testing.assert_array_equal(a, b)
