"""train.py and eval.py from end to end on a tiny model, and what stops them.

One training and one evaluation serve most tests; JAX's compilation cache, in
a folder of this module's own, makes their repetitions cheap.
"""

import gc
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
from PIL import Image
import pytest
import safetensors

from configs import images as images_config
from msfp_jax import checkpoint
from msfp_jax import convert
from msfp_jax import data
from msfp_jax import evaluate
from msfp_jax import experiment as experiment_lib
from msfp_jax import finetune
from msfp_jax import pretrain
from msfp_jax.convert import native

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
    'model.ch_mult': (1,), 'model.num_res_blocks': 0,
    'sampler.num_steps': 2, 'calibrate.batch_size': 4,
    'calibrate.samples_per_layer': 256,
    'pretrain.num_steps': 6, 'pretrain.warmup': 2, 'pretrain.save_every': 2,
    'pretrain.log_every': 1, 'pretrain.sample_every': 6,
    'finetune.num_updates': 6, 'finetune.save_every': 2,
    'finetune.batch_size': 2, 'finetune.rank': 2,
}
# Enough steps to be stopped in between from outside.
LONG = {'pretrain.num_steps': 240, 'pretrain.save_every': 50,
        'pretrain.sample_every': 240, 'finetune.num_updates': 120,
        'finetune.save_every': 50}
CACHE = {'jax_compilation_cache_dir': '',
         'jax_persistent_cache_min_compile_time_secs': 0,
         'jax_persistent_cache_min_entry_size_bytes': -1}
# Of design.md, and the exceptions that the rows share.
HEAD = ['dataset', 'num_samples', 'sampler', 'steps', 'eta', 'seed',
        'features', 'exceptions', 'rows']


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
  """The folder of the compilation cache."""
  before = {name: getattr(jax.config, name) for name in CACHE}
  folder = str(tmp_path_factory.mktemp('cache'))
  for name, value in CACHE.items():
    jax.config.update(name, folder if value == '' else value)
  compilation_cache.reset_cache()
  yield folder
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def smooth(count, height, width, channels):
  """Random smooth images, uint8."""
  rng = np.random.default_rng(0)
  rows, columns = (np.linspace(0, np.pi, n) for n in (height, width))
  a = rng.uniform(0.5, 3, (4, count, 1, 1, channels))
  x = np.sin(a[0] * rows[:, None, None] + a[1]) * np.cos(
      a[2] * columns[:, None] + a[3])
  return np.round((x + 1) * 127.5).astype(np.uint8)


@pytest.fixture(scope='module')
def npz(tmp_path_factory):
  path = tmp_path_factory.mktemp('data') / 'smooth.npz'
  np.savez(path, smooth(200, 8, 8, 1))
  return str(path)


def config_of(path, changes=None):
  config = images_config.get_config('smoke')
  config.update_from_flattened_dict(
      {'data.path': str(path)} | SMALL | (changes or {}))
  return config


@pytest.fixture(scope='module')
def trained(tmp_path_factory, npz):
  """The workdir of one training and evaluation, never changed by tests."""
  workdir = tmp_path_factory.mktemp('trained')
  finetune.run(config_of(npz), str(workdir))
  evaluate.run(config_of(npz), str(workdir))
  return workdir


@pytest.fixture
def copy(tmp_path, trained):
  """A copy of that workdir, to be changed."""
  return pathlib.Path(shutil.copytree(trained, tmp_path / 'copy'))


def contents(folder):
  """{path: bytes} of all files; events hold the time, so only their paths."""
  return {str(path.relative_to(folder)):
          b'' if 'tfevents' in path.name else path.read_bytes()
          for path in sorted(folder.rglob('*')) if path.is_file()}


def times(folder):
  return {str(path): path.stat().st_mtime_ns
          for path in sorted(folder.rglob('*')) if path.is_file()}


def teacher(workdir):
  """Tensors of the teacher's file."""
  with safetensors.safe_open(
      workdir / 'pretrain/model.safetensors', 'np') as opened:
    return {key: opened.get_tensor(key) for key in opened.keys()}


def final_parameters(config, workdir):
  """All arrays of the fine-tuned model."""
  experiment = experiment_lib.load(config, str(workdir))
  spec = finetune.calibrated_spec(experiment, str(workdir))
  deployed = finetune.fit(experiment, spec, str(workdir))
  return jax.tree.leaves((deployed.weights, deployed.params, deployed.choices,
                          deployed.spec.act_quantizers))


