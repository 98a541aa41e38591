"""The library as README shows it: from a model to a file that samples."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import msfp_jax as msfp
from msfp_jax.models.unet import UNet
from msfp_jax.models.unet import UNetConfig
from msfp_jax.packed import model as packed_lib
from msfp_jax.quant import fit
from msfp_jax.quant import interception
from msfp_jax.quant.around import Around
from msfp_jax.quant.around import FindAround

MODEL = UNet(UNetConfig(
    image_size=8, in_channels=1, out_channels=1, ch=8, ch_mult=(1,),
    num_res_blocks=0, attn_resolutions=(), norm_groups=4, dropout=0.0))


@pytest.fixture(scope='module')
def setting():
  """A model, its parameters, a plan, starting noise, and a spec for them."""
  noise = tiny.noise(0, batch=2)
  params = jax.jit(MODEL.init)(jax.random.key(0), noise, jnp.zeros(2))['params']
  schedule = msfp.make_schedule(
      'linear', num_train_steps=1000, beta_start=1e-4, beta_end=0.02)
  plan = msfp.make_plan(schedule, 'ddim', num_steps=2)
  spec = msfp.calibrate(
      MODEL, params, recipe='msfp', bits=4, batches=noise, plan=plan)
  return params, plan, noise, spec


def test_calibrate_pack_save_load_sample(setting, tmp_path):
  """One array of noise is a batch; a file samples as what was packed."""
  params, plan, noise, spec = setting
  packed = msfp.pack(MODEL, params, spec, plan)
  msfp.save(tmp_path / 'model.safetensors', packed)
  loaded = msfp.load(tmp_path / 'model.safetensors')
  images = loaded.sample(noise)
  assert images.shape == noise.shape and np.isfinite(images).all()
  np.testing.assert_array_equal(images, packed.sample(noise))
  full = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
  assert packed.stored_bytes < full / 3
  assert (tmp_path / 'model.safetensors').stat().st_size < full / 2


@pytest.mark.long
def test_a_batch_alone_is_a_list_of_one(setting):
  params, plan, noise, spec = setting
  listed = msfp.calibrate(
      MODEL, params, recipe='msfp', bits=4, batches=[noise], plan=plan)
  assert listed.to_json() == spec.to_json()
  tuples = msfp.calibrate(MODEL, {'params': params}, batches=[(noise,)],
                          plan=plan)
  assert tuples.to_json() == spec.to_json()


def test_the_packed_model_samples_what_the_quantized_one_predicts(setting):
  """msfp.sample with QuantizedModel.apply, a step of the sampler at a time."""
  params, plan, noise, spec = setting
  qparams = msfp.quantize(params, spec)
  model = msfp.QuantizedModel(MODEL, spec)
  by_hand = jax.jit(lambda noise: msfp.sample(
      lambda x, t, index: model.apply(qparams, x, t), plan, noise))(noise)
  packed = msfp.pack(MODEL, params, spec, plan).sample(noise)
  np.testing.assert_allclose(
      packed, by_hand, rtol=1e-4, atol=1e-4 * np.abs(by_hand).max())


@pytest.mark.slow
def test_quantized_parameters_with_or_without_their_name(setting):
  params, _, noise, spec = setting
  model, qparams = msfp.QuantizedModel(MODEL, spec), msfp.quantize(params, spec)
  predict = jax.jit(model.apply)
  out = predict(qparams, noise, jnp.full(2, 500.0))
  np.testing.assert_array_equal(
      predict({'params': qparams}, noise, jnp.full(2, 500.0)), out)
  named = msfp.quantize({'params': params}, spec)
  assert jax.tree.structure(named) == jax.tree.structure(qparams)
  assert np.abs(out - MODEL.apply(
      {'params': params}, noise, jnp.full(2, 500.0))).max() > 1e-3


@pytest.mark.parametrize('noise, part', [
    (lambda noise: noise.astype(jnp.float16), 'float16: a sampler starts from'),
    (lambda noise: noise.astype(int), 'a sampler starts from standard normal'),
    (lambda noise: noise.tolist(), 'a list: it must be an array of noise'),
    (lambda noise: None, 'None'),
    (lambda noise: noise[:0], r'shape \(0, 8, 8, 1\)')])
def test_noise_that_no_sampler_starts_from(setting, noise, part):
  """One sentence, from calibration and from sampling."""
  params, plan, good, spec = setting
  with pytest.raises(ValueError, match=part):
    msfp.pack(MODEL, params, spec, plan).sample(noise(good))
  with pytest.raises(ValueError, match=part):
    msfp.calibrate(MODEL, params, batches=[noise(good)], plan=plan)


def test_arguments_of_another_kind_get_a_sentence(setting, tmp_path):
  params, plan, noise, spec = setting
  made = msfp.pack(MODEL, params, spec, plan)
  for call, message in (
      (lambda: msfp.calibrate(MODEL, params, batches=noise, plan='ddim'),
       "plan is 'ddim': it must be what msfp.make_plan"),
      (lambda: msfp.pack(MODEL, params, spec, None),
       'plan is None: it must be what msfp.make_plan'),
      (lambda: msfp.pack(MODEL, params, None, plan),
       'spec is None: it must be what msfp.calibrate'),
      (lambda: msfp.save(tmp_path / 'a', 'x'),
       "model is 'x': it must be what msfp.pack"),
      (lambda: msfp.load(None), 'path is None: it must be'),
      (lambda: msfp.load([1]), 'path is a list: it must be')):
    with pytest.raises(TypeError, match=message):
      call()
  for inputs, message in (
      ((noise[0],), r'write noise\[None\]'),
      ((jnp.concatenate([noise] * 3, -1),), r'denoises \[B, 8, 8, 1\]'),
      ((noise, jnp.zeros(2)), '1 conditions beside the noise.*none')):
    with pytest.raises(ValueError, match=message):
      made.sample(*inputs)
  assert not list(tmp_path.iterdir())


def test_models_of_this_package_are_traced_without_batches(
    setting, monkeypatch):
  """What cannot be quantized is refused before anything is written."""
  params, _, _, _ = setting
  traced = []
  known = interception.list_layers
  monkeypatch.setattr(interception, 'list_layers', lambda *inputs: (
      traced.append(inputs), known(*inputs))[1])
  msfp.calibrate(MODEL, params, recipe='nvfp4')
  assert [inputs[2].shape for inputs in traced] == [(1, 8, 8, 1)]


def test_a_spec_survives_its_file(setting, tmp_path):
  params, plan, noise, spec = setting
  spec.save(tmp_path / 'spec.json')
  again = msfp.QuantSpec.load(tmp_path / 'spec.json')
  ours, theirs = (msfp.pack(MODEL, params, one, plan) for one in (again, spec))
  tiny.assert_trees_equal(ours.layers, theirs.layers)


def test_modules_and_functions_do_not_hide_each_other():
  """`msfp.calibrate` is the function, `quant.calibrate` its module."""
  from msfp_jax.packed import model as model_module
  from msfp_jax.quant import calibrate
  from msfp_jax.quant import quantize

  assert isinstance(calibrate, types.ModuleType)
  assert calibrate.calibrate is msfp.calibrate
  assert isinstance(quantize, types.ModuleType)
  assert quantize.quantize is msfp.quantize
  assert isinstance(model_module, types.ModuleType)
  assert model_module.pack is msfp.pack
  for name in msfp.__all__:
    assert not isinstance(getattr(msfp, name), types.ModuleType), name


class Own(nn.Module):
  """Somebody's model, which files do not describe."""

  @nn.compact
  def __call__(self, x, t):
    h = nn.Conv(8, (3, 3), name='first')(x)
    h += nn.Dense(8, name='time')(t[:, None] / 1000)[:, None, None]
    return nn.Conv(1, (3, 3), name='last')(nn.silu(h))


