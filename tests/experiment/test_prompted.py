"""Runs of models that take a text, from a file of prompts to packed images."""

import importlib
import json
import pathlib

import numpy as np
import pytest

import msfp_jax as msfp
from msfp_jax.base import errors
from msfp_jax.run import evaluate
from msfp_jax.run import prompts as prompts_lib
from msfp_jax.run import train

CHANGES = {
    'calibrate.samples_per_layer': 256, 'eval.num_samples': 6,
    'eval.batch_size': 4, 'eval.pictures': 5, 'eval.keep': 'npz'}
# Of each: what else is changed, and the row that the packed model simulates.
RUNS = {
    'flux_schnell': ({
        'quant.recipe': 'quartz', 'finetune.num_updates': 0,
        'eval.rows': ('fp', 'quartz', 'packed'), 'eval.report': True},
                     'quartz'),
    'stable_diffusion': (
        {'finetune.num_updates': 4, 'finetune.save_every': 4}, 'tuned')}
LINES = [{'prompt': 'a <cat>', 'seed': 3}, {'prompt': 'a dog'},
         {'prompt': 'a <cat>', 'seed': 3, 'negative_prompt': ''}]


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::msfp_jax.metrics.frechet.FewSamplesWarning')
@pytest.mark.parametrize('name', RUNS)
def test_a_run_from_end_to_end(tmp_path, name):
  file = tmp_path / 'p.jsonl'
  file.write_text('\n'.join(map(json.dumps, LINES)))
  config = importlib.import_module(f'configs.{name}').get_config('smoke')
  changes, simulated = RUNS[name]
  config.update_from_flattened_dict(
      CHANGES | changes | {'prompts': str(file)})
  workdir = tmp_path / 'w'
  train.run(config, str(workdir))
  found = evaluate.run(config, str(workdir))
  rows = {row['name']: row for row in found['rows']}
  # Not quite the same bits, as packed products round otherwise.
  assert rows['packed']['psnr_to_fp'] == pytest.approx(
      rows[simulated]['psnr_to_fp'], rel=0.02)
  assert rows['packed'].keys() >= {
      'fd_random_to_fp', 'psnr_to_fp', 'ssim_to_fp'}
  texts = ['a <cat>', 'a dog', 'a <cat>', 'a <cat>', 'a dog']
  assert found['prompts'] == texts and found['num_prompts'] == 3
  if config.eval.report:
    html = (workdir / 'report.html').read_text()
    assert html.count('<li>a &lt;cat&gt;</li>') >= 2
  # Image 2 has the prompt and the seed of image 0; image 3 is a next round.
  with np.load(workdir / 'samples' / 'fp.npz') as held:
    images, = held.values()
  # Of equal inputs, but places of a batch may round differently.
  apart = lambda i, j: np.abs(images[i].astype(int) - images[j]).mean()
  assert apart(0, 2) < 0.1 < apart(0, 3)
  _check_in_python(workdir, file, config, name)
  file.write_text(file.read_text().replace('dog', 'cow'))
  for run in (train.run, evaluate.run):
    with pytest.raises(errors.WorkdirError, match='taken.prompts'):
      run(config, str(workdir))


def _check_in_python(workdir: pathlib.Path, file, config, name):
  """The packed file samples from the same conditions without a run."""
  packed = msfp.load(str(workdir / 'packed.safetensors'))
  names = [part.name for part in packed.model.conditions]
  assert names == (['text', 'pooled'] if name == 'flux_schnell'
                   else ['context', 'negative_context'])
  inner = packed.model if name == 'flux_schnell' else packed.model.inner
  _, prompts = prompts_lib.load(inner, config)
  seeds, rounds, conditions = prompts.batch(0, 2)
  shape = packed.model.sample_shape
  found = packed.sample(prompts_lib.noise(seeds, rounds, shape), *conditions)
  assert found.shape == (2, *shape) and np.isfinite(found).all()
