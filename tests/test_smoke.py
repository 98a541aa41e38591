"""The `:smoke` variants of the models of images run the whole path."""

import importlib
import json

import flax.linen as nn
import jax.numpy as jnp
import lpips_oracle
import marks
import pytest
from safetensors.numpy import save_file

from configs import cifar10
from msfp_jax.models import denoiser
from msfp_jax.models import registry
from msfp_jax.run import evaluate
from msfp_jax.run import train

# Those that stand for more: lsun_church's config is made of lsun_bedroom's.
FAMILIES = ('cifar10', 'celeba64', 'lsun_church', 'imagenet256')
# Those that are sampled from their packed file as well.
PACKED = ('cifar10', 'imagenet256')


def rows_of(config, workdir):
  """The rows of results.json, after train.py and eval.py."""
  train.run(config, str(workdir))
  evaluate.run(config, str(workdir))
  results = json.loads((workdir / 'results.json').read_text())
  return {row['name']: row for row in results['rows']}


@pytest.mark.parametrize('name', marks.slow(['cifar10'], FAMILIES))
def test_train_then_eval(tmp_path, name):
  config = importlib.import_module(f'configs.{name}').get_config('smoke')
  if name == 'cifar10':
    weights = tmp_path / 'alex.safetensors'
    save_file(lpips_oracle.random_state('alex'), weights)
    config.eval.lpips = f'alex:{weights}'
    config.model.image_size, config.data.path = 32, '3x32x32'  # as it needs
    config.quant.drift_images = 2
  if name in PACKED:
    config.eval.rows = (*config.eval.rows, 'packed')
  rows = rows_of(config, tmp_path / 'run')
  assert rows.keys() == {*config.eval.rows}
  assert rows['tuned']['bytes'] < rows['fp']['bytes']
  metrics = {row: {name: value for name, value in rows[row].items()
                   if name not in ('name', 'bytes')} for row in rows}
  assert {'psnr_to_fp', 'ssim_to_fp'} < metrics['tuned'].keys()
  if name in PACKED:
    assert metrics['packed'] == metrics['tuned']  # to the last digit
  assert (tmp_path / 'run/drift.json').is_file() == (name == 'cifar10')
  if config.eval.lpips:
    assert 0 < metrics['tuned']['lpips_alex_to_fp'] < 1
    results = json.loads((tmp_path / 'run/results.json').read_text())
    assert results['lpips'] == 'alex' and len(results['lpips_sha256']) == 64
  assert (tmp_path / 'run/samples/methods.png').is_file()


class Oblong(nn.Module):
  """No UNet: of pictures that are no square, with its own argument's name."""

  width: int

  @property
  def sample_shape(self):
    return 8, 12, 1

  @property
  def conditions(self):
    return (denoiser.Condition('kind', classes=3),)

  @nn.nowrap
  def to_dict(self):
    return {'width': self.width}

  @classmethod
  def from_dict(cls, fields):
    return cls(**fields)

  @nn.compact
  def __call__(self, x, t, kind):
    h = nn.Conv(self.width, (3, 3), name='conv_in')(x)
    time = jnp.stack([t, 1000 - t], axis=-1) / 1000
    h += nn.Dense(self.width, name='temb.dense.0')(time)[:, None, None]
    h += nn.Embed(3, self.width, name='kinds')(kind)[:, None, None]
    h = nn.Conv(self.width, (3, 3), name='mid.block_1.conv1')(nn.silu(h))
    return nn.Conv(1, (3, 3), name='conv_out')(nn.silu(h))


@pytest.mark.long
def test_another_family_is_an_entry_of_the_registry(tmp_path, monkeypatch):
  monkeypatch.setitem(registry.REGISTRY, 'oblong', Oblong)
  config = cifar10.get_config('smoke')
  with config.unlocked():
    config.model = {'family': 'oblong', 'width': 8}
  config.update_from_flattened_dict({
      'data.path': '1x8x12', 'eval.rows': ('fp', 'tuned', 'packed'),
      'eval.report': True})
  rows = rows_of(config, tmp_path / 'run')
  assert rows['tuned']['bytes'] < rows['fp']['bytes']
  assert rows['packed']['psnr_to_fp'] > 0
  assert (tmp_path / 'run/report.html').is_file()
