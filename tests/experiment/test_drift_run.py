"""The correction of drift in train.py and eval.py."""

import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest
import runs
import safetensors.numpy
import toy

from msfp_jax.packed import drift as drift_lib
from msfp_jax.packed import file as packed_file
from msfp_jax.run import evaluate
from msfp_jax.run import train


@pytest.mark.long
@pytest.mark.parametrize('updates', [0, 2])
def test_rows_are_corrected_and_the_file_is_what_is_measured(
    tmp_path, npz, updates):
  """By train.py alone: 'tuned' and 'packed' are what it left."""
  row = 'tuned' if updates else 'msfp'
  config = runs.config_of(npz, {
      'pretrained': 'random', 'model.image_size': 8,
      'model.in_channels': 1, 'model.out_channels': 1,
      'finetune.num_updates': updates, 'finetune.save_every': 2,
      'quant.drift_images': 3, 'eval.rows': ('fp', row, 'packed')})
  train.run(config, str(tmp_path))
  with mock.patch.object(drift_lib, 'correct_drift', wraps=(
      drift_lib.correct_drift)) as measured:
    results = evaluate.run(config, str(tmp_path))
  assert measured.call_count == (0 if updates else 1)
  rows = {row['name']: row for row in results['rows']}
  for name in ('psnr_to_fp', 'bytes'):
    assert rows[row][name] == rows['packed'][name]
  drift = safetensors.numpy.load_file(
      tmp_path / 'packed.safetensors')['drift']
  assert drift.shape == (2, 1) and np.abs(drift).min() > 0
  # The images differ from those of the same model without it.
  plain = dataclasses.replace(
      packed_file.load(tmp_path / 'packed.safetensors'), drift=None)
  noise = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
  corrected = dataclasses.replace(plain, drift=drift)
  assert np.abs(corrected.sample(noise) - plain.sample(noise)).max() > 1e-4


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
