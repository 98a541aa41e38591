"""docs/usage.md from a prompt to a picture, on a small pipeline."""

import dataclasses
import json
import pathlib
import re
import sys

import checkpoints
import families
import flux_oracle
import foreign
import hub_cache
import numpy as np
from PIL import Image
import pytest
from test_encode import write_pipeline

import msfp_jax as msfp

USAGE = pathlib.Path(__file__).parents[1] / 'docs/usage.md'
# As wide as the encoders' vectors and the first stage's latents are.
CONFIG = dataclasses.replace(
    flux_oracle.TINY, in_channels=16, out_channels=16, num_layers=1,
    num_single_layers=1, text_dim=24, pooled_dim=24)
STAGE = families.STAGES['kl, shift']


@pytest.fixture
def pipeline(tmp_path):
  """A folder of diffusers with all that FLUX takes, small and at random."""
  folder = tmp_path / 'FLUX.1-schnell'
  write_pipeline(folder)
  flux_oracle.save_folder(
      folder / 'transformer', flux_oracle.state_of(CONFIG), CONFIG, shards=2)
  (folder / 'scheduler').mkdir()
  (folder / 'scheduler/scheduler_config.json').write_text(json.dumps({
      '_class_name': 'FlowMatchEulerDiscreteScheduler', 'shift': 1.0,
      'use_dynamic_shifting': False}))
  (folder / 'vae').mkdir()
  checkpoints.write(
      folder / 'vae/diffusion_pytorch_model.safetensors',
      foreign.diffusers_first_stage(families.state_of(STAGE), STAGE))
  (folder / 'vae/config.json').write_text(json.dumps({
      '_class_name': 'AutoencoderKL', 'scaling_factor': STAGE.scale,
      'shift_factor': STAGE.shift}))
  return folder


@pytest.mark.slow
@pytest.mark.parametrize('named', ['FLUX.1-schnell', 'hf:someone/schnell'])
def test_the_documented_way(pipeline, tmp_path, monkeypatch, named):
  """What the section says to run, but for the size of the picture."""
  section = USAGE.read_text().split('## A prompt and its image')[1]
  packing = re.search(r'^    python -m msfp_jax.packed (.*)$', section, re.M)[1]
  source, target, steps = packing.split()
  assert source == pipeline.name and steps == '--num_steps=4'
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub_cache.stand_in(
      tmp_path / 'cache', {'someone/schnell': hub_cache.files_in(pipeline)}))
  msfp.pack_streamed(named, target, num_steps=4)
  assert msfp.load(target).plan.num_steps == 4
  code = re.search(r'^```python\n(.*?)^```$', section, re.M | re.S)[1]
  whole = '(1, *packed.model.sample_shape)'
  assert whole in code
  code = code.replace(whole, '(1, 4, 6, 16)').replace(source, named)
  exec(compile(code, 'usage.md', 'exec'), {})
  picture = np.asarray(Image.open('cat.png'))
  assert picture.shape == (8, 12, 3) and picture.std() > 1