@pytest.mark.slow
def test_a_model_and_a_recipe_of_ones_own(tmp_path, monkeypatch):
  """A recipe is one entry; the model is passed to load."""
  msfp_signed = msfp.RECIPES['signed_fp']
  monkeypatch.setitem(msfp.RECIPES, 'mine', msfp.Recipe(
      weight=msfp_signed.weight, nal=msfp_signed.nal, aal=msfp_signed.aal))
  model, noise = Own(), tiny.noise(0, batch=2)
  params = jax.jit(model.init)(jax.random.key(0), noise, jnp.zeros(2))
  spec = msfp.calibrate(
      model, params, recipe='mine', bits=6, batches=noise, plan=tiny.PLAN,
      roles={'all': '.*'})
  packed = msfp.pack(model, params, spec, tiny.PLAN)
  msfp.save(tmp_path / 'own', packed)
  with pytest.raises(ValueError, match=r'load\(path, model='):
    msfp.load(tmp_path / 'own')
  np.testing.assert_array_equal(
      msfp.load(tmp_path / 'own', model=model).sample(noise),
      packed.sample(noise))


class Everything(FindAround):
  """Smoothing, rotation and a branch of rank 1."""

  needs = (fit.CHANNEL_MAXIMA, fit.ROWS)

  def __call__(self, trial):
    kernel = trial.kernel
    smooth = jnp.asarray(
        np.sqrt(trial.seen.channel_maxima + 1e-3), jnp.float32)
    channels = kernel.shape[-2]
    around = Around(smooth, rotation=channels & -channels)
    moved = np.asarray(around.moved(kernel))
    u, s, v = np.linalg.svd(
        moved.reshape(-1, moved.shape[-1]), full_matrices=False)
    down = (u[:, :1] * s[:1]).reshape(*moved.shape[:-1], 1)
    return around.replace(down=jnp.asarray(down, jnp.bfloat16),
                          up=jnp.asarray(v[:1], jnp.bfloat16))


