"""Stopped evaluations end as uninterrupted ones do; samples and references."""

import collections
import json
import os
import shutil

import lpips_oracle
import numpy as np
from PIL import Image
import pytest
import runs
from safetensors.numpy import save_file

from msfp_jax.base import files
from msfp_jax.metrics import results as results_lib
from msfp_jax.metrics import squeezenet as squeezenet_lib
from msfp_jax.run import evaluate
from msfp_jax.run import references as make_stats
from msfp_jax.run import sample_store

# Batches of 64, 64 and 32 images in three rows.
NUM_BATCHES = 9


class Stopped(BaseException):
  """Ends an evaluation as a kill does: no handler of errors catches it."""


def stop_after(patch, count):
  """Stops an evaluation after the `count`-th file is written."""
  write, left = files.os.replace, [count]

  def replace(*args):
    if not left[0]:
      raise Stopped
    left[0] -= 1
    write(*args)

  patch.setattr(files.os, 'replace', replace)


@pytest.fixture
def drawn(monkeypatch):
  """Counts how often each batch of each row is stored."""
  counts, write = collections.Counter(), sample_store.SampleStore.write

  def counted(self, number, images):
    write(self, number, images)
    counts[self.folder.name, number] += 1

  monkeypatch.setattr(sample_store.SampleStore, 'write', counted)
  return counts


def evaluate_in_pieces(config, workdir, each):
  """Evaluates with a stop after `each` files; returns how many stops."""
  stops = 0
  while True:
    with pytest.MonkeyPatch.context() as patch:
      stop_after(patch, each)
      try:
        evaluate.run(config, str(workdir))
        return stops
      except Stopped:
        stops += 1


@pytest.mark.long
def test_interrupted_is_uninterrupted(copy, npz, drawn):
  """No batch is drawn twice, and none is lost."""
  before = runs.contents(copy)
  (copy / 'results.json').unlink()
  (copy / 'samples/methods.png').unlink()
  assert evaluate_in_pieces(runs.config_of(npz), copy, 4) >= 3
  assert runs.contents(copy) == before
  assert len(drawn) == NUM_BATCHES and set(drawn.values()) == {1}


@pytest.mark.slow
def test_a_batch_that_was_cut_is_drawn_again(copy, npz, drawn):
  before = runs.contents(copy)
  with pytest.MonkeyPatch.context() as patch:
    stop_after(patch, 6)
    with pytest.raises(Stopped):
      evaluate.run(runs.config_of(npz), str(copy))
  cut = copy / 'eval/fp/000001.uint8'
  os.truncate(cut, cut.stat().st_size // 2)
  evaluate.run(runs.config_of(npz), str(copy))
  assert runs.contents(copy) == before
  assert drawn.pop(('fp', 1)) == 2 and set(drawn.values()) == {1}


@pytest.fixture
def stopped(copy, npz, drawn):
  """A workdir whose second row was finished and whose third was begun."""
  with pytest.MonkeyPatch.context() as patch:
    stop_after(patch, 11)
    with pytest.raises(Stopped):
      evaluate.run(runs.config_of(npz), str(copy))
  assert (copy / 'eval/msfp.row.json').is_file()
  drawn.clear()
  return copy


@pytest.mark.long
def test_another_batch_size_starts_anew(stopped, npz, drawn):
  evaluate.run(runs.config_of(npz, {
      'eval.rows': ('fp',), 'eval.batch_size': 80}), str(stopped))
  assert drawn == {('fp', 0): 1, ('fp', 1): 1}
  assert not (stopped / 'eval').exists()


@pytest.mark.long
def test_other_measurements_keep_the_samples(stopped, npz, drawn):
  """Only what the finished row no longer needed is drawn again."""
  changes = {'eval.pictures': 100, 'eval.keep': 'npz', 'eval.vectors': 50,
             'eval.rows': ('fp', 'msfp')}
  found = evaluate.run(runs.config_of(npz, changes), str(stopped))
  assert drawn == {('msfp', 1): 1, ('msfp', 2): 1}
  assert found == evaluate.run(runs.config_of(npz, changes), str(stopped))
  assert (stopped / 'samples/msfp.npz').is_file()


@pytest.fixture
def squeezenet(tmp_path):
  """A file of another feature network, with weights that mean nothing."""
  path = tmp_path / 'squeezenet.npz'
  rng = np.random.RandomState(0)
  np.savez(path, **{name: part for layer, shape in
                    squeezenet_lib.shapes().items() for name, part in (
      (f'{layer}/w', np.float32(rng.standard_normal(shape)
                                / np.sqrt(np.prod(shape[:3])))),
      (f'{layer}/b', np.zeros(shape[-1], np.float32)))})
  return path


def test_each_measurement_alone_is_part_of_the_claim(
    copy, npz, monkeypatch, squeezenet):
  """Rows that an evaluation without it had finished are measured anew."""
  claims = set()

  def claim(folder, samples, scores):
    del folder, samples
    claims.add(json.dumps(scores, default=str))
    raise Stopped

  monkeypatch.setattr(evaluate.sample_store, 'claim', claim)
  alone = ({}, {'eval.pictures': 100}, {'eval.keep': 'npz'},
           {'eval.vectors': 50}, {'eval.layer_images': 2},
           {'eval.sensitivity_images': 2},
           {'eval.more_features': (f'squeezenet:{squeezenet}',)},
           {'eval.timing': True})
  for changes in alone:
    with pytest.raises(Stopped):
      evaluate.run(runs.config_of(npz, changes), str(copy))
  assert len(claims) == len(alone)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    'ignore::msfp_jax.metrics.frechet.FewSamplesWarning')