def assert_same_run(config, workdir, reference):
  """Teacher, result and every record of the runs agree, bit for bit."""
  for name in ('metrics.jsonl', 'pretrain/metrics.jsonl', 'quant_spec.json',
               'router.json'):
    assert ((workdir / name).read_bytes()
            == (reference / name).read_bytes()), name
  expected = teacher(reference)
  found = teacher(workdir)
  assert found.keys() == expected.keys()
  for key, value in expected.items():
    np.testing.assert_array_equal(found[key], value, key)
  for a, b in zip(final_parameters(config, workdir),
                  final_parameters(config, reference), strict=True):
    np.testing.assert_array_equal(a, b)


def test_what_a_workdir_holds(trained):
  for name in ('config.json', 'quant_spec.json', 'metrics.jsonl',
               'router.json', 'results.json', 'samples/methods.png',
               'pretrain/model.safetensors', 'pretrain/metrics.jsonl',
               'pretrain/samples/step_000006.png'):
    assert (trained / name).is_file(), name
  for name in ('checkpoints', 'pretrain/checkpoints'):
    assert sorted(p.name for p in (trained / name).iterdir()) == ['4', '6']
  for name in ('tensorboard', 'pretrain/tensorboard'):
    assert list((trained / name).glob('events.out.tfevents.*'))
  assert not [name for name in contents(trained) if name.endswith('.tmp')]


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
  rows = results.pop('rows')
  assert results == {
      'dataset': npz, 'num_samples': 160, 'sampler': 'ddim', 'steps': 2,
      'eta': 0, 'seed': 0, 'features': 'random', 'exceptions': 'all-4'}
  common = {'name', 'weight_bits', 'act_bits', 'fd_random', 'bytes'}
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
  assert size['fp'] == 4 * sum(v.size for v in teacher(trained).values())


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
  before, stamps = contents(copy), times(copy / 'checkpoints')

  def never(*unused):
    def step(state):
      raise AssertionError('a step of a finished run')
    return step

  monkeypatch.setattr(pretrain, 'make_step', never)
  monkeypatch.setattr(finetune, 'make_step', never)
  finetune.run(config_of(npz), str(copy))
  assert contents(copy) == before
  assert times(copy / 'checkpoints') == stamps


def test_eval_again_gives_identical_results(copy, npz):
  before = contents(copy)
  returned = evaluate.run(config_of(npz), str(copy))
  assert contents(copy) == before
  assert returned == json.loads(before['results.json'])


def test_a_row_does_not_depend_on_the_others(copy, npz):
  """Full precision comes first, asked for or not."""
  rows = json.loads((copy / 'results.json').read_text())['rows']
  results = evaluate.run(
      config_of(npz, {'eval.rows': ('tuned',)}), str(copy))
  assert results['rows'] == [rows[0], rows[2]]


def interrupt(patch, module, at):
  """SIGTERM reaches this process during step `at` of the module's loop."""
  make_step = module.make_step

  def patched(*args):
    step, count = make_step(*args), itertools.count(1)

    def stopped(state):
      if next(count) == at:
        os.kill(os.getpid(), signal.SIGTERM)
      return step(state)

    return stopped

  patch.setattr(module, 'make_step', patched)


def test_interrupted_is_uninterrupted(tmp_path, trained, npz, monkeypatch):
  """Stopped once in pre-training and once in fine-tuning."""
  config = config_of(npz)
  for module, folder in ((pretrain, tmp_path / 'pretrain'),
                         (finetune, tmp_path)):
    with monkeypatch.context() as patch:
      interrupt(patch, module, 3)
      with pytest.raises(checkpoint.Preempted) as stop:
        finetune.run(config, str(tmp_path))
    assert stop.value.code == 143
    assert (folder / 'checkpoints/3').is_dir()
    assert len((folder / 'metrics.jsonl').read_text().splitlines()) == 3
  assert not (tmp_path / 'router.json').exists()
  finetune.run(config, str(tmp_path))
  assert_same_run(config, tmp_path, trained)


@pytest.fixture
def orbax_noise():
  """orbax drops coroutines when a read fails; they complain when collected."""
  yield
  gc.collect()


@pytest.mark.usefixtures('orbax_noise')
@pytest.mark.filterwarnings(
    'ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.filterwarnings(
    'ignore::pytest.PytestUnhandledThreadExceptionWarning')
