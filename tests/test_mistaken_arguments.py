"""What callers pass by mistake is refused by name, before work or a file."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import msfp_jax as msfp
from msfp_jax import data
from msfp_jax.convert import native
from msfp_jax.models.guided import Guided
from msfp_jax.models.prediction import AsNoise
from msfp_jax.models.unet import UNet
from msfp_jax.quant import batches
from msfp_jax.run import study

LABELLED = UNet(dataclasses.replace(tiny.CONFIG, num_classes=3))
TEXT = UNet(dataclasses.replace(tiny.CONFIG, context_dim=6))


def calibrated():
  return msfp.calibrate(tiny.UNET, tiny.params(tiny.UNET), recipe='nvfp4')


def packed():
  return msfp.pack(tiny.UNET, tiny.params(tiny.UNET), calibrated(), tiny.PLAN)


def spoilt(kind):
  """Parameters with one NaN in the last normalization."""
  params = jax.tree.map(np.array, tiny.params(tiny.UNET))
  params['norm_out'][kind][0] = np.nan
  return params


@pytest.mark.parametrize('about, message', [
    ({'seed': 3}, r"\['seed'\].*seed=str"),
    ({'plan': '{}'}, r"\['plan'\]"), ({'digest': 'x'}, r"\['digest'\]"),
    ({'layers': 'x', 'format': 'y'}, r"\['format', 'layers'\]")])
def test_headers_hold_texts_under_names_of_their_own(tmp_path, about, message):
  path = tmp_path / 'm.safetensors'
  with pytest.raises(ValueError, match=message):
    msfp.save(path, packed(), **about)
  with pytest.raises(ValueError, match=message):
    msfp.pack_streamed('digits16', path, about=about)
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('about', [{'seed': 3}, {'format': 'x'}])
def test_headers_of_models_likewise(tmp_path, about):
  with pytest.raises(ValueError, match=[*about][0]):
    native.save_pretrained(tmp_path / 'm.safetensors', tiny.UNET,
                           tiny.params(tiny.UNET), **about)
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('kind', ['scale', 'bias'])
def test_parameters_that_are_not_finite(tmp_path, kind):
  spec, params = calibrated(), spoilt(kind)
  for work in (
      lambda: msfp.calibrate(tiny.UNET, params, recipe='nvfp4'),
      lambda: msfp.pack(tiny.UNET, params, spec, tiny.PLAN),
      lambda: native.save_pretrained(
          tmp_path / 'm.safetensors', tiny.UNET, params)):
    with pytest.raises(ValueError, match=f'norm_out.{kind}.*NaN'):
      work()
  assert not [*tmp_path.iterdir()]


def test_a_packed_model_that_is_not_finite_makes_no_file(tmp_path):
  model = dataclasses.replace(packed(), params=spoilt('scale'))
  with pytest.raises(ValueError, match='norm_out.scale.*NaN'):
    msfp.save(tmp_path / 'm.safetensors', model)
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('labels, message', [
    (np.array([3, 1]), 'from 1 to 3, of which the model has 0 to 2'),
    (np.array([-1, 1]), 'from -1 to 1'),
    (np.array([1]), r'int32 \[2\], not int64 \[1\]'),
    (np.array(1), r'int32 \[2\]'), (np.ones((2, 1), int), r'int32 \[2\]'),
    (np.array([1.0, 0.0]), 'not float64'),
    (np.array([True, False]), 'not bool'),
    ([1, 0], 'a list')])
def test_labels(labels, message):
  noise = tiny.noise(0, 2)
  with pytest.raises(ValueError, match=f'labels: .*{message}'):
    batches.check_inputs(LABELLED, noise, (labels,))


def test_labels_of_guidance_stay_below_that_of_none():
  noise, model = tiny.noise(0, 2), Guided(LABELLED, 2.0, 2)
  batches.check_inputs(model, noise, (np.array([0, 1]),))
  with pytest.raises(ValueError, match='0 to 1'):
    batches.check_inputs(model, noise, (np.array([2, 1]),))


@pytest.mark.parametrize('shape, dtype, fits', [
    ((2, 3, 6), np.float32, True), ((2, 77, 6), jnp.bfloat16, True),
    ((1, 3, 6), np.float32, False), ((2, 3, 5), np.float32, False),
    ((2, 6), np.float32, False), ((2, 3, 6), np.int32, False)])
def test_contexts_have_any_length(shape, dtype, fits):
  noise, context = tiny.noise(0, 2), jnp.ones(shape, dtype)
  check = lambda: batches.check_inputs(TEXT, noise, (context,))
  if fits:
    check()
    jax.jit(lambda c: batches.check_inputs(TEXT, noise, (c,)))(context)
  else:
    with pytest.raises(ValueError, match=r'context: .*\[2, any, 6\]'):
      check()


def test_a_plan_beyond_the_schedule_of_a_model_of_v():
  bar = tuple(np.linspace(0.9, 0.1, 100).tolist())
  model, params = AsNoise(tiny.UNET, 'v', bar), tiny.params(tiny.UNET)
  spec = msfp.calibrate(model, params, recipe='nvfp4')
  with pytest.raises(ValueError, match='0 to 750.*schedule of 0 to 99'):
    msfp.pack(model, params, spec, tiny.PLAN)


def plan(name='ddim', **options):
  return msfp.make_plan(tiny.SCHEDULE, name, **{'num_steps': 4} | options)


def schedule(**options):
  return msfp.make_schedule('cosine', **options)


@pytest.mark.parametrize('error, work, message', [
    (ValueError, lambda: plan(num_steps=20.0), 'num_steps=20.0.*whole'),
    (ValueError, lambda: plan(num_steps=True), 'num_steps=True'),
    (ValueError, lambda: plan(num_steps='4'), "num_steps='4'"),
    (ValueError, lambda: plan(offset=0.5), 'offset=0.5'),
    (ValueError, lambda: plan(eta='1'), "eta='1'"),
    (ValueError, lambda: plan(eta=1.5), r'eta=1.5: must be in \[0, 1\]'),
    (TypeError, lambda: msfp.make_plan('linear', 'ddim', num_steps=4),
     "schedule is 'linear'"),
    (ValueError, lambda: schedule(num_train_steps=1.5), 'num_train_steps=1.5'),
    (ValueError, lambda: schedule(num_train_steps=9, offset=-2), 'offset=-2'),
    (TypeError, lambda: msfp.calibrate(
        tiny.UNET, tiny.params(tiny.UNET), recipe=msfp.RECIPES['msfp']),
     'a Recipe.*RECIPES'),
    (TypeError, lambda: msfp.calibrate(
        None, tiny.params(tiny.UNET), recipe='nvfp4'), 'model is None'),
    (ValueError, lambda: msfp.calibrate(
        tiny.UNET, tiny.params(tiny.UNET), activations={}, plan=tiny.PLAN),
     'plan beside activations'),
    (ValueError, lambda: msfp.load_pretrained('digits16', config='a.yaml'),
     'digits16 describes itself.*a.yaml'),
    (ValueError, lambda: msfp.load_plan('digits16', config='a.yaml'),
     'digits16 describes itself'),
    (ValueError, lambda: plan(num_steps=None), 'num_steps=None'),
    (ValueError, lambda: msfp.calibrate(
        LABELLED, tiny.params(tiny.UNET), plan=tiny.PLAN, batches=[
            (tiny.noise(0, 2), np.array([0, label])) for label in (1, 7)]),
     'labels from 0 to 7'),
    (ValueError, lambda: data.load('digits', 'cifar'), 'path=cifar.*digits'),
    (ValueError, lambda: data.load('synthetic', '1x0x8'), '1x0x8'),
    (ValueError, lambda: study.run('digits.py:table', 'w', seeds=[]), 'seeds'),
    (ValueError, lambda: study.run('digits.py:table', 'w', rows=[]), 'rows'),
])
def test_by_name(error, work, message):
  with pytest.raises(error, match=message):
    work()


def test_a_file_of_ours_describes_itself(tmp_path):
  (tmp_path / 'a.yaml').write_text('model: {}')
  path, config = str(native.SHIPPED['digits16']), str(tmp_path / 'a.yaml')
  for work in (msfp.load_pretrained, msfp.load_plan):
    with pytest.raises(ValueError, match='digits16.safetensors describes its'):
      work(path, config=config)


@pytest.mark.parametrize('name, more, message', [
    ('here.safetensors', {}, 'is a folder'),
    ('file/m.safetensors', {}, 'file is a file'),
    ('m.safetensors', {'plan': tiny.PLAN, 'num_steps': 4}, 'num_steps=4')])
def test_before_a_checkpoint_is_packed(tmp_path, name, more, message):
  (tmp_path / 'here.safetensors').mkdir()
  (tmp_path / 'file').write_text('x')
  with pytest.raises(ValueError, match=message):
    msfp.pack_streamed('digits16', tmp_path / name, **more)
  assert len([*tmp_path.rglob('*')]) == 2
