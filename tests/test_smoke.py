"""The `:smoke` variant of every model family runs the whole path."""

import importlib
import json

import pytest

from msfp_jax.run import evaluate
from msfp_jax.run import train

pytestmark = pytest.mark.slow

FAMILIES = ('cifar10', 'celeba64', 'lsun_bedroom', 'lsun_church', 'imagenet256')


@pytest.mark.parametrize('name', FAMILIES)
def test_train_then_eval(tmp_path, name):
  config = importlib.import_module(f'configs.{name}').get_config('smoke')
  config.eval.rows = (*config.eval.rows, 'packed')
  train.run(config, str(tmp_path / 'run'))
  evaluate.run(config, str(tmp_path / 'run'))
  results = json.loads((tmp_path / 'run/results.json').read_text())
  rows = {row['name']: row for row in results['rows']}
  assert rows.keys() == {'fp', 'tuned', 'packed'}
  assert rows['tuned']['bytes'] < rows['fp']['bytes']
  assert rows['tuned']['psnr_to_fp'] > 0
  assert abs(rows['packed']['psnr_to_fp'] - rows['tuned']['psnr_to_fp']) < 0.2
  assert (tmp_path / 'run/samples/methods.png').is_file()