def test_statistics_of_other_data_are_measured_anew_by_every_network(
    copy, tmp_path, npz, monkeypatch, squeezenet):
  """Stopped once they were measured; then the data are others."""
  monkeypatch.setattr(evaluate, '_evaluate_row', stop)
  other = tmp_path / 'other.npz'
  np.savez(other, runs.smooth(60, 8, 8, 1, seed=9))
  changes = {'eval.more_features': (f'squeezenet:{squeezenet}',)}
  folder, found = copy / 'eval', []
  for data in (npz, npz, str(other)):
    config = runs.config_of(npz, changes)
    config.data.path = data
    config.to_dict()
    monkeypatch.setattr(evaluate.workdir_lib, 'prepare', lambda *_, **__: None)
    monkeypatch.setattr(evaluate.workdir_lib, 'check', lambda *_, **__: None)
    with pytest.raises(Stopped):
      evaluate.run(config, str(copy))
    found.append({path.name: path.read_bytes()
                  for path in folder.glob('reference*.npz')})
  first, again, of_others = found
  assert len(first) == 2 and again == first
  assert of_others.keys() == first.keys()
  assert all(of_others[name] != first[name] for name in first)


def stop(*unused):
  raise Stopped


def test_what_is_refused_deletes_no_samples(
    stopped, npz, tmp_path, squeezenet):
  before = runs.contents(stopped / 'eval')
  np.savez(tmp_path / 'other.npz', mu=np.zeros(3), sigma=np.eye(3))
  weights = tmp_path / 'alex.safetensors'
  save_file(lpips_oracle.random_state('alex'), weights)
  for changes, part in (
      ({'eval.reference': 'nowhere.npz'}, 'nowhere.npz'),
      ({'eval.reference': str(tmp_path / 'other.npz')}, '3 features there'),
      ({'eval.features': 'nope'}, "'nope'"),
      ({'eval.more_features': (f'squeezenet:{squeezenet}',),
        'eval.more_references': (str(tmp_path / 'other.npz'),)},
       '3 features there'),
      ({'eval.vectors': 3}, 'config.eval.vectors=3: must be 0 or at least 4'),
      ({'eval.vectors': -1}, 'config.eval.vectors=-1'),
      ({'eval.pictures': 0}, 'config.eval.pictures=0'),
      ({'eval.layer_images': -1}, 'config.eval.layer_images=-1: must be'),
      ({'eval.keep': 'jpg'}, "keep='jpg'.*npz.*png"),
      ({'eval.lpips': f'alex:{weights}'}, 'at least 31 x 31'),
      ({'eval.rows': ('fp', 'msfp', 'msfp')}, 'msfp.*more than once'),
      ({'eval.rows': ('msfp:',)}, "bits ''")):
    with pytest.raises((ValueError, OSError), match=part):
      evaluate.run(runs.config_of(npz, changes), str(stopped))
  assert runs.contents(stopped / 'eval') == before


@pytest.mark.long
def test_stopped_while_it_cleans_up(copy, npz):
  before = runs.contents(copy)

  def rmtree(folder, **unused):
    if folder.exists():
      (folder / 'msfp/000000.uint8').unlink()
      raise Stopped

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sample_store.shutil, 'rmtree', rmtree)
    with pytest.raises(Stopped):
      evaluate.run(runs.config_of(npz), str(copy))
  evaluate.run(runs.config_of(npz), str(copy))
  assert runs.contents(copy) == before


def test_a_collapsed_row_is_named(copy, npz):
  """A row whose images are all alike has no distance; the error names it."""
  write = sample_store.SampleStore.write
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sample_store.SampleStore, 'write',
                  lambda self, number, images: write(
                      self, number, 0 * images))
    with pytest.raises(ValueError, match="row 'fp': all samples of the first"):
      evaluate.run(runs.config_of(npz), str(copy))


def test_samples_are_kept_when_asked_for(copy, npz):
  config = runs.config_of(npz, {'eval.rows': ('fp',), 'eval.keep': 'npz'})
  evaluate.run(config, str(copy))
  with np.load(copy / 'samples/fp.npz') as arrays:
    assert arrays.files == ['arr_0']
    images = arrays['arr_0']
  assert images.shape == (160, 8, 8, 1) and images.dtype == np.uint8
  config.eval.keep = 'png'
  evaluate.run(config, str(copy))
  for i in (0, 64, 159):
    with Image.open(copy / f'samples/fp/{i:06d}.png') as picture:
      np.testing.assert_array_equal(np.asarray(picture), images[i, ..., 0])
  assert len(os.listdir(copy / 'samples/fp')) == 160


