"""The files that train.py and eval.py leave in a workdir."""

import json

import numpy as np
from PIL import Image
import pytest
import runs
import safetensors

from msfp_jax import convert
from msfp_jax import data
from msfp_jax.run import evaluate
from msfp_jax.run import experiment as experiment_lib
from msfp_jax.run import train
from msfp_jax.tune import finetune
from msfp_jax.tune import pretrain

# What the rows share.
HEAD = ['dataset', 'num_samples', 'sampler', 'steps', 'eta', 'spacing',
        'convention', 'guidance', 'seed', 'features', 'exceptions',
        'image_shape', 'reference', 'rows']


def test_what_a_workdir_holds(trained):
  for name in ('config.json', 'quant_spec.json', 'metrics.jsonl',
               'router.json', 'packed.safetensors', 'results.json',
               'samples/methods.png',
               'pretrain/model.safetensors', 'pretrain/metrics.jsonl',
               'pretrain/samples/step_000006.png'):
    assert (trained / name).is_file(), name
  for name in ('checkpoints', 'pretrain/checkpoints'):
    assert sorted(p.name for p in (trained / name).iterdir()) == ['4', '6']
  for name in ('tensorboard', 'pretrain/tensorboard'):
    assert list((trained / name).glob('events.out.tfevents.*'))
  assert not [
      name for name in runs.contents(trained) if name.endswith('.tmp')]


@pytest.mark.parametrize('name, scalars', [
    ('pretrain/metrics.jsonl', {'pretrain/loss', 'pretrain/l2_grads'}),
    ('metrics.jsonl', {'finetune/loss', 'finetune/mse', 'finetune/t',
                       'finetune/bank_0', 'finetune/bank_1'})])
def test_every_step_has_its_line_of_metrics(trained, name, scalars):
  with open(trained / name, encoding='utf-8') as file:
    lines = [json.loads(line) for line in file]
  assert [line['step'] for line in lines] == [1, 2, 3, 4, 5, 6]
  for line in lines:
    assert scalars <= line.keys()
    assert all(np.isfinite(value) for value in line.values())


def test_the_router_has_a_bank_for_every_layer_and_step(trained):
  router = json.loads((trained / 'router.json').read_text())
  assert router['timesteps'] == [500, 0]
  assert router['banks']
  for banks in router['banks'].values():
    assert len(banks) == 2 and set(banks) <= {0, 1}


def test_the_schema_of_the_results(trained, npz):
  results = json.loads((trained / 'results.json').read_text())
  assert list(results) == HEAD
  rows, reference = results.pop('rows'), results.pop('reference')
  assert reference.keys() == {'dataset', 'num_samples', 'images_sha256'}
  assert results == {
      'dataset': npz, 'num_samples': 160, 'sampler': 'ddim', 'steps': 2,
      'eta': 0, 'spacing': 'uniform', 'convention': 'ddim', 'guidance': 1,
      'seed': 0, 'features': 'random', 'exceptions': 'ends-8',
      'image_shape': [8, 8, 1]}
  common = {'name', 'weight_bits', 'act_bits', 'fd_random', 'bytes',
            'bits_per_weight', 'bits_per_act'}
  assert [row['name'] for row in rows] == ['fp', 'msfp', 'tuned']
  assert [(row['weight_bits'], row['act_bits']) for row in rows] == [
      (32, 32), (4, 4), (4, 4)]
  assert rows[0].keys() == common
  for row in rows[1:]:
    assert row.keys() == common | {'fd_random_to_fp', 'psnr_to_fp'}
  for row in rows:
    numbers = [value for key, value in row.items() if key != 'name']
    assert all(np.isfinite(value) and value > 0 for value in numbers)
  size = {row['name']: row['bytes'] for row in rows}
  assert size['msfp'] < size['tuned'] < size['fp']
  assert size['fp'] == 4 * sum(v.size for v in runs.teacher(trained).values())


