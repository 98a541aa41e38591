"""The full-precision model of a run: what is made, and what is refused."""

import dataclasses
import types

import jax
import lora_files
import numpy as np
import pytest

from msfp_jax.base import errors
from msfp_jax.models.guided import Guided
from msfp_jax.models.prediction import AsNoise
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig
from msfp_jax.run import teacher

CONFIG = UNetConfig(
    image_size=8, in_channels=1, out_channels=1, ch=8, ch_mult=(1, 2),
    num_res_blocks=1, attn_resolutions=(4,), norm_groups=4, dropout=0.0)
UNLABELLED = UNet(CONFIG)
LABELLED = UNet(dataclasses.replace(CONFIG, num_classes=4))
FIELDS = CONFIG.to_dict()
KEY = jax.random.key(0)


def images(*shape):
  return np.zeros((2, *shape), np.uint8)


def drawn(draw):
  """Values of the one condition, in order."""
  labels, = draw(KEY, 200)
  return sorted(set(np.asarray(labels).tolist()))


def test_an_unconditional_model_is_asked_for_nothing():
  model, draw = teacher.conditional(UNLABELLED, 1.0, False)
  assert model is UNLABELLED and draw(KEY, 3) == ()
  for scale, has_null_class in ((3.0, False), (1.0, True)):
    with pytest.raises(ValueError, match=r'guidance.scale=.*no labels'):
      teacher.conditional(UNLABELLED, scale, has_null_class)


@pytest.mark.parametrize('scale, has_null_class, classes', [
    (1.0, False, 4), (1.0, True, 3), (2.0, True, 3)])
def test_every_class_is_asked_for_but_that_of_none(
    scale, has_null_class, classes):
  model, draw = teacher.conditional(LABELLED, scale, has_null_class)
  assert drawn(draw) == list(range(classes))
  assert model == (LABELLED if scale == 1.0 else Guided(LABELLED, scale, 3))


def test_guidance_needs_a_class_of_none():
  with pytest.raises(ValueError, match=r'scale=2\.0.*null_class'):
    teacher.conditional(LABELLED, 2.0, False)


def test_a_text_cannot_be_drawn():
  config = dataclasses.replace(CONFIG, context_dim=6)
  with pytest.raises(ValueError, match='context, which cannot.*config.prompts'):
    teacher.conditional(UNet(config), 1.0, False)


@pytest.mark.parametrize('shape, message', [
    ((8, 8, 3), '3 channels, the model makes 1; convert'),
    ((8, 6, 1), '8 x 6 pixels, the model makes 8 x 8: resize'),
    ((4, 8, 1), '4 x 8 pixels')])
def test_images_are_what_the_model_makes(shape, message):
  teacher.check_images(images(8, 8, 1), (8, 8, 1))
  with pytest.raises(ValueError, match=message):
    teacher.check_images(images(*shape), (8, 8, 1))


def test_sizes_of_0_are_the_images():
  zeros = {'image_size': 0, 'in_channels': 0, 'out_channels': 0}
  made = teacher.untrained(FIELDS | zeros, images(12, 12, 3))
  assert made.config == dataclasses.replace(
      CONFIG, image_size=12, in_channels=3, out_channels=3)
  assert teacher.untrained(FIELDS, images(8, 8, 1)) == UNLABELLED
  made = teacher.untrained(FIELDS | zeros, images(8, 12, 3))
  assert made.sample_shape == (8, 12, 3)


def test_a_training_that_no_evaluation_could_follow_is_refused():
  """Before it begins: sides that differ from the config's."""
  with pytest.raises(ValueError, match='8 x 10 .* 8 x 8'):
    teacher.untrained(FIELDS, images(8, 10, 1))
  with pytest.raises(ValueError, match='16 x 16 .* 8 x 8'):
    teacher.untrained(FIELDS, images(16, 16, 1))


