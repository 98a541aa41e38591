"""Runs on a folder of images, which is streamed."""

import json
import threading

import numpy as np
from PIL import Image
import pytest
import runs

from msfp_jax.run import evaluate
from msfp_jax.run import train
from msfp_jax.tune import checkpoint
from msfp_jax.tune import pretrain

ONLY_TEACHER = {'stage': 'pretrain'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder of 20 images, fewer than six batches of eight take."""
  path = tmp_path_factory.mktemp('folder')
  for i, image in enumerate(runs.smooth(20, 8, 8, 3)):
    Image.fromarray(image).save(path / f'{i:02d}.png')
  return path


@pytest.fixture(scope='module')
def reference(tmp_path_factory, folder):
  """The workdir of an uninterrupted pre-training."""
  workdir = tmp_path_factory.mktemp('reference')
  train.run(runs.config_of(folder, ONLY_TEACHER), str(workdir))
  return workdir


def no_reader():
  return not [thread for thread in threading.enumerate()
              if thread.name.startswith('read_ahead')]


@pytest.mark.long
def test_interrupted_is_uninterrupted(
    tmp_path, folder, reference, monkeypatch):
  config = runs.config_of(folder, ONLY_TEACHER)
  with monkeypatch.context() as patch:
    runs.interrupt(patch, pretrain, 3)
    with pytest.raises(checkpoint.Preempted):
      train.run(config, str(tmp_path))
  assert no_reader()
  assert (tmp_path / 'pretrain/checkpoints/3').is_dir()
  train.run(config, str(tmp_path))
  assert no_reader()
  name = 'pretrain/metrics.jsonl'
  assert (tmp_path / name).read_bytes() == (reference / name).read_bytes()
  expected, found = runs.teacher(reference), runs.teacher(tmp_path)
  assert found.keys() == expected.keys()
  for key, value in expected.items():
    np.testing.assert_array_equal(found[key], value, key)


@pytest.mark.slow
def test_an_epoch_shows_every_image_once(tmp_path, folder, monkeypatch):
  """Five steps of eight are two epochs of twenty."""
  seen = []
  original = pretrain.stream.batches

  def recorded(*args):
    for batch in original(*args):
      seen.extend(batch)
      yield batch

  monkeypatch.setattr(pretrain.stream, 'batches', recorded)
  train.run(runs.config_of(
      folder, ONLY_TEACHER | {'pretrain.num_steps': 5}), str(tmp_path))
  assert len(seen) == 40
  for epoch in (seen[:20], seen[20:]):
    assert len({image.tobytes() for image in epoch}) == 20


@pytest.mark.slow
def test_a_damaged_image_stops_the_run_by_name(tmp_path, folder):
  images = tmp_path / 'images'
  images.mkdir()
  for path in folder.iterdir():
    (images / path.name).write_bytes(path.read_bytes())
  (images / '07.png').write_bytes(b'nothing')
  with pytest.raises(ValueError, match='07.png is no readable image'):
    train.run(runs.config_of(images, ONLY_TEACHER), str(tmp_path / 'run'))
  assert no_reader()


@pytest.mark.slow
def test_evaluation_of_a_folder(folder, reference):
  config = runs.config_of(folder, {
      'pretrained': str(reference / 'pretrain/model.safetensors'),
      'eval.rows': ('fp',), 'eval.num_samples': 20, 'eval.pictures': 4})
  with pytest.warns(match='covariance is singular'):
    evaluate.run(config, str(reference.parent / 'evaluated'))
  workdir = reference.parent / 'evaluated'
  row, = json.loads((workdir / 'results.json').read_text())['rows']
  assert np.isfinite(row['fd_random'])
  with Image.open(workdir / 'samples/methods.png') as picture:
    pixels = np.asarray(picture)
  with Image.open(folder / '00.png') as image:
    first = np.asarray(image).repeat(6, axis=0).repeat(6, axis=1)
  left = pixels.shape[1] - 4 * 50
  np.testing.assert_array_equal(pixels[:48, left:left + 48], first)