def test_a_reference_file_stands_for_the_data(copy, npz, tmp_path):
  """Made of the same images, it gives the same distances without them."""
  path = tmp_path / 'reference.npz'
  line = make_stats.run(npz, str(path), 'random', num_vectors=100)
  assert '200 images' in line
  changes = {'eval.rows': ('fp',), 'eval.vectors': 100}
  of_data = evaluate.run(runs.config_of(npz, changes), str(copy))
  config = json.loads((copy / 'config.json').read_text())
  other = tmp_path / 'other'
  shutil.copytree(copy, other)
  config['data'] = {'name': '', 'path': ''}
  (other / 'config.json').write_text(json.dumps(config))
  found = evaluate.run(runs.config_of('', changes | {
      'data.name': '', 'eval.reference': str(path)}), str(other))
  assert found['rows'] == of_data['rows']
  assert found['rows'][0].keys() > {
      'kd_random', 'precision_random', 'recall_random'}
  reference = found['reference']
  assert reference['file'] == 'reference.npz'
  assert reference['images_sha256'] == of_data['reference']['images_sha256']
  assert len(reference['file_sha256']) == 64


def test_neither_data_nor_reference(copy, npz):
  config = json.loads((copy / 'config.json').read_text())
  config['data'] = {'name': '', 'path': ''}
  (copy / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match='eval.reference.*data.name'):
    evaluate.run(runs.config_of('', {'data.name': ''}), str(copy))


@pytest.mark.slow
def test_layers_and_seconds_where_they_are_asked_for(copy, npz):
  found = evaluate.run(runs.config_of(npz, {
      'eval.rows': ('fp', 'packed'), 'eval.layer_images': 2,
      'eval.sensitivity_images': 2, 'eval.report': True,
      'eval.timing': True}), str(copy))
  full, packed = found['rows']
  assert full['seconds'] > 0 and packed['seconds_packed'] > 0
  assert not {'sqnr', 'sensitivity', 'sqnr_mean', 'sqnr_min',
              'seconds_packed'} & full.keys()
  assert 'seconds' not in packed
  assert full['bits_per_weight'] == full['bits_per_act'] == 32
  # 4 and 8 bits, two banks of weights.
  assert 4 < packed['bits_per_act'] < 8 < packed['bits_per_weight'] < 16
  output = packed['sqnr']['output']
  spec = json.loads((copy / 'quant_spec.json').read_text())
  assert set(output) == {row['layer'] for row in spec['layers']}
  assert packed['sqnr_min'] == min(output.values())
  assert set(packed['sensitivity']['layers']) == set(output)
  assert 'What each layer and step costs' in (
      copy / 'report.html').read_text()
  # Eight bits in, and four of the body out.
  assert output['conv_in'] > packed['sqnr_mean'] > packed['sqnr_min'] > 5


@pytest.mark.long
@pytest.mark.filterwarnings('ignore::msfp_jax.metrics.frechet.FewSamplesWarning')
def test_distances_on_two_networks_stand_in_one_row(copy, npz, squeezenet):
  """Each is what an evaluation on that network alone finds."""
  more = f'squeezenet:{squeezenet}'
  rows = ('fp', 'int')
  both = evaluate.run(runs.config_of(npz, {
      'eval.rows': rows, 'eval.more_features': (more,),
      'eval.report': True}), str(copy))
  alone = evaluate.run(runs.config_of(npz, {
      'eval.rows': rows, 'eval.features': more}), str(copy))
  names = ['fd_random', 'fd_squeezenet_caffe', 'fd_random_to_fp',
           'fd_squeezenet_caffe_to_fp', 'psnr_to_fp']
  assert both['rows'][1].keys() >= set(names)
  for name in names:
    if 'random' not in name:
      assert both['rows'][1][name] == alone['rows'][1][name]
  other, = both['more_features']
  assert other['features'] == alone['features'] == 'squeezenet_caffe'
  # The report explains columns of either network.
  assert results_lib.table(both).columns['fd_squeezenet_caffe'].meaning
  assert 'fd_squeezenet_caffe_to_fp' in (copy / 'report.html').read_text()


@pytest.mark.slow
def test_the_packed_model_is_a_row(copy, npz):
  """The file that training left, beside the simulation that it equals."""
  found = evaluate.run(runs.config_of(
      npz, {'eval.rows': ('fp', 'tuned', 'packed')}), str(copy))
  _, tuned, packed = found['rows']
  metrics = {'weight_bits', 'act_bits', 'fd_random', 'fd_random_to_fp',
             'psnr_to_fp', 'bits_per_weight', 'bits_per_act'}
  assert packed.keys() == tuned.keys() == metrics | {'name', 'bytes'}
  for key in metrics:
    assert packed[key] == tuned[key], key  # to the last digit
  size = (copy / 'packed.safetensors').stat().st_size
  assert packed['bytes'] < size < packed['bytes'] + 20_000  # its header