CHANNELS = [
    ((3, 6), 'takes 3 channels and makes 6: it predicts a variance too'),
    ((9, 4), 'takes 9 channels and makes 4: 5 channels are a condition'),
    ((7, 3), 'takes 7 channels and makes 3: 4 channels are a condition'),
    ((3, 4), 'takes 3 channels and makes 4: a sampler needs')]


@pytest.mark.parametrize('channels, message', CHANNELS)
def test_a_model_of_more_or_less_than_the_noise(
    tmp_path, monkeypatch, channels, message):
  """Trained here, random, or of a checkpoint: in words, before it samples."""
  fields = dict(zip(('in_channels', 'out_channels'), channels, strict=True))
  model = UNet(dataclasses.replace(CONFIG, **fields))
  with pytest.raises(ValueError, match=message):
    teacher.untrained(FIELDS | fields, images(8, 8, 3))
  with pytest.raises(ValueError, match=message):
    teacher.load('random', '', described_by='', ema=True,
                 fields=FIELDS | fields, seed=0)
  for found in (model, AsNoise(model, 'v', (0.9, 0.5))):
    monkeypatch.setattr(
        teacher.convert, 'open_pretrained', lambda *unused, found=found: (
            types.SimpleNamespace(model=found, params=None)))
    with pytest.raises(ValueError, match=message):
      teacher.load('a.ckpt', '', described_by='', ema=True, fields={}, seed=0)


def test_a_wide_model_samples_wide_images():
  model = teacher.new_model(FIELDS | {'image_width': 12})
  assert model.sample_shape == (8, 12, 1)
  assert teacher.new_model(model.to_dict()) == model
  assert 'image_width' not in UNLABELLED.to_dict()
  with pytest.raises(ValueError, match='image side 11'):
    teacher.new_model(FIELDS | {'image_width': 11})


def test_only_unconditional_models_are_trained():
  with pytest.raises(ValueError, match='no labels.*config.pretrained'):
    teacher.untrained(FIELDS | {'num_classes': 3}, images(8, 8, 1))


def test_a_teacher_that_is_not_there(tmp_path):
  with pytest.raises(errors.WorkdirError, match='no trained model.*train.py'):
    teacher.load('', str(tmp_path), described_by='', ema=True, fields=FIELDS,
                 seed=0)


def test_a_random_teacher_depends_on_the_seed_alone():
  load = lambda seed: teacher.load(
      'random', '', described_by='', ema=True, fields=FIELDS, seed=seed)
  (model, params), (_, same), (_, other) = load(3), load(3), load(4)
  assert model == UNLABELLED
  jax.tree.map(np.testing.assert_array_equal, params, same)
  assert np.any(params['conv_in']['kernel'] != other['conv_in']['kernel'])


def test_loras_are_merged_into_the_teacher(tmp_path):
  """Of a config, by file and strength."""
  down, up = (np.random.default_rng(i).standard_normal(shape, np.float32)
              for i, shape in enumerate(((1, 16), (16, 1))))
  path = lora_files.write(tmp_path / 'a.safetensors', lora_files.peft(
      {'mid_block.attentions.0.to_q': (down, up)}, 'unet.'))
  load = lambda loras: teacher.load(
      'random', '', described_by='', ema=True, fields=FIELDS, seed=3,
      loras=loras)[1]
  plain, changed = load(()), load(((str(path), 0.5), (str(path), 0.25)))
  np.testing.assert_allclose(
      changed['mid.attn_1']['q']['kernel'],
      plain['mid.attn_1']['q']['kernel'] + 0.75 * (up @ down).T, rtol=1e-5,
      atol=1e-6)
  changed['mid.attn_1']['q']['kernel'] = plain['mid.attn_1']['q']['kernel']
  jax.tree.map(np.testing.assert_array_equal, changed, plain)


@pytest.mark.parametrize('loras', [
    ('a.safetensors', 1.0), (('a.safetensors',),), (('a.safetensors', '1'),),
    (('', 1.0),), (('a.safetensors', float('nan')),)])
def test_loras_of_a_config_are_pairs(loras):
  with pytest.raises(ValueError, match='config.loras=.*a file and a strength'):
    teacher.check_loras(loras)
