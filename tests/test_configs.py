"""The experiments: every file, every variant, and what the package ships."""

import dataclasses
import importlib
import itertools
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import safetensors
import test_flow_scheduler

from configs import cifar10
from configs import common
from configs import digits
from configs import flux_schnell
from configs import images
from msfp_jax import convert
from msfp_jax import diffusion
from msfp_jax.convert import flow_scheduler
from msfp_jax.convert import native
from msfp_jax.diffusion import origin
from msfp_jax.metrics import features
from msfp_jax.models import autoencoder
from msfp_jax.models import unet
from msfp_jax.quant import recipes
from msfp_jax.quant import roles
from msfp_jax.run import eval_settings
from msfp_jax.run import experiment
from msfp_jax.run import methods
from msfp_jax.run import teacher
from msfp_jax.tune import finetune
from msfp_jax.tune import losses
from msfp_jax.tune import pretrain

ROOT = pathlib.Path(__file__).parents[1]
MODULES = [importlib.import_module(f'configs.{path.stem}')
           for path in sorted((ROOT / 'configs').glob('*.py'))
           if path.stem != 'common']
CASES = [(module, variant) for module in MODULES
         for variant in ('', 'w4a4', 'w6a8', *roles.EXCEPTIONS,
                         *module.VARIANTS)]
STUDY_ROWS = [
    (module, variant) for module in MODULES
    for study in getattr(module, 'STUDIES', {}).values()
    for rows in study['groups'].values() for variant in rows.values()]


def case_id(value):
  return getattr(value, '__name__', value) or 'default'


def flat(config):
  """Flattens a config, {dotted field: value}."""
  found = {}
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      found |= {f'{name}.{k}': v for k, v in flat(value).items()}
    else:
      found[name] = value
  return found


@pytest.mark.parametrize('module, variant', CASES + STUDY_ROWS, ids=case_id)
def test_fields_and_types_are_those_of_common(module, variant):
  known = flat(common.get_config())
  found = flat(module.get_config(variant))
  models = {name for name in found
            if name.startswith(('model.', 'autoencoder.'))}
  assert known.keys() <= found.keys()
  assert found.keys() - known.keys() <= models
  for name, value in known.items():
    # A placeholder, which a config may fill in, has a type of its own.
    kind = (common.get_config().get_type(name) if value is None
            else type(value))
    assert found[name] is None or type(found[name]) is kind, name
    assert value is None or found[name] is not None, name
  for name in models:
    assert isinstance(found[name], int | float | tuple | str | None), name


@pytest.mark.parametrize('module, variant', CASES, ids=case_id)
def test_what_a_config_names_exists(module, variant):
  config = module.get_config(variant)
  recipes.get(config.quant.recipe)
  assert config.quant.exceptions in roles.EXCEPTIONS
  chosen = origin.choose(origin.Origin(), config.schedule, config.sampler)
  losses.denoising_factors(
      chosen.schedule, chosen.plan, config.finetune.gamma)
  if config.autoencoder.get('kind'):
    autoencoder.AutoencoderConfig(**config.autoencoder)
  if config.pretrained not in ('', teacher.RANDOM, *native.SHIPPED):
    # A file of the user's; the command says how to name it.
    assert config.pretrained in module.__doc__
  fields = dict(config.model)
  side = fields['image_size'] or 16
  teacher.new_model(fields | {'image_size': side})
  # A file of the user's, or one beside the configs.
  assert (config.prompts in module.__doc__
          or pathlib.Path(config.prompts).is_file())
  kind, _, path = config.eval.features.partition(':')
  if path:  # a file of the user's
    assert config.eval.features in module.__doc__
  elif kind != 'inception':  # whose weights are a download
    features.get(config.eval.features, (
        side, side, fields['in_channels'] or 1))
  for name in methods.recipes_of(methods.expand(config.eval.rows)):
    recipes.get(name)


def test_the_shipped_teacher_of_cifar10_needs_nothing_else_typed():
  alone, whole = map(cifar10.get_config, ('trained', 'small,trained'))
  known, found = flat(whole), flat(alone)
  for name in ('pretrained', 'stage', 'data.name', 'data.path', 'eval.features',
               'eval.reference', 'eval.vectors'):
    assert found[name] == known[name], name


def test_dev_has_its_own_shift_and_guidance():
  """Of the scheduler's file; typed, it would go before that."""
  config = flux_schnell.get_config('dev')
  model = teacher.new_model(dict(config.model))
  assert 'guidance' in [part.name for part in model.conditions]
  said = flow_scheduler.of_model(
      flow_scheduler.read(test_flow_scheduler.DEV, 'file'),
      flow_scheduler.FlowModel(1, 4096, True), 'file')
  chosen = origin.choose(said, config.schedule, config.sampler)
  assert chosen.sampler_fields['shift_by_tokens'] == [0.5, 1.15, 256, 4096]


