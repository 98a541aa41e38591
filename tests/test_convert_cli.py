"""python -m msfp_jax.convert SRC DST."""

import pathlib
import subprocess
import sys

import checkpoints
import families
import jax
import numpy as np
import pytest
import unet_oracle

from msfp_jax import convert


def run(*args):
  return subprocess.run(
      [sys.executable, '-m', 'msfp_jax.convert', *map(str, args)],
      cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True,
      check=False)


@pytest.mark.slow
def test_ours_from_another_family(tmp_path):
  config, state = families.CONFIGS['ldm_beds'], checkpoints.state_of('ldm_beds')
  checkpoints.save_ldm(tmp_path / 'model.ckpt', state, config)
  done = run(tmp_path / 'model.ckpt', tmp_path / 'ours.safetensors')
  assert done.returncode == 0, done.stderr
  # An overview by clu, the bytes of float32 in its last line.
  count = sum(value.size for value in state.values())
  assert f'Total: {count:,} -- {4 * count:,} bytes' in done.stderr
  model, params = convert.load_pretrained(str(tmp_path / 'ours.safetensors'))
  assert model.config == config
  jax.tree.map(np.testing.assert_array_equal, params,
               unet_oracle.from_state_dict(config, state))
  done = run('--noema', tmp_path / 'model.ckpt', tmp_path / 'raw.safetensors')
  _, raw = convert.load_pretrained(str(tmp_path / 'raw.safetensors'))
  jax.tree.map(np.testing.assert_array_equal, raw,
               unet_oracle.from_state_dict(
                   config, {n: v + 1 for n, v in state.items()}))


@pytest.mark.slow
def test_what_does_not_load_writes_nothing(tmp_path):
  state = checkpoints.state_of('ddim')
  del state['conv_in.bias'], state['mid.attn_1.q.weight']
  source = checkpoints.write(tmp_path / 'a.safetensors', state)
  done = run(source, tmp_path / 'out' / 'ours.safetensors')
  assert done.returncode == 1
  assert 'missing conv_in.bias' in done.stderr
  assert 'missing mid.attn_1.q.weight' in done.stderr
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'out').exists()
  assert run(source).returncode == 1
