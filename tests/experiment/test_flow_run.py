"""A teacher of flow matching: trained, quantized, tuned, packed and drawn."""

import json

import numpy as np
import pytest
import runs

import msfp_jax as msfp
from msfp_jax import convert
from msfp_jax import diffusion
from msfp_jax.run import evaluate
from msfp_jax.run import train


@pytest.mark.long
def test_a_flow_from_end_to_end(tmp_path, npz):
  config = runs.config_of(npz, {
      'schedule.name': 'flow', 'sampler.shift': 2.0,
      'sampler.num_steps': 3, 'pretrain.times': 'logit_normal',
      'eval.rows': ('fp', 'tuned', 'packed'), 'eval.report': True})
  train.run(config, str(tmp_path))
  found = evaluate.run(config, str(tmp_path))
  assert (found['sampler'], found['shift']) == ('flow', 2.0)
  rows = {row['name']: row for row in found['rows']}
  assert 'both predict the velocity' in (tmp_path / 'report.html').read_text()
  # Not quite the same bits, as packed products round otherwise, nor others.
  assert rows['packed']['psnr_to_fp'] == pytest.approx(
      rows['tuned']['psnr_to_fp'], rel=0.02)
  # Levels 1, 2/3, 1/3 by hand: odds of 2 and 1/2, doubled.
  levels = np.array([1, 4 / 5, 1 / 2])
  plan = msfp.load(f'{tmp_path}/packed.safetensors').plan
  np.testing.assert_allclose(plan.timesteps, 1000 * levels, rtol=1e-12)
  router = json.loads((tmp_path / 'router.json').read_text())
  np.testing.assert_allclose(router['timesteps'], 1000 * levels, rtol=1e-12)
  # What is trained here says by itself how it is sampled from.
  origin = convert.load_origin(f'{tmp_path}/pretrain/model.safetensors')
  assert origin.schedule == {'name': 'flow', 'num_train_steps': 1000}
  assert msfp.load_plan(
      f'{tmp_path}/pretrain/model.safetensors', num_steps=4).to_dict() == (
          diffusion.flow_plan(
              4, schedule=diffusion.FlowSchedule(1000)).to_dict())