@pytest.mark.slow
def test_what_stands_around_goes_all_the_way(tmp_path, monkeypatch):
  """Calibrated, simulated, packed, saved and loaded, without a loss of its own.

  In 8 bits the model is nearly the full-precision one: factors, rotation and
  branch cancel out.
  """
  searched = fit.Searched((fit.SIGNED,))
  monkeypatch.setitem(msfp.RECIPES, 'everything', msfp.Recipe(
      weight=searched, nal=searched, aal=searched, around=Everything()))
  model, noise = Own(), tiny.noise(0, batch=2)
  params = jax.jit(model.init)(jax.random.key(0), noise, jnp.zeros(2))
  spec = msfp.calibrate(
      model, params, recipe='everything', bits=8, batches=noise,
      plan=tiny.PLAN, roles={'all': '.*'})
  assert {name: layer.around.rotation for name, layer in spec.layers.items()
          } == {'first': 1, 'time': 1, 'last': 8}
  simulated = packed_lib.simulate(model, params, spec, tiny.PLAN)
  packed = msfp.pack(model, params, spec, tiny.PLAN)
  msfp.save(tmp_path / 'model', packed)
  spec.save(tmp_path / 'spec')
  loaded = msfp.load(tmp_path / 'model', model=model)
  of_file = msfp.pack(
      model, params, msfp.QuantSpec.load(tmp_path / 'spec'), tiny.PLAN)
  expected = simulated.sample(noise)
  for other in (packed, loaded, of_file):
    np.testing.assert_array_equal(other.sample(noise), expected)
  # As large as what the sampler ends with, after which the ranges are.
  x, t = 15 * tiny.noise(1, batch=2), jnp.zeros(2)
  full = model.apply(params, x, t)
  found = loaded.eps_fn(x, t, 3)
  assert 0 < np.abs(found - full).max() < 0.03 * np.abs(full).max()