@pytest.mark.slow
@pytest.mark.parametrize('variant, count', [
    ('small', 2_736_099), ('ten', 9_492_883)])
def test_the_teachers_of_cifar10(variant, count):
  config = cifar10.get_config(variant)
  assert config.stage == 'pretrain' and not config.pretrained
  assert config.pretrain.flip
  model = unet.UNet(unet.UNetConfig(**config.model))
  shapes = jax.eval_shape(lambda: pretrain.init_state(
      model, pretrain.optimizer(pretrain.PretrainSettings(**config.pretrain)),
      jax.random.key(0)))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes.params)) == count


# Of each sampler in the package: how many evaluations it makes of N steps.
@pytest.mark.parametrize('sampler, evaluations', [
    ('ddim', 20), ('ddpm', 20), ('dpm_solver', 20), ('plms', 21)])
@pytest.mark.parametrize('schedule', ['linear', 'scaled_linear', 'cosine'])
def test_every_sampler_and_schedule_can_be_named(
    sampler, evaluations, schedule):
  """Any sampler can be named while a config's other fields stay as they are."""
  config = common.get_config()
  config.sampler.name, config.schedule.name = sampler, schedule
  chosen = origin.choose(origin.Origin(), config.schedule, config.sampler)
  assert config.sampler.num_steps == 20
  assert chosen.plan.num_steps == evaluations
  assert chosen.schedule.num_train_steps == 1000


def test_no_sampler_and_no_schedule_is_missing_above():
  """A config that names none of them is told which there are."""
  schedule = diffusion.make_schedule('cosine', num_train_steps=10)
  with pytest.raises(ValueError) as error:
    diffusion.make_plan(schedule, 'none')
  assert str(error.value).endswith(
      "['ddim', 'ddpm', 'dpm_solver', 'flow', 'plms']")
  with pytest.raises(ValueError) as error:
    diffusion.make_schedule('none')
  assert str(error.value).endswith(
      "['cosine', 'flow', 'linear', 'scaled_linear']")


@pytest.mark.parametrize('module, variant', CASES, ids=case_id)
def test_the_optimizers_take_the_rates_of_the_config(module, variant):
  """Adam's updates for gradients of 1, of weights of 0, are minus the rate."""
  config = module.get_config(variant)
  one, zero = jnp.ones(()), jnp.zeros(())
  tx = pretrain.optimizer(pretrain.PretrainSettings(**config.pretrain))
  first, state = tx.update(one, tx.init(zero), zero)
  second, _ = tx.update(one, state, zero)
  assert first == 0  # the warm-up begins
  np.testing.assert_allclose(
      second, -config.pretrain.learning_rate / config.pretrain.warmup,
      rtol=1e-4)  # optax interpolates in float32
  if not config.finetune.num_updates:  # calibrated only
    return
  rates = {'banks': config.finetune.learning_rate,
           'router': config.finetune.router_learning_rate,
           'ranges': config.finetune.range_learning_rate,
           'biases': config.finetune.range_learning_rate}
  tx = finetune.optimizer(finetune.FinetuneSettings(**config.finetune))
  ones, zeros = dict.fromkeys(rates, one), dict.fromkeys(rates, zero)
  updates, _ = tx.update(ones, tx.init(zeros), zeros)
  for name, rate in rates.items():
    np.testing.assert_allclose(updates[name], -rate, rtol=1e-5)


@pytest.mark.parametrize('part, settings', [
    ('pretrain', pretrain.PretrainSettings),
    ('finetune', finetune.FinetuneSettings),
    ('calibrate', experiment.CalibrationSettings),
    ('quant', experiment.QuantSettings), ('eval', eval_settings.EvalSettings)])
def test_parts_have_the_fields_that_runs_take(part, settings):
  names = [field.name for field in dataclasses.fields(settings)]
  assert sorted(names) == sorted(common.get_config()[part])


def test_warm_up_must_end_before_the_training():
  config = common.get_config().pretrain
  config.num_steps = config.warmup
  with pytest.raises(ValueError, match='warmup.*500.*num_steps.*500'):
    pretrain.PretrainSettings(**config)


@pytest.mark.parametrize('variant, bits, exceptions', [
    ('', (4, 4), 'ends-8'),
    ('w6a8', (6, 8), 'ends-8'),
    ('w4a4,w6a6', (6, 6), 'ends-8'),
    ('w6a6,skip-8,w3a32', (3, 32), 'skip-8'),
    ('skip-8,ends-8', (4, 4), 'ends-8'),
    (',skip-8,', (4, 4), 'skip-8'),
])
def test_the_later_word_wins(variant, bits, exceptions):
  quant = common.apply_variant(common.get_config(), variant, {}).quant
  assert (quant.weight_bits, quant.act_bits) == bits
  assert quant.exceptions == exceptions