def better(rows):
  """Whether 'tuned' is closer to full precision than 'msfp', by both measures.

  Image by image, and as a distribution.
  """
  rows = {row['name']: row for row in rows}
  msfp, tuned = rows['msfp'], rows['tuned']
  return (tuned['psnr_to_fp'] > msfp['psnr_to_fp']
          and tuned['fd_random_to_fp'] < msfp['fd_random_to_fp'])


def test_a_tuned_model_is_better_than_an_untuned_one(trained):
  """Six updates are few, and enough for that."""
  assert better(json.loads((trained / 'results.json').read_text())['rows'])


@pytest.mark.long
def test_more_updates_make_it_better_still(tmp_path, trained, npz):
  config = runs.config_of(npz, {
      'seed': 1, 'finetune.num_updates': 200, 'finetune.save_every': 200,
      'pretrained': str(trained / 'pretrain/model.safetensors')})
  train.run(config, str(tmp_path))
  rows = evaluate.run(config, str(tmp_path))['rows']
  assert better(rows)
  found = {row['name']: row['psnr_to_fp'] for row in rows[1:]}
  assert found['tuned'] > found['msfp'] + 0.4


def test_the_picture_has_a_row_per_method(trained):
  with Image.open(trained / 'samples/methods.png') as picture:
    pixels = np.asarray(picture.convert('RGB'))
  rows, side, gap = 4, 48, 2  # data, fp, msfp, tuned
  assert pixels.shape[0] == rows * (side + gap)
  assert pixels.shape[1] > 16 * (side + gap)
  for i in range(rows):
    assert pixels[i * (side + gap):][:side, -side:].std() > 0


def test_the_same_command_again_changes_and_trains_nothing(
    copy, npz, monkeypatch):
  before, stamps = runs.contents(copy), runs.times(copy / 'checkpoints')

  def never(*unused, **unused_too):
    def step(state):
      raise AssertionError('a step of a finished run')
    return step

  monkeypatch.setattr(pretrain, 'make_step', never)
  monkeypatch.setattr(finetune, 'make_step', never)
  train.run(runs.config_of(npz), str(copy))
  assert runs.contents(copy) == before
  assert runs.times(copy / 'checkpoints') == stamps


@pytest.mark.slow
def test_eval_again_gives_identical_results(copy, npz):
  before = runs.contents(copy)
  returned = evaluate.run(runs.config_of(npz), str(copy))
  assert runs.contents(copy) == before
  assert returned == json.loads(before['results.json'])


@pytest.mark.slow
def test_a_row_does_not_depend_on_the_others(copy, npz):
  """Full precision comes first, asked for or not."""
  rows = json.loads((copy / 'results.json').read_text())['rows']
  results = evaluate.run(
      runs.config_of(npz, {'eval.rows': ('tuned',)}), str(copy))
  assert results['rows'] == [rows[0], rows[2]]


def test_images_of_the_size_of_the_data(trained):
  model, _ = convert.load_pretrained(
      str(trained / 'pretrain/model.safetensors'))
  assert (model.config.image_size, model.config.in_channels) == (8, 1)
  with Image.open(trained / 'pretrain/samples/step_000006.png') as picture:
    assert picture.size == (16 * 8, 4 * 8)  # 64 samples


def test_only_the_teacher(tmp_path, npz):
  """stage=pretrain ends there, and its file starts another run."""
  config = runs.config_of(npz, {'stage': 'pretrain'})
  train.run(config, str(tmp_path), 'the command')
  assert not (tmp_path / 'quant_spec.json').exists()
  path = tmp_path / 'pretrain/model.safetensors'
  with safetensors.safe_open(path, 'np') as opened:
    assert opened.metadata()['command'] == 'the command'
  loaded = experiment_lib.load(
      runs.config_of(npz, {'pretrained': str(path)}), str(tmp_path / 'other'))
  np.testing.assert_array_equal(loaded.images, data.load('images', npz))
