"""What can be refused is refused before a teacher trains or anything runs."""

import numpy as np
import pytest
import runs
import safetensors

from configs import common
from msfp_jax.base import errors
from msfp_jax.base import lock
from msfp_jax.run import draws
from msfp_jax.run import evaluate
from msfp_jax.run import study
from msfp_jax.run import train
from msfp_jax.tune import pretrain


def never(*unused, **unused_too):
  raise AssertionError('began although the request is refused')


@pytest.fixture
def refused(monkeypatch):
  """No teacher is trained, loaded or sampled from."""
  monkeypatch.setattr(pretrain, 'run', never)
  monkeypatch.setattr(train, 'calibrated_spec', never)
  monkeypatch.setattr(draws.generate, 'batches', never)


COUNTS = [f'{part}.{field}' for part, fields in {
    'finetune': ('batch_size', 'num_banks', 'accumulate', 'save_every',
                 'log_every'),
    'pretrain': ('num_steps', 'batch_size', 'accumulate', 'save_every',
                 'log_every', 'sample_every'),
    'calibrate': ('batch_size', 'num_batches', 'samples_per_layer'),
}.items() for field in fields]


def test_every_count_of_the_config_is_among_them():
  """So that a new `*_every`, batch or number is not forgotten."""
  config = common.get_config()
  found = {f'{part}.{field}' for part in ('finetune', 'pretrain', 'calibrate')
           for field, value in config[part].items()
           if isinstance(value, int) and not isinstance(value, bool)}
  assert found == {*COUNTS, 'finetune.num_updates', 'finetune.rank',
                   'finetune.window_steps', 'pretrain.warmup'}


@pytest.mark.parametrize('value', [0, -1])
@pytest.mark.parametrize('field', COUNTS)
def test_counts(tmp_path, npz, refused, field, value):
  with pytest.raises(ValueError, match=rf'config\.{field}={value}: must be '):
    train.run(runs.config_of(npz, {field: value}), str(tmp_path / 'w'))
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('changes, parts', [
    ({'quant.recipe': 'mspf'}, ('config.quant.recipe', "'mspf'", 'nvfp4')),
    ({'quant.recipe': 'msfp+qptq'}, ('config.quant.recipe', 'gptq')),
    ({'quant.weight_bits': 2}, ('config.quant.weight_bits', '3 to 8')),
    ({'quant.act_bits': 16}, ('config.quant.act_bits', '32')),
    ({'quant.exceptions': 'ends'}, ('config.quant.exceptions', 'ends-8')),
    ({'quant.weight_bits': 32}, ('nothing to fine-tune', 'num_updates=0')),
    ({'finetune.gamma': 'dpm'}, ('config.finetune.gamma', 'ddpm_respaced')),
    ({'finetune.base_weight': 'fp'}, ('config.finetune.base_weight', 'full')),
    ({'finetune.num_banks': 257}, ('num_banks=257', '256')),
    ({'finetune.num_updates': -1}, ('num_updates=-1',)),
    ({'finetune.learning_rate': float('nan')}, ('learning_rate=nan',)),
    ({'finetune.learning_rate': -1e-3}, ('learning_rate=-0.001',)),
    ({'finetune.adam_b2': 1.0}, ('adam_b2=1.0',)),
    ({'finetune.router_temperature': 0.0}, ('router_temperature=0.0',)),
    ({'finetune.rank': -1, 'finetune.save_every': 0}, ('rank=-1', 'every=0')),
    ({'finetune.window_steps': -1}, ('window_steps=-1',)),
    ({'pretrain.dtype': 'float16'}, ('config.pretrain.dtype', 'bfloat16')),
    ({'pretrain.ema_decay': 1.5}, ('ema_decay=1.5',)),
    ({'pretrain.clip_norm': 0.0}, ('clip_norm=0.0',)),
    ({'pretrain.warmup': 6}, ('warmup=6', 'num_steps=6')),
    ({'guidance.scale': 3.0}, ('guidance.scale=3.0', 'no labels')),
    ({'first_stage': 'vae'}, ("first_stage='vae'", 'pixels')),
    ({'sampler.num_steps': 0}, ('num_steps',)),
    ({'schedule.name': 'flow', 'finetune.gamma': 'ddpm'},
     ("gamma='ddpm'", "use 'sampler'")),
    ({'schedule.name': 'flow', 'sampler.name': 'plms'},
     ("sampler 'plms'", 'flow matching')),
    ({'schedule.name': 'flow', 'sampler.shift': -1.0}, ('shift=-1.0',)),
    ({'pretrain.times': 'cosmap'}, ('config.pretrain.times', 'logit_normal')),
    ({'pretrain.times_std': 0.0}, ('config.pretrain.times_std=0.0',)),
    ({'stage': 'tune'}, ("'tune'",)),
    ({'model.norm_groups': 3}, ()),
    # Fields that a config file may set to anything, and that nothing would use.
    ({'finetune.learn_biases': 'no'}, ("learn_biases='no'", 'True or False')),
    ({'ema': 'no'}, ("config.ema='no'",)),
    ({'seed': 2**32}, ('config.seed=4294967296', '2**32 - 1')),
    ({'seed': 1.5}, ('config.seed=1.5',)),
    ({'text_length': 5}, ('text_length=5', 'nothing to encode')),
    ({'first_stage_config': 'a.yaml'}, ('a.yaml', 'config.first_stage,')),
    ({'pretrained_config': 'a.yaml'}, ('a.yaml', 'config.pretrained,')),
    # Of the evaluation after it.
    ({'eval.batch_size': -1}, ('config.eval.batch_size=-1',)),
    ({'eval.num_samples': 0}, ('config.eval.num_samples=0',)),
    ({'eval.keep': 'jpg'}, ('config.eval.keep', 'png')),
])
def test_before_a_teacher_trains(tmp_path, npz, refused, changes, parts):
  config = runs.config_of(npz)
  with config.ignore_type():
    config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError) as error:
    train.run(config, str(tmp_path / 'w'))
  for part in parts:
    assert part in str(error.value)
  assert '\n' not in str(error.value)
  assert not [*tmp_path.iterdir()]