@pytest.mark.filterwarnings('ignore::RuntimeWarning')
def test_a_truncated_checkpoint_costs_only_its_steps(
    copy, trained, npz, caplog):
  for path in (copy / 'checkpoints/6').rglob('*'):
    if path.is_file():
      os.truncate(path, path.stat().st_size // 2)
  with caplog.at_level('INFO', 'absl'):
    finetune.run(config_of(npz), str(copy))
  assert f'checkpoint 6 under {copy}/checkpoints cannot be read' in caplog.text
  assert 'finetune: resumed at step 4' in caplog.text
  assert_same_run(config_of(npz), copy, trained)


def test_a_workdir_of_another_config(copy, npz):
  before = contents(copy)
  config = config_of(npz, {'finetune.rank': 3, 'seed': 1})
  for run in (finetune.run, evaluate.run):
    with pytest.raises(experiment_lib.WorkdirError) as error:
      run(config, str(copy))
    message = str(error.value)
    assert str(copy) in message and 'another --workdir' in message
    assert message.splitlines()[1:] == [
        '  finetune.rank: 2 there, 3 now', '  seed: 0 there, 1 now']
  assert contents(copy) == before


def test_what_is_evaluated_may_change(copy, npz):
  config = config_of(npz, {'eval.num_samples': 9, 'eval.rows': ('fp',)})
  experiment_lib.prepare_workdir(config, str(copy))
  written = json.loads((copy / 'config.json').read_text())
  assert written['eval']['num_samples'] == 9


def test_a_corrected_config_may_use_the_workdir(tmp_path, npz):
  """A run that was refused before it made anything has claimed nothing."""
  wrong, right = config_of('nowhere'), config_of(npz)
  with pytest.raises(FileNotFoundError, match='nowhere.*config.data.path'):
    finetune.run(wrong, str(tmp_path))
  experiment_lib.prepare_workdir(right, str(tmp_path))
  (tmp_path / 'quant_spec.json').write_text('{}')
  with pytest.raises(experiment_lib.WorkdirError, match='data.path: '):
    experiment_lib.prepare_workdir(wrong, str(tmp_path))


@pytest.mark.parametrize(
    'damage', [b'', b'{"seed": 0', b'\xff\xfe{}', b'[]', b'null'])
def test_a_damaged_config(copy, npz, damage):
  (copy / 'config.json').write_bytes(damage)
  before = contents(copy)
  with pytest.raises(experiment_lib.WorkdirError) as error:
    finetune.run(config_of(npz), str(copy))
  assert f'{copy}/config.json is damaged' in str(error.value)
  assert 'delete the workdir' in str(error.value)
  assert contents(copy) == before


@pytest.mark.parametrize(
    'damage', [b'', b'{"format": "msfp-jax/spec/1", "lay', b'\xff\xfe', b'{}',
               b'[]', b'{"format": "msfp-jax/spec/1", "recipe": "msfp", '
               b'"layers": ["x"]}'])
def test_a_damaged_spec(copy, npz, damage):
  (copy / 'quant_spec.json').write_bytes(damage)
  before = contents(copy)
  experiment = experiment_lib.load(config_of(npz), str(copy))
  with pytest.raises(ValueError) as error:
    finetune.calibrated_spec(experiment, str(copy))
  assert f'{copy}/quant_spec.json' in str(error.value)
  assert 'delete' in str(error.value)
  assert contents(copy) == before


def test_a_spec_of_another_model(copy, npz):
  """As after a hand-made copy of a workdir."""
  path = copy / 'quant_spec.json'
  path.write_text(path.read_text().replace('"conv_out"', '"conv_away"'))
  with pytest.raises(ValueError, match='conv_out.*conv_away|conv_away'):
    evaluate.untuned(
        experiment_lib.load(config_of(npz), str(copy)),
        finetune.calibrated_spec(
            experiment_lib.load(config_of(npz), str(copy)), str(copy)))


def test_nan_in_a_checkpoint(tmp_path, trained, npz):
  source = trained / 'pretrain/model.safetensors'
  with safetensors.safe_open(source, 'np') as opened:
    metadata = opened.metadata()
  tensors = teacher(trained)
  tensors['conv_in.kernel'] = tensors['conv_in.kernel'].copy()
  tensors['conv_in.kernel'].flat[3] = np.nan
  path = tmp_path / 'bad.safetensors'
  native.write_safetensors(path, tensors, metadata)
  with pytest.raises(ValueError) as error:
    finetune.run(config_of(npz, {'pretrained': str(path)}),
                 str(tmp_path / 'work'))
  assert str(path) in str(error.value)
  assert 'conv_in.kernel holds 1 values that are not finite' in str(error.value)


def test_a_checkpoint_cut_short(tmp_path, trained, npz):
  content = (trained / 'pretrain/model.safetensors').read_bytes()
  path = tmp_path / 'cut.safetensors'
  path.write_bytes(content[:len(content) // 2])
  with pytest.raises(ValueError, match='cut.safetensors is no safetensors'):
    finetune.run(config_of(npz, {'pretrained': str(path)}),
                 str(tmp_path / 'work'))


def test_a_checkpoint_that_is_not_there(tmp_path, npz):
  with pytest.raises(FileNotFoundError, match="nope.*'digits16'"):
    finetune.run(config_of(npz, {'pretrained': 'nope'}), str(tmp_path))


@pytest.mark.parametrize('shape, parts', [
    ((16, 16, 3), ('3 channels', '1')),
    ((18, 18, 1), ('18', '16', '20')),
    ((16, 18, 1), ('18', '16', '20')),
])
def test_a_checkpoint_that_does_not_fit_the_data(tmp_path, shape, parts):
  np.savez(tmp_path / 'd.npz', smooth(4, *shape))
  config = config_of(tmp_path / 'd.npz', {'pretrained': 'digits16'})
  with pytest.raises(ValueError) as error:
    experiment_lib.load(config, str(tmp_path))
  for part in parts:
    assert part in str(error.value)


@pytest.mark.parametrize('value', [0.5, np.nan])
def test_float_data(tmp_path, value):
  np.savez(tmp_path / 'd.npz', np.full((4, 8, 8, 1), value, np.float32))
  with pytest.raises(ValueError, match='d.npz.*float32, must be uint8.*conv'):
    finetune.run(config_of(tmp_path / 'd.npz'), str(tmp_path / 'work'))
  assert not (tmp_path / 'work/pretrain').exists()


def test_sides_that_the_levels_do_not_divide(tmp_path):
  np.savez(tmp_path / 'd.npz', smooth(4, 18, 18, 1))
  config = images_config.get_config()
  config.data.path = str(tmp_path / 'd.npz')
  with pytest.raises(ValueError, match='18.*16.*20'):
    finetune.run(config, str(tmp_path / 'work'))


def test_an_unknown_stage(tmp_path, npz):
  with pytest.raises(ValueError, match="'train'.*'pretrain'.*'quantize'"):
    finetune.run(config_of(npz, {'stage': 'train'}), str(tmp_path))


def never(*unused, **unused_too):
  raise AssertionError('sampled although the request is refused')


@pytest.mark.parametrize('rows, parts', [
    (('fp', 'nope'), ("'nope'", 'signed_fp', 'tuned', 'config.eval.rows')),
    (('msfp:w4a9',), ("'w4a9'", '3 to 8')),
])
def test_an_unknown_row_is_refused_before_any_is_sampled(
    copy, npz, monkeypatch, rows, parts):
  results = (copy / 'results.json').read_bytes()
  monkeypatch.setattr(evaluate, 'generate', never)
  with pytest.raises(ValueError) as error:
    evaluate.run(config_of(npz, {'eval.rows': rows}), str(copy))
  for part in parts:
    assert part in str(error.value)
  assert (copy / 'results.json').read_bytes() == results


def test_zero_samples(copy, npz):
  results = (copy / 'results.json').read_bytes()
  with pytest.raises(ValueError, match='num_samples=0.*at least 1'):
    evaluate.run(config_of(npz, {'eval.num_samples': 0}), str(copy))
  assert (copy / 'results.json').read_bytes() == results


def test_eval_before_train(tmp_path, npz):
  with pytest.raises(experiment_lib.WorkdirError, match='run train.py'):
    evaluate.run(config_of(npz), str(tmp_path))


def test_eval_of_an_unfinished_training(copy, npz):
  shutil.rmtree(copy / 'checkpoints/6')
  before = contents(copy)
  with pytest.raises(experiment_lib.WorkdirError, match='checkpoints/6'):
    evaluate.run(config_of(npz), str(copy))
  assert contents(copy) == before


def test_a_full_disk_leaves_the_results_as_they_were(copy, npz, monkeypatch):
  before = contents(copy)
  write_text = pathlib.Path.write_text

  def full(self, *args, **kwargs):
    if 'results' not in self.name:
      return write_text(self, *args, **kwargs)
    write_text(self, 'half')
    raise OSError(28, 'No space left on device')  # a write names no file

  monkeypatch.setattr(pathlib.Path, 'write_text', full)
  with pytest.raises(OSError, match='No space left.*results.json'):
    evaluate.run(config_of(npz, {'eval.rows': ('fp',)}), str(copy))
  after = contents(copy)
  changed = {name for name in before | after
             if before.get(name) != after.get(name)}
  assert changed <= {'config.json', 'samples/methods.png'}


def test_a_workdir_below_a_file(tmp_path, npz):
  (tmp_path / 'file').write_text('here')
  with pytest.raises(OSError, match='file/sub'):
    finetune.run(config_of(npz), str(tmp_path / 'file/sub'))


def test_images_of_the_size_of_the_data(trained):
  model, _ = convert.load_pretrained(
      str(trained / 'pretrain/model.safetensors'))
  assert (model.config.image_size, model.config.in_channels) == (8, 1)
  with Image.open(trained / 'pretrain/samples/step_000006.png') as picture:
    assert picture.size == (16 * 8, 4 * 8)  # 64 samples


def test_only_the_teacher(tmp_path, npz):
  """stage=pretrain ends there, and its file starts another run."""
  config = config_of(npz, {'stage': 'pretrain'})
  finetune.run(config, str(tmp_path), 'the command')
  assert not (tmp_path / 'quant_spec.json').exists()
  path = tmp_path / 'pretrain/model.safetensors'
  with safetensors.safe_open(path, 'np') as opened:
    assert opened.metadata()['command'] == 'the command'
  loaded = experiment_lib.load(
      config_of(npz, {'pretrained': str(path)}), str(tmp_path / 'other'))
  np.testing.assert_array_equal(loaded.images, data.load('images', npz))


def start(workdir, npz, cache):
  flags = {'data.path': npz} | SMALL | LONG
  environment = {name.upper(): str(cache if value == '' else value)
                 for name, value in CACHE.items()}
  return subprocess.Popen(
      [sys.executable, 'train.py', '--config=configs/images.py:smoke',
       f'--workdir={workdir}',
       *(f'--config.{name}={value}' for name, value in flags.items())],
      cwd=ROOT, stderr=subprocess.PIPE, text=True,
      env=os.environ | environment | {'JAX_PLATFORMS': 'cpu'})


def finish(process):
  _, log = process.communicate(timeout=600)
  assert process.returncode == 0, log
  return log


def wait_until(process, condition):
  end = time.monotonic() + 600
  while not condition():
    assert process.poll() is None, process.communicate()[1]
    assert time.monotonic() < end
    time.sleep(0.01)


def lines(path):
  return path.read_bytes().count(b'\n') if path.exists() else 0


@pytest.mark.slow
def test_sigterm_at_any_time_then_the_same_command(tmp_path, npz, cache):
  reference, workdir = tmp_path / 'reference', tmp_path / 'workdir'
  finish(start(reference, npz, cache))
  records = {'pretrain': workdir / 'pretrain/metrics.jsonl',
             'finetune': workdir / 'metrics.jsonl'}
  points = [  # when to stop; whether a loop is sure to catch it
      (lambda: (workdir / 'config.json').exists(), False),
      (records['pretrain'].exists, False),  # compiles, or about to
      (lambda: lines(records['pretrain']) >= 60, True),
      (lambda: (workdir / 'pretrain/model.safetensors').exists(), False),
      (lambda: (workdir / 'quant_spec.json').exists(), False),
      (lambda: lines(records['finetune']) >= 30, True),
  ]
  for condition, caught in points:
    process = start(workdir, npz, cache)
    wait_until(process, condition)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=600)
    allowed = {143} if caught else {143, -signal.SIGTERM}
    assert process.returncode in allowed, log
    assert 'Traceback' not in log
    if caught:
      assert 'run the same command again' in log
  assert 'finetune: resumed at step' in finish(start(workdir, npz, cache))
  assert_same_run(config_of(npz, LONG), workdir, reference)
