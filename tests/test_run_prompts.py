"""Prompts of a run: read, encoded, refused, and dealt out to images."""

import dataclasses
import json
import logging

import flux_oracle
import jax
import numpy as np
import pytest
import test_generate
import tiny

from configs import common
from msfp_jax import text
from msfp_jax.base import errors
from msfp_jax.diffusion import conditions
from msfp_jax.models.flux import Flux
from msfp_jax.models.guided import GuidedByText
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig
from msfp_jax.run import experiment as experiment_lib
from msfp_jax.run import first_stage
from msfp_jax.run import generate
from msfp_jax.run import prompts as prompts_lib
from msfp_jax.run import workdir as workdir_lib

DIFFUSES = UNet(UNetConfig(
    image_size=4, in_channels=1, out_channels=1, ch=4, ch_mult=(1,),
    num_res_blocks=0, norm_groups=2, attn_resolutions=(), dropout=0.0,
    context_dim=6))
SCHNELL, DEV = Flux(flux_oracle.TINY), Flux(flux_oracle.GUIDED)
LINES = [{'prompt': 'a cat', 'seed': 5},
         {'prompt': 'a dog', 'negative_prompt': 'rain'}, {'prompt': 'a cat'}]


def config_of(path, lines=LINES, **changes):
  """A config with a file of prompts and random encoders."""
  path.write_text('\n'.join(map(json.dumps, lines)))
  config = common.get_config()
  config.update_from_flattened_dict({
      'pretrained': 'random', 'prompts': str(path), 'text_encoder': 'random',
      'seed': 11} | changes)
  return config


@pytest.fixture
def file(tmp_path):
  return tmp_path / 'prompts.jsonl'


def save(path, **widths):
  """Embeddings of two images; returns a config that has them as prompts."""
  rng = np.random.default_rng(0)
  shapes = {name: (2, 3, width) if name != 'pooled' else (2, width)
            for name, width in widths.items()}
  np.savez(path, **{name: rng.standard_normal(shape).astype(np.float32)
                    for name, shape in shapes.items()})
  config = common.get_config()
  config.pretrained, config.prompts = 'random', str(path)
  return config


@pytest.mark.slow
def test_a_text_guides_by_two_predictions():
  rng = np.random.default_rng(0)
  x, text, negative = (rng.standard_normal(shape).astype(np.float32) for shape
                       in ((2, 4, 4, 1), (2, 3, 6), (2, 3, 6)))
  t = np.array([3.0, 700.0], np.float32)
  params = jax.tree.map(
      lambda s: rng.normal(size=s.shape).astype(np.float32),
      jax.eval_shape(DIFFUSES.init, jax.random.key(0), x, t, text))
  run = lambda model, *given: np.float64(jax.jit(model.apply)(
      params, x, t, *given))
  within, without = run(DIFFUSES, text), run(DIFFUSES, negative)
  assert np.abs(within - without).max() > 0.1
  model = GuidedByText(DIFFUSES, 3.0)
  assert [part.name for part in model.conditions] == [
      'context', 'negative_context']
  np.testing.assert_allclose(
      run(model, text, negative), without + 3 * (within - without),
      rtol=0, atol=1e-4)


def test_conditions_are_rows_that_belong_together():
  """In and out of jit the same ones, all of them in time."""
  tables = np.arange(5), 10 * np.arange(5)[:, None] + np.ones((5, 2), int)
  draw, key = conditions.rows(tables), jax.random.key(3)
  one, other = draw(key, 200)
  assert set(np.asarray(one).tolist()) == set(range(5))
  np.testing.assert_array_equal(
      other, 10 * np.asarray(one)[:, None] + np.ones((1, 2)))
  for inside in (jax.jit(lambda key, draw: draw(key, 200))(key, draw),
                 jax.jit(lambda key: draw(key, 200))(key)):
    np.testing.assert_array_equal(inside[1], other)
  # An argument, and no constant of a program.
  traced = jax.make_jaxpr(lambda draw: draw(key, 2))(draw)
  assert not [c for c in traced.consts if np.shape(c) == (5, 2)]


def drawn(prompts, count, batch):
  """Samples of a model that adds its condition, before they are bytes."""
  found = []
  draw = generate.Drawer(
      test_generate.Model(), dataclasses.replace(
          test_generate.PLAN, noise_std=np.zeros(4)), batch,
      test_generate.SHAPE, prompts=prompts)
  number = generate.num_batches(count, batch)
  for _ in generate.batches(
      draw, range(number), jax.random.key(batch),
      decode=lambda x: found.append(np.asarray(x)) or x):
    pass
  return np.concatenate(found)[:count]