def test_a_lora_that_is_not_there_is_missed_before_a_teacher_trains(
    tmp_path, npz, refused):
  config = runs.config_of(npz, {'loras': (('no.safetensors', 1.0),)})
  with pytest.raises(FileNotFoundError, match='no.safetensors.*config.loras'):
    train.run(config, str(tmp_path / 'w'))
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('changes, parts', [
    ({'eval.num_samples': -1}, ('config.eval.num_samples=-1',)),
    ({'eval.batch_size': 0}, ('config.eval.batch_size=0',)),
    ({'eval.pictures': 0}, ('config.eval.pictures=0',)),
    ({'eval.layer_images': -1}, ('config.eval.layer_images=-1',)),
    ({'eval.vectors': 1}, ('config.eval.vectors=1', '0 or at least')),
    ({'eval.keep': 'jpg'}, ('config.eval.keep', 'png')),
    ({'eval.preprocessing': 'tv'}, ('config.eval.preprocessing', 'clean')),
    ({'eval.features': 'vgg'}, ("'vgg'", 'inception')),
    ({'eval.features': 'cifar_resnet:no.pth'}, ('no.pth', 'eval.features')),
    ({'eval.reference': 'no.npz'}, ('no.npz', 'config.eval.reference')),
    ({'eval.sensitivity_images': -1}, ('config.eval.sensitivity_images=-1',)),
    ({'eval.more_features': ('squeezenet:no.npz',)}, (
        'no.npz', 'config.eval.more_features')),
    ({'eval.more_features': ('random',)}, ("'random' one is named twice",)),
    ({'eval.more_references': ('a.npz',)}, ('one for each of more_feat',)),
    ({'eval.reference': 'cifar10'}, ("'cifar10'", 'resnet56', "'random'")),
    ({'eval.more_features': ('digits',), 'eval.more_references': ('no.npz',)},
     ('no.npz', 'config.eval.more_references')),
    ({'eval.inception': 'no.pth'}, ('no.pth', 'config.eval.inception')),
    ({'eval.lpips': 'vgg'}, ("'vgg:PATH'", 'vgg16-397923af.pth')),
    ({'eval.lpips': 'vgg:no.pth'}, ('no.pth', 'config.eval.lpips')),
    ({'quant.recipe': 'nope'}, ('config.quant.recipe',)),
])
def test_before_an_evaluation(tmp_path, npz, refused, changes, parts):
  with pytest.raises((ValueError, OSError)) as error:
    evaluate.run(runs.config_of(npz, {'eval.rows': ('fp',)} | changes),
                 str(tmp_path / 'w'))
  for part in parts:
    assert part in str(error.value)
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('rows', [('fp',), ('fp', 'tuned'), ('packed',)])
def test_eval_before_train_leaves_nothing_behind(tmp_path, npz, refused, rows):
  with pytest.raises(errors.WorkdirError, match='run train.py'):
    evaluate.run(runs.config_of(npz, {'eval.rows': rows}),
                 str(tmp_path / 'deep/w'))
  assert not [*tmp_path.iterdir()]


def test_one_run_a_workdir(tmp_path, npz, refused):
  """Of any two of training, evaluation and a study's row."""
  config = runs.config_of(npz, {'pretrained': 'random', 'eval.rows': ('fp',)})
  with lock.hold(tmp_path / 'w'):
    for run in (train.run, evaluate.run):
      with pytest.raises(errors.WorkdirError, match='is in use by process'):
        run(config, str(tmp_path / 'w'))
  assert not [*tmp_path.iterdir()]
  rows = {'group': {'a': '', 'b': ''}}
  with (lock.hold(tmp_path / '0/group/b'),
        pytest.raises(errors.WorkdirError, match='group/b is in use')):
    study.run_seed(lambda variant: config.copy_and_resolve_references(),
                   {'seeds': [0], 'groups': rows}, 0, str(tmp_path))


def test_a_finished_run_holds_nothing(trained):
  assert not [*trained.rglob(lock.NAME)]
  with lock.hold(trained), safetensors.safe_open(
      trained / 'packed.safetensors', 'np') as opened:
    assert np.all([opened.get_tensor(key) is not None
                   for key in opened.keys()])
