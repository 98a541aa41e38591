"""python -m msfp_jax.convert SRC DST."""

import pathlib
import subprocess
import sys

import checkpoints
import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unet_oracle

from msfp_jax import convert
from msfp_jax.convert import native
from msfp_jax.models import unet


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


@pytest.mark.long
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


@pytest.mark.slow
def test_half_the_bytes(tmp_path):
  """Every value is the nearest one that bfloat16 has; the rest is kept."""
  model = unet.UNet(families.CONFIGS['ddim'])
  params = model.init(jax.random.key(0), jnp.zeros((1, *model.sample_shape)),
                      jnp.zeros(1))['params']
  source, target = tmp_path / 'a.safetensors', tmp_path / 'b.safetensors'
  native.save_pretrained(source, model, params, seed='7', command='train it')
  # Which whoever writes the next file gives anew.
  metadata = {'format': native.FORMAT, 'path': 'a', 'dtype': 'b', 'seed': '7'}
  native.write_safetensors(tmp_path / 'odd.safetensors', {}, metadata)
  assert native.about_of(tmp_path / 'odd.safetensors') == {'seed': '7'}
  done = run(source, target, '--dtype=bfloat16')
  assert done.returncode == 0, done.stderr
  again, found = convert.load_pretrained(str(target))
  assert again.config == model.config
  for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(found),
                           strict=True):
    before, after = np.asarray(before), np.asarray(after)
    assert after.dtype == np.float32
    # 8 significant bits.
    np.testing.assert_allclose(after, before, rtol=2**-8)
    assert not (after.view(np.uint32) & 0xffff).any()
  assert target.stat().st_size < 0.6 * source.stat().st_size
  assert native.about_of(target) == {
      'source': str(source), 'seed': '7', 'command': 'train it'}


def test_values_that_it_does_not_hold(tmp_path):
  model = unet.UNet(families.CONFIGS['ddim'])
  params = {'conv_in': {'bias': np.float32([0, 3.4e38])}}
  target = tmp_path / 'b.safetensors'
  with pytest.raises(ValueError, match=r"not hold values of .'conv_in.bias'."):
    native.save_pretrained(target, model, params, dtype='bfloat16')
  with pytest.raises(ValueError, match="'float64': must be one of"):
    native.save_pretrained(target, model, params, dtype='float64')
  with pytest.raises(ValueError, match='float16 does not hold'):
    native.save_pretrained(target, model, params, dtype='float16')
  assert not target.exists()
  native.save_pretrained(target, model, params)
