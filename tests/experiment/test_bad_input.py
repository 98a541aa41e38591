"""Bad input stops train.py and eval.py with a message, and nothing is lost."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import runs
import safetensors

from configs import images as images_config
from msfp_jax.base import errors
from msfp_jax.convert import native
from msfp_jax.run import draws
from msfp_jax.run import evaluate
from msfp_jax.run import experiment as experiment_lib
from msfp_jax.run import train
from msfp_jax.run import workdir as workdir_lib


def test_a_workdir_of_another_config(copy, npz):
  before = runs.contents(copy)
  config = runs.config_of(npz, {'finetune.rank': 3, 'seed': 1})
  for run in (train.run, evaluate.run):
    with pytest.raises(errors.WorkdirError) as error:
      run(config, str(copy))
    message = str(error.value)
    assert str(copy) in message and 'another --workdir' in message
    assert message.splitlines()[1:] == [
        '  finetune.rank: 2 there, 3 now', '  seed: 0 there, 1 now']
  assert runs.contents(copy) == before


def test_what_is_evaluated_may_change(copy, npz):
  config = runs.config_of(npz, {'eval.num_samples': 9, 'eval.rows': ('fp',)})
  workdir_lib.prepare(config, str(copy))
  written = json.loads((copy / 'config.json').read_text())
  assert written['eval']['num_samples'] == 9


def test_how_the_work_is_cut_may_change(copy, npz):
  """To devices and to their memory; and what was not said before was so."""
  path = copy / 'config.json'
  old = json.loads(path.read_text())
  del old['finetune']['accumulate'], old['finetune']['dtype'], old['mesh']
  path.write_text(json.dumps(old))
  changes = {'finetune.accumulate': 2, 'pretrain.accumulate': 2,
             'finetune.remat': 'blocks', 'pretrain.remat': 'blocks',
             'mesh.memory': 1.0}
  workdir_lib.check(runs.config_of(npz, changes), str(copy))
  with pytest.raises(errors.WorkdirError, match="finetune.dtype: 'float32' "
                     "there, 'bfloat16' now") as error:
    workdir_lib.check(runs.config_of(
        npz, changes | {'finetune.dtype': 'bfloat16'}), str(copy))
  assert len(str(error.value).splitlines()) == 2


def test_a_corrected_config_may_use_the_workdir(tmp_path, npz):
  """A run that was refused before it made anything has claimed nothing."""
  wrong, right = runs.config_of('nowhere'), runs.config_of(npz)
  with pytest.raises(FileNotFoundError, match='nowhere.*config.data.path'):
    train.run(wrong, str(tmp_path))
  workdir_lib.prepare(right, str(tmp_path))
  (tmp_path / 'quant_spec.json').write_text('{}')
  with pytest.raises(errors.WorkdirError, match='data.path: '):
    workdir_lib.prepare(wrong, str(tmp_path))


@pytest.mark.parametrize(
    'damage', [b'', b'{"seed": 0', b'\xff\xfe{}', b'[]', b'null'])
def test_a_damaged_config(copy, npz, damage):
  (copy / 'config.json').write_bytes(damage)
  before = runs.contents(copy)
  with pytest.raises(errors.WorkdirError) as error:
    train.run(runs.config_of(npz), str(copy))
  assert f'{copy}/config.json is damaged' in str(error.value)
  assert 'delete the workdir' in str(error.value)
  assert runs.contents(copy) == before


@pytest.mark.parametrize(
    'damage', [b'', b'{"format": "msfp-jax/spec/1", "lay', b'\xff\xfe', b'{}',
               b'[]', b'{"format": "msfp-jax/spec/1", "recipe": "msfp", '
               b'"layers": ["x"]}'])
def test_a_damaged_spec(copy, npz, damage):
  (copy / 'quant_spec.json').write_bytes(damage)
  before = runs.contents(copy)
  experiment = experiment_lib.load(runs.config_of(npz), str(copy))
  with pytest.raises(ValueError) as error:
    train.calibrated_spec(experiment, str(copy))
  assert f'{copy}/quant_spec.json' in str(error.value)
  assert 'delete' in str(error.value)
  assert runs.contents(copy) == before


def test_a_spec_of_another_model(copy, npz):
  """A spec of other layers, copied from another workdir, is refused by name."""
  path = copy / 'quant_spec.json'
  content = json.loads(path.read_text().replace('"conv_out"', '"conv_away"'))
  del content['digest']
  path.write_text(json.dumps(content))
  (copy / 'packed.safetensors').unlink()
  with pytest.raises(ValueError, match='conv_away'):
    train.run(runs.config_of(npz), str(copy))
  assert not (copy / 'packed.safetensors').exists()


def test_nan_in_a_checkpoint(tmp_path, trained, npz):
  source = trained / 'pretrain/model.safetensors'
  with safetensors.safe_open(source, 'np') as opened:
    metadata = opened.metadata()
  tensors = runs.teacher(trained)
  tensors['conv_in.kernel'] = tensors['conv_in.kernel'].copy()
  tensors['conv_in.kernel'].flat[3] = np.nan
  path = tmp_path / 'bad.safetensors'
  native.write_safetensors(path, tensors, metadata)
  with pytest.raises(ValueError) as error:
    train.run(runs.config_of(npz, {'pretrained': str(path)}),
                 str(tmp_path / 'work'))
  assert str(path) in str(error.value)
  assert 'conv_in.kernel holds 1 values that are not finite' in str(error.value)


def test_a_checkpoint_cut_short(tmp_path, trained, npz):
  content = (trained / 'pretrain/model.safetensors').read_bytes()
  path = tmp_path / 'cut.safetensors'
  path.write_bytes(content[:len(content) // 2])
  with pytest.raises(ValueError, match='cut.safetensors is no safetensors'):
    train.run(runs.config_of(npz, {'pretrained': str(path)}),
                 str(tmp_path / 'work'))


def test_a_checkpoint_that_is_not_there(tmp_path, npz):
  with pytest.raises(FileNotFoundError, match="nope.*'digits16'"):
    train.run(runs.config_of(npz, {'pretrained': 'nope'}), str(tmp_path))


@pytest.mark.parametrize('shape, parts', [
    ((16, 16, 3), ('3 channels', '1')),
    ((18, 18, 1), ('18 x 18', '16 x 16', 'resize')),
    ((16, 18, 1), ('16 x 18', '16 x 16', 'resize')),
])
def test_a_checkpoint_that_does_not_fit_the_data(tmp_path, shape, parts):
  np.savez(tmp_path / 'd.npz', runs.smooth(4, *shape))
  config = runs.config_of(tmp_path / 'd.npz', {'pretrained': 'digits16'})
  with pytest.raises(ValueError) as error:
    experiment_lib.load(config, str(tmp_path))
  for part in parts:
    assert part in str(error.value)


@pytest.mark.parametrize('value', [0.5, np.nan])
def test_float_data(tmp_path, value):
  np.savez(tmp_path / 'd.npz', np.full((4, 8, 8, 1), value, np.float32))
  with pytest.raises(ValueError, match='d.npz.*float32, must be uint8.*conv'):
    train.run(runs.config_of(tmp_path / 'd.npz'), str(tmp_path / 'work'))
  assert not (tmp_path / 'work/pretrain').exists()


def test_sides_that_the_levels_do_not_divide(tmp_path):
  np.savez(tmp_path / 'd.npz', runs.smooth(4, 18, 18, 1))
  config = images_config.get_config()
  config.data.path = str(tmp_path / 'd.npz')
  with pytest.raises(ValueError, match='18.*16.*20'):
    train.run(config, str(tmp_path / 'work'))


def test_an_unknown_stage(tmp_path, npz):
  with pytest.raises(ValueError, match="'train'.*'pretrain'.*'quantize'"):
    train.run(runs.config_of(npz, {'stage': 'train'}), str(tmp_path))


def never(*unused, **unused_too):
  raise AssertionError('sampled although the request is refused')


@pytest.mark.parametrize('rows, parts', [
    (('fp', 'nope'), ("'nope'", 'signed_fp', 'tuned', 'config.eval.rows')),
    (('msfp:w4a9',), ("'w4a9'", '3 to 8')),
])
def test_an_unknown_row_is_refused_before_any_is_sampled(
    copy, npz, monkeypatch, rows, parts):
  results = (copy / 'results.json').read_bytes()
  monkeypatch.setattr(draws.generate, 'batches', never)
  with pytest.raises(ValueError) as error:
    evaluate.run(runs.config_of(npz, {'eval.rows': rows}), str(copy))
  for part in parts:
    assert part in str(error.value)
  assert (copy / 'results.json').read_bytes() == results


def test_zero_samples(copy, npz):
  results = (copy / 'results.json').read_bytes()
  with pytest.raises(ValueError, match='num_samples=0.*at least 1'):
    evaluate.run(runs.config_of(npz, {'eval.num_samples': 0}), str(copy))
  assert (copy / 'results.json').read_bytes() == results


def test_eval_before_train(tmp_path, npz):
  with pytest.raises(errors.WorkdirError, match='run train.py'):
    evaluate.run(runs.config_of(npz), str(tmp_path))


def test_a_packed_model_that_is_not_there(copy, npz):
  (copy / 'packed.safetensors').unlink()
  before = runs.contents(copy)
  with pytest.raises(errors.WorkdirError, match='no packed model at'):
    evaluate.run(runs.config_of(npz, {'eval.rows': ('packed',)}), str(copy))
  after = runs.contents(copy) | {'config.json': before['config.json']}
  assert after == before


def test_eval_of_an_unfinished_training(copy, npz):
  shutil.rmtree(copy / 'checkpoints/6')
  before = runs.contents(copy)
  with pytest.raises(errors.WorkdirError, match='checkpoints/6'):
    evaluate.run(runs.config_of(npz), str(copy))
  assert runs.contents(copy) == before


def test_a_full_disk_leaves_the_results_as_they_were(copy, npz, monkeypatch):
  before = runs.contents(copy)
  write_text = pathlib.Path.write_text

  def full(self, *args, **kwargs):
    if 'results' not in self.name:
      return write_text(self, *args, **kwargs)
    write_text(self, 'half')
    raise OSError(28, 'No space left on device')  # a write names no file

  monkeypatch.setattr(pathlib.Path, 'write_text', full)
  with pytest.raises(OSError, match='No space left.*results.json'):
    evaluate.run(runs.config_of(npz, {'eval.rows': ('fp',)}), str(copy))
  after = runs.contents(copy)
  changed = {name for name in before | after
             if before.get(name) != after.get(name)
             and not name.startswith('eval/')}  # to go on once there is room
  assert changed <= {'config.json', 'samples/methods.png'}


def test_a_workdir_below_a_file(tmp_path, npz):
  (tmp_path / 'file').write_text('here')
  with pytest.raises(OSError, match='file/sub'):
    train.run(runs.config_of(npz), str(tmp_path / 'file/sub'))
