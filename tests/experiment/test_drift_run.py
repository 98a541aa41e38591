"""The correction of drift in train.py and eval.py."""

import json
from unittest import mock

import numpy as np
import pytest
import runs
import safetensors.numpy
import toy

from msfp_jax.packed import drift as drift_lib
from msfp_jax.run import evaluate
from msfp_jax.run import train


@pytest.mark.parametrize('updates', [
    pytest.param(0, marks=pytest.mark.long),
    pytest.param(2, marks=pytest.mark.slow)])
def test_every_row_is_corrected_and_the_file_is_what_is_measured(
    tmp_path, npz, updates):
  """'packed' is the row of what the run left; without it rows are others."""
  row = 'tuned' if updates else 'msfp'
  made = {}
  for images in (0, 3):
    config = runs.config_of(npz, {
        'pretrained': 'random', 'model.image_size': 8,
        'model.in_channels': 1, 'model.out_channels': 1,
        'finetune.num_updates': updates,
        'finetune.save_every': 2, 'quant.drift_images': images,
        'eval.rows': ('fp', row, 'packed')})
    workdir = tmp_path / str(images)
    train.run(config, str(workdir))
    # By train.py alone: 'tuned' is what it left.
    with mock.patch.object(drift_lib, 'correct_drift', wraps=(
        drift_lib.correct_drift)) as measured:
      evaluate.run(config, str(workdir))
    assert measured.call_count == (1 if images and row == 'msfp' else 0)
    rows = {row['name']: row for row in json.loads(
        (workdir / 'results.json').read_text())['rows']}
    tensors = safetensors.numpy.load_file(workdir / 'packed.safetensors')
    assert ('drift' in tensors) == bool(images)
    for name in ('psnr_to_fp', 'bytes'):
      assert rows[row][name] == rows['packed'][name]
    made[images] = rows
  drift = tensors['drift']
  assert drift.shape == (2, 1) and np.abs(drift).min() > 0
  assert made[3][row]['bytes'] == made[0][row]['bytes'] + drift.nbytes
  assert made[3][row]['psnr_to_fp'] != made[0][row]['psnr_to_fp']
  assert made[3]['fp'] == made[0]['fp']


@pytest.mark.parametrize('content', ['{', '[]', '{"drift": [[0.0]]}',
                                     '{"drift": [[0.0], [NaN]]}',
                                     '{"drift": [[0.0, 0.0], [0.0, 0.0]]}'])
def test_a_damaged_drift_is_named(tmp_path, content):
  (tmp_path / 'drift.json').write_text(content)
  with pytest.raises(ValueError, match=r'drift.json is damaged .*; delete it'):
    train._with_kept(toy.deployed(), 1, tmp_path / 'drift.json')


def test_a_number_that_is_none(tmp_path, npz):
  with pytest.raises(ValueError, match=r'config\.quant\.drift_images=-1'):
    train.run(runs.config_of(npz, {'quant.drift_images': -1}),
              str(tmp_path / 'w'))