def test_named_words_are_applied_in_the_order_given():
  named = {'a': {'seed': 1, 'quant.recipe': 'int'}, 'b': {'seed': 2}}
  for words in itertools.permutations('ab'):
    config = common.apply_variant(
        common.get_config(), ','.join(words), named)
    assert config.seed == named[words[-1]]['seed']
    assert config.quant.recipe == 'int'
  assert digits.get_config('demo,untuned').finetune.num_updates == 0
  assert digits.get_config('untuned,demo').finetune.num_updates == 600


@pytest.mark.parametrize('module', MODULES, ids=case_id)
def test_an_unknown_word_lists_the_known(module):
  with pytest.raises(ValueError) as error:
    module.get_config('w4a4,tabel')
  message = str(error.value)
  assert "'tabel'" in message
  for word in ('w4a4', *roles.EXCEPTIONS, *module.VARIANTS):
    assert word in message


@pytest.mark.parametrize('bits', ['w4a9', 'w2a4', 'w0a0', 'w4a33'])
def test_bits_that_there_are_not(bits):
  with pytest.raises(ValueError, match=f"'{bits}'.*3 to 8"):
    digits.get_config(bits)


@pytest.mark.parametrize('bits', ['w4', 'a4w4', 'w4a4x', 'W4A4'])
def test_words_that_resemble_bits(bits):
  with pytest.raises(ValueError, match=f"'{bits}'.*w4a4"):
    digits.get_config(bits)


@pytest.mark.parametrize('module', MODULES, ids=case_id)
def test_studies_have_what_study_reads(module):
  for study in getattr(module, 'STUDIES', {}).values():
    assert study['seeds'] and study['metrics'] and study['groups']
    assert len(set(study['seeds'])) == len(study['seeds'])
    for rows in study['groups'].values():
      assert rows
      # Names of files and folders, which --rows has with commas between.
      assert not any('/' in label or ',' in label or label == 'fp'
                     for label in rows)


@pytest.mark.parametrize('module', [digits, cifar10], ids=case_id)
def test_rows_of_a_study_share_model_data_and_noise(module):
  """One teacher and one calibration serve a whole seed (study.run_seed)."""
  for study in module.STUDIES.values():
    base = module.get_config(study.get('base', ''))
    for rows in study['groups'].values():
      for label, variant in rows.items():
        config = module.get_config(variant)
        for part in ('pretrained', 'data', 'model', 'schedule', 'sampler',
                     'calibrate'):
          assert config[part] == base[part], (variant, part)
        recipe = recipes.get(config.quant.recipe)
        assert not recipe.differences or config.finetune.num_banks == 1 or (
            not config.finetune.num_updates), label


def test_the_study_of_recipes_has_all_of_them():
  """Each as it is: untuned, at 4 bits, under both lists of exceptions."""
  groups = digits.STUDIES['recipes']['groups']
  assert sorted(groups) == sorted(roles.EXCEPTIONS)
  for group, rows in groups.items():
    assert set(rows) >= set(recipes.RECIPES)
    for label, variant in rows.items():
      config = digits.get_config(variant)
      assert config.quant.to_dict() == {
          'recipe': label, 'weight_bits': 4, 'act_bits': 4,
          'exceptions': group, 'drift_images': 0}
      assert config.finetune.num_updates == 0
      assert config.eval == digits.get_config('recipes').eval


def test_the_docstrings_name_the_command():
  for module in MODULES:
    name = module.__name__.rpartition('.')[2]
    assert f'train.py --config=configs/{name}.py' in module.__doc__
    assert f'eval.py --config=configs/{name}.py' in module.__doc__


def test_images_take_size_and_channels_from_the_data():
  model = images.get_config().model
  assert (model.image_size, model.in_channels, model.out_channels) == (0, 0, 0)


@pytest.mark.parametrize('name, module, variant, count, most', [
    ('digits16', digits, 'pretrain', 649_329, 3_000_000),
    ('cifar10_small', cifar10, 'small', 2_736_099, 6_000_000)])
def test_the_shipped_checkpoints(name, module, variant, count, most):
  file = native.SHIPPED[name]
  assert file.stat().st_size <= most
  model, params = convert.load_pretrained(name)
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
  config = module.get_config(variant)
  assert model.config == unet.UNetConfig(**config.model)
  with safetensors.safe_open(file, 'np') as opened:
    header = opened.metadata()
  config_file = module.__name__.rpartition('.')[2]
  assert (f'train.py --config=configs/{config_file}.py:{variant} '
          in header['command'])
  assert header['seed'] == '0'
  assert int(header['steps']) == config.pretrain.num_steps