@pytest.mark.slow
def test_an_image_is_its_prompts_whatever_the_batch():
  prompts = prompts_lib.Prompts(
      (), np.array([3, 2**32 - 1, 3], np.uint32),
      (np.array([0.1, -0.3, 0.1], np.float32),), '')
  images = drawn(prompts, 8, 2)
  np.testing.assert_allclose(drawn(prompts, 8, 3), images, atol=1e-5)
  # The same prompt and the same seed; then the next round's noise.
  np.testing.assert_allclose(images[2], images[0], atol=1e-5)
  for i in (1, 3, 4, 6):
    assert np.abs(images[i] - images[0]).max() > 0.1
  # Of its own seed and round, by hand: eps = a x + condition.
  for i, (seed, number, condition) in enumerate(
      [(3, 0, 0.1), (2**32 - 1, 0, -0.3), (3, 0, 0.1), (3, 1, 0.1)]):
    x = np.float64(jax.random.normal(jax.random.fold_in(
        jax.random.key(seed), number), test_generate.SHAPE))
    for step, a in enumerate(np.linspace(0.5, 0.9, 4)):
      x = (test_generate.PLAN.x_coef[step] * x
           - test_generate.PLAN.eps_factor[step] * (a * x + condition))
    np.testing.assert_allclose(images[i], x, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_context_with_guidance_and_negative_prompts(file):
  config = config_of(file, **{'guidance.scale': 2.0})
  model, found = prompts_lib.load(DIFFUSES, config)
  assert model == GuidedByText(DIFFUSES, 2.0)
  assert found.seeds.tolist() == [5, 12, 13]  # stated, or of the place
  assert found.texts_of(4) == ['a cat', 'a dog', 'a cat', 'a cat']
  context, negative = found.tables
  assert context.shape == negative.shape == (3, 64, 6)
  np.testing.assert_array_equal(context[0], context[2])
  np.testing.assert_array_equal(negative[0], negative[2])
  assert np.abs(negative[0] - negative[1]).max() > 0.01
  # Without guidance the model is as it was.
  config.guidance.scale = 1.0
  model, found = prompts_lib.load(DIFFUSES, config)
  assert model is DIFFUSES and len(found.tables) == 1
  np.testing.assert_array_equal(found.tables[0], context)


@pytest.mark.slow
def test_flux_takes_two_texts_and_the_number_of_guidance(file):
  config = config_of(file, text_length=20)
  model, found = prompts_lib.load(SCHNELL, config)
  widths = flux_oracle.TINY.text_dim, flux_oracle.TINY.pooled_dim
  assert model is SCHNELL
  assert [table.shape for table in found.tables] == [
      (3, 20, widths[0]), (3, widths[1])]
  config.guidance.scale = 3.5
  _, found = prompts_lib.load(DEV, config)
  assert found.tables[2].tolist() == [3.5] * 3
  config.guidance.scale = 3.0
  with pytest.raises(ValueError, match='scale=3.0: this transformer takes no'):
    prompts_lib.load(SCHNELL, config)


def test_embeddings_from_a_file(tmp_path):
  config = save(tmp_path / 'a.npz', context=6, negative_context=6)
  config.guidance.scale, config.seed = 2.0, 4
  prompts_lib.check(config)
  held = text.load_embeddings(config.prompts)
  _, found = prompts_lib.load(DIFFUSES, config)
  np.testing.assert_array_equal(found.tables[0], held.conditions['context'])
  np.testing.assert_array_equal(found.tables[1], held.negative['context'])
  assert found.seeds.tolist() == [4, 5] and found.texts_of(3) == []


@pytest.mark.parametrize('model, widths, scale, said', [
    (DIFFUSES, {'context': 5}, 1.0, 'has width 5, and the model takes 6'),
    (DIFFUSES, {'context': 6}, 2.0, "no 'negative_context'"),
    (DIFFUSES, {'text': 6, 'pooled': 6}, 1.0, 'conditions of flux'),
    (SCHNELL, {'context': 6}, 1.0, 'conditions of stable_diffusion')])
def test_embeddings_of_another_model(tmp_path, model, widths, scale, said):
  config = save(tmp_path / 'a.npz', **widths)
  config.guidance.scale = scale
  with pytest.raises(ValueError, match=said):
    prompts_lib.load(model, config)


def test_what_a_model_needs_and_what_there_is(file):
  config = config_of(file)
  with pytest.raises(ValueError, match='takes no conditions, and no text'):
    prompts_lib.check_model(tiny.UNET, config)
  labelled = UNet(dataclasses.replace(
      DIFFUSES.config, context_dim=None, num_classes=3))
  with pytest.raises(ValueError, match=r"takes \['labels'\], and no text"):
    prompts_lib.check_model(labelled, config)
  both = UNet(dataclasses.replace(DIFFUSES.config, num_classes=3))
  with pytest.raises(ValueError, match=r"\['labels', 'context'\]"):
    prompts_lib.check_model(both, config)
  config.guidance.null_class = True
  with pytest.raises(ValueError, match='null_class: the model takes texts'):
    prompts_lib.check_model(DIFFUSES, config)
  config.prompts = ''
  for model, name in ((DIFFUSES, 'context of width 6'),
                      (SCHNELL, 'text of width')):
    with pytest.raises(ValueError, match=f'{name}.*set config.prompts'):
      prompts_lib.check_model(model, config)
  assert prompts_lib.check_model(tiny.UNET, config) == ''


@pytest.mark.parametrize('changes, kind, said', [
    ({'text_encoder': ''}, ValueError, 'set config.text_encoder'),
    ({'text_encoder': '/no/where'}, FileNotFoundError, '/no/where'),
    ({'prompts': ''}, ValueError, 'without config.prompts'),
    ({'prompts': 'no.txt'}, FileNotFoundError, 'no prompts at no.txt'),
    ({'prompts': 'a.csv'}, ValueError, 'jsonl'),
    ({'pretrained': ''}, ValueError, 'trained here takes no text'),
    ({'pretrained': '', 'prompts': '', 'text_encoder': '',
      'image_size': (16, 16)}, ValueError, 'has the size of its data'),
    ({'text_length': -1}, ValueError, 'text_length=-1'),
    ({'image_size': (512, 520)}, ValueError, r'image_size=\(512, 520\)'),
    ({'image_size': (0, 16)}, ValueError, 'multiples of 16'),
    ({'image_size': (512,)}, ValueError, 'height and width')])
def test_configs_that_are_refused_before_anything_is_loaded(
    file, changes, kind, said):
  with pytest.raises(kind, match=said):
    experiment_lib.check(config_of(file, **changes))


def test_more_that_is_refused_at_once(tmp_path, file):
  config = config_of(file)
  experiment_lib.check(config)
  file.with_suffix('.txt').write_text('a cat\n\na dog\n')
  config.prompts = str(file.with_suffix('.txt'))
  with pytest.raises(ValueError, match='blank lines.*2'):
    experiment_lib.check(config)
  config = config_of(file, text_encoder='hf:nobody')
  with pytest.raises(ValueError, match='hf:OWNER/NAME'):
    experiment_lib.check(config)


def test_encoders_of_the_hub_are_looked_for_later(file):
  experiment_lib.check(config_of(file, text_encoder='hf:owner/name'))


def test_embeddings_need_no_encoder_whatever_the_config_names(tmp_path, caplog):
  """As configs of prompts name one; whoever has an .npz typed none."""
  config = save(tmp_path / 'a.npz', context=6)
  with caplog.at_level(logging.INFO):
    experiment_lib.check(config)
  assert 'of no account' not in caplog.text
  config.text_encoder, config.text_length = 'sd15', 77
  with caplog.at_level(logging.INFO):
    experiment_lib.check(config)
  assert 'config.text_encoder' in caplog.text
  _, found = prompts_lib.load(DIFFUSES, config)
  assert len(found.seeds) == 2


def test_a_workdir_of_other_prompts_is_refused(tmp_path, file):
  """The file's name is the same, and its content counts."""
  digest = lambda lines, **changes: prompts_lib.load(
      DIFFUSES, config_of(file, lines, **changes))[1].digest
  first = digest(LINES)
  assert digest(LINES) == first
  others = [digest(LINES[:2]), digest(LINES[::-1]), digest(LINES, seed=12),
            digest([LINES[0] | {'negative_prompt': 'x'}, *LINES[1:]])]
  for i, kind in enumerate((5, 6)):
    config = save(tmp_path / 'a.npz', **dict.fromkeys(['context'], kind))
    model = UNet(dataclasses.replace(DIFFUSES.config, context_dim=5 + i))
    others.append(prompts_lib.load(model, config)[1].digest)
  assert len({first, *others}) == 1 + len(others)
  config, workdir = common.get_config(), str(tmp_path / 'w')
  workdir_lib.prepare(config, workdir, taken={'prompts': first})
  (tmp_path / 'w' / 'quant_spec.json').write_text('{}')
  workdir_lib.check(config, workdir, taken={'prompts': first})
  with pytest.raises(errors.WorkdirError, match='prompts'):
    workdir_lib.check(config, workdir, taken={'prompts': others[0]})


def test_a_transformer_of_another_size():
  model, shape = first_stage.resized(SCHNELL, (16, 16, 3), (32, 48))
  side = SCHNELL.sample_shape[0]
  stride = 16 // side
  assert shape == (32, 48, 3)
  assert model.sample_shape[:2] == (32 // stride, 48 // stride)
  assert dataclasses.replace(
      model.config, image_size=side,
      image_width=SCHNELL.config.image_width) == SCHNELL.config
  with pytest.raises(ValueError, match='size of its own, 8 x 8'):
    first_stage.resized(DIFFUSES, (8, 8, 3), (16, 16))


def test_random_encoders_tell_texts_apart(file):
  """By each of their letters."""
  lines = [{'prompt': 'a cat'}, {'prompt': 'a cut'}]
  for model in (DIFFUSES, SCHNELL):
    for table in prompts_lib.load(model, config_of(file, lines))[1].tables:
      assert table.dtype == np.float32 and np.isfinite(table).all()
      assert np.abs(table[0] - table[1]).max() > 1e-3
