"""LoRAs read from files are what their makers added to the weights."""

import functools
import re
import sys

import families
import flux_oracle
import foreign
import hub_cache
import jax
import lora_files
import ml_dtypes
import numpy as np
import pytest
import text_oracle
import unet_oracle

import msfp_jax as msfp
from msfp_jax import convert
from msfp_jax.convert import lora as lora_lib
from msfp_jax.models.flux import Flux
from msfp_jax.models.guided import GuidedByText
from msfp_jax.models.prediction import AsNoise
from msfp_jax.models.unet import UNet


@functools.cache
def flux(name='tiny'):
  """(model, state dict in diffusers' names, what makes our parameters of it).
  """
  config = flux_oracle.CONFIGS[name]
  return Flux(config), flux_oracle.state_of(config), flux_oracle.params_of


@functools.cache
def unet(name='sd1'):
  """The same of a UNet."""
  config = families.CONFIGS[name]
  state = families.state_of(config)
  theirs = foreign.diffusers(state, config)
  # Modules in the order of ours: a rename alone.
  names = dict(zip(theirs, state, strict=True))
  return UNet(config), theirs, lambda changed: unet_oracle.from_state_dict(
      config, {names[name]: value.reshape(state[names[name]].shape)
               for name, value in changed.items()})


def lora_of(state, **options):
  return lora_files.draw(
      {name: value.shape for name, value in state.items()
       if value.ndim > 1 and 'class_embedding' not in name}, **options)


def assert_adds(case, path, lora, scale, strength=1.0):
  """What is read and merged is W + strength scale up down, in NumPy."""
  model, state, params_of = case
  read = msfp.load_lora(path, model)
  actual = msfp.merge_loras(params_of(state), [(read, strength)])
  expected = params_of(lora_files.added(state, lora, strength * scale))
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6,
                                 atol=1e-6), actual, expected)
  return read


@pytest.mark.parametrize('name', ['tiny', 'guided'])
@pytest.mark.parametrize('naming', [
    'diffusers', 'PEFT', 'adapter', 'no prefix', 'kohya', 'bfl', 'kohya bfl',
    'xlabs'])
def test_every_layer_of_flux(tmp_path, name, naming):
  """Fused modules too, and the halves that our layers have of proj_out."""
  case = model, state, _ = flux(name)
  lora = lora_of(state)
  if naming == 'xlabs':
    lora = {module: halves for module, halves in lora.items() if re.search(
        r'attn\.to_|attn\.add_|single.*\.proj_out', module)}
  of_bfl = lambda: lora_files.bfl(lora_of(state), model.config)
  tensors = {
      'diffusers': lambda: lora_files.peft(lora),
      'PEFT': lambda: lora_files.peft(lora, 'base_model.model.'),
      'adapter': lambda: lora_files.peft(lora, adapter='.default_0'),
      'no prefix': lambda: lora_files.peft(lora, ''),
      'kohya': lambda: lora_files.kohya(lora, 'lora_transformer_'),
      'bfl': lambda: lora_files.peft(of_bfl(), 'diffusion_model.'),
      'kohya bfl': lambda: lora_files.kohya(of_bfl()),
      'xlabs': lambda: lora_files.xlabs(of_bfl())}[naming]()
  path = lora_files.write(tmp_path / 'a.safetensors', tensors)
  beside = tmp_path / 'adapter_config.json'
  if naming == 'PEFT':  # which has alpha in no other place
    beside.write_text('{"lora_alpha": 4}')
  read = assert_adds(case, path, lora, 2 if beside.exists() else 1)
  if naming != 'xlabs':
    assert read.layers.keys() == flux_oracle.layers(model.config).keys()


_slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize('name, naming', [
    ('sd1', 'diffusers'), ('sd1', 'old'), ('sd1', 'kohya'), ('sd1', 'compvis'),
    ('unet2d_relative', 'diffusers'), ('unet2d_relative', 'kohya'),
    _slow('sd2', 'diffusers'), _slow('sd2', 'old'), _slow('sd2', 'kohya'),
    _slow('sd2', 'compvis'), _slow('unet2d_relative', 'old')])
def test_every_layer_of_unets(tmp_path, name, naming):
  """Convolutions among them, of 3x3 and of 1x1, with strides and without."""
  case = model, state, _ = unet(name)
  lora = lora_of(state)
  if naming == 'compvis':
    # Their names of the same modules, by way of ours.
    ours = families.state_of(model.config)
    theirs = foreign.ldm(ours, model.config)
    names = dict(zip(state, theirs, strict=True))
    tensors = lora_files.kohya({
        names[f'{module}.weight'].removesuffix('.weight'): halves
        for module, halves in lora.items()})
  else:
    tensors = {'diffusers': lambda: lora_files.peft(lora, 'unet.'),
               'old': lambda: lora_files.old_diffusers(lora),
               'kohya': lambda: lora_files.kohya(lora)}[naming]()
  path = lora_files.write(tmp_path / 'a.safetensors', tensors)
  read = assert_adds(case, path, lora, 1, strength=-0.5)
  kernels = [k for k, v in state.items() if v.ndim > 1
             and 'class_embedding' not in k]
  assert len(read.layers) == len(kernels)


def test_dense_layers_stand_for_convolutions_over_a_point(tmp_path):
  """And the other way round: Stable Diffusion 1 and 2 differ so."""
  case = _, state, _ = unet()
  # Dense layers, and convolutions of 1x1, here and there.
  lora = lora_of(state, only=r'proj_in|attn1\.to_q|conv_shortcut')
  for axes in ((), (1, 1)):
    path = lora_files.write(
        tmp_path / f'{len(axes)}.safetensors', lora_files.peft({
            module: tuple(half.reshape(*half.shape[:2], *axes)
                          for half in halves)
            for module, halves in lora.items()}, 'unet.'))
    assert_adds(case, path, lora, 1)


def test_names_of_one_lora_give_the_same_arrays(tmp_path):
  """Of the type that the file has."""
  model, state, _ = unet()
  lora = lora_of(state, only='attn|conv1', dtype=np.float16)
  files = {'diffusers': lora_files.peft(lora, 'unet.'),
           'old': lora_files.old_diffusers(lora),
           'kohya': lora_files.kohya(lora, alpha=2)}
  read = [msfp.load_lora(lora_files.write(tmp_path / f'{name}.safetensors', t),
                         model).layers for name, t in files.items()]
  for other in read[1:]:
    assert other.keys() == read[0].keys()
    for name, (down, up, scale) in read[0].items():
      assert down.dtype == up.dtype == np.float16
      np.testing.assert_array_equal(other[name].down, down)
      np.testing.assert_array_equal(other[name].up, up)
      assert other[name].scale == scale == 1


@pytest.mark.parametrize('alpha, scale', [(None, 1), (8, 2), (1, 0.25)])
def test_alpha_of_kohya(tmp_path, alpha, scale):
  """Over the rank; where there is none, it is the rank."""
  case = _, state, _ = flux()
  lora = lora_of(state, rank=4, only='to_add_out')
  path = lora_files.write(tmp_path / 'a.safetensors', lora_files.kohya(
      lora, 'lora_transformer_', alpha))
  assert_adds(case, path, lora, scale)


CONFIG = {'peft_type': 'LORA', 'r': 4, 'lora_alpha': 8, 'use_dora': False,
          'target_modules': ['to_q'], 'bias': 'none', 'alpha_pattern': {}}


@pytest.mark.parametrize('changes, scales', [
    ({}, (2, 2)), ({'use_rslora': True}, (4, 4)),
    ({'alpha_pattern': {'attn.to_q': 2}}, (0.5, 2)),
    ({'alpha_pattern': {'to_q': 2, '^transformer_blocks.0.attn.to_k$': 4}},
     (0.5, 1)),
    ({'alpha_pattern': {'o_q': 2, '^attn.to_k': 4}}, (2, 2))])
@pytest.mark.parametrize('where', ['header', 'alone', 'beside'])
def test_alpha_of_peft(tmp_path, changes, scales, where):
  """In the header of diffusers' files, or in the file beside PEFT's own."""
  _, state, _ = flux()
  lora = lora_of(state, rank=4, only=r'blocks\.0\.attn\.to_[qk]')
  config = CONFIG | changes
  if where == 'alone':  # as `save_lora_adapter` of diffusers' models has it
    path = lora_files.write(
        tmp_path / 'pytorch_lora_weights.safetensors',
        lora_files.peft(lora, ''), lora_adapter_metadata=config)
  elif where == 'header':
    path = lora_files.write(
        tmp_path / 'pytorch_lora_weights.safetensors', lora_files.peft(lora),
        lora_adapter_metadata={f'transformer.{key}': value
                               for key, value in config.items()} | {
                                   'text_encoder.lora_alpha': 99})
  else:
    path = lora_files.write(
        tmp_path / 'adapter_model.safetensors',
        lora_files.peft(lora, 'base_model.model.'))
    (tmp_path / 'adapter_config.json').write_text(lora_files.json.dumps(config))
  # A folder is opened by what its file is called.
  layers = msfp.load_lora(path.parent, flux()[0]).layers
  assert (layers['transformer_blocks.0.attn.to_q'].scale,
          layers['transformer_blocks.0.attn.to_k'].scale) == scales


def test_peft_without_its_configuration(tmp_path):
  """Its alpha is not known, and not 1."""
  model, state, _ = flux()
  path = lora_files.write(
      tmp_path / 'adapter_model.safetensors',
      lora_files.peft(lora_of(state, only='to_q'), 'base_model.model.'))
  with pytest.raises(ValueError, match='alpha in a adapter_config.json'):
    msfp.load_lora(path, model)


@pytest.mark.parametrize('first', ['ours', 'bfl'])
def test_two_halves_of_one_place(tmp_path, first):
  """Neither is dropped, in whichever order the file has them."""
  model, state, _ = flux()
  lora = lora_of(state)
  parts = {'ours': lora_files.peft(lora), 'bfl': lora_files.peft(
      lora_files.bfl(lora, model.config), 'diffusion_model.')}
  tensors = parts.pop(first) | parts.popitem()[1]
  path = lora_files.write(tmp_path / 'a.safetensors', tensors)
  with pytest.raises(ValueError, match='to_q|img_attn.qkv'):
    msfp.load_lora(path, model)


@pytest.mark.parametrize('file', ['', '/adapter_model.safetensors'])
def test_a_lora_of_the_hub(tmp_path, monkeypatch, file):
  """With PEFT's configuration, without which its strength is another."""
  model, state, _ = flux()
  folder = tmp_path / 'saved'
  folder.mkdir()
  lora_files.write(folder / 'adapter_model.safetensors', lora_files.peft(
      lora_of(state, rank=4, only='to_q'), 'base_model.model.'))
  (folder / 'adapter_config.json').write_text(lora_files.json.dumps(CONFIG))
  module = hub_cache.stand_in(tmp_path / 'cache', {
      'a/b': hub_cache.files_in(folder) | {'README.md': b'x'}})
  monkeypatch.setitem(sys.modules, 'huggingface_hub', module)
  layers = msfp.load_lora(f'hf:a/b{file}', model).layers
  assert {layer.scale for layer in layers.values()} == {2}
  assert sorted(module.taken) == [
      'adapter_config.json', 'adapter_model.safetensors']


@pytest.mark.parametrize('changes, part', [
    ({'use_dora': True}, 'use_dora=True'),
    ({'lora_bias': True}, 'lora_bias=True'), ({'bias': 'all'}, "bias='all'"),
    ({'init_lora_weights': 'pissa'}, "init_lora_weights='pissa'"),
    ({'peft_type': 'LOHA'}, "peft_type='LOHA'"),
    ({'a_new_key': 1}, r'a_new_key=1 \(unknown\)'),
    ({'lora_alpha': '8'}, "lora_alpha='8'"),
    ({'alpha_pattern': {'.*to_q': 2}}, 'alpha_pattern=')])
def test_keys_of_peft_that_are_refused(tmp_path, changes, part):
  model, state, _ = flux()
  path = lora_files.write(
      tmp_path / 'a.safetensors', lora_files.peft(lora_of(state, only='to_q')),
      lora_adapter_metadata={f'transformer.{key}': value
                             for key, value in (CONFIG | changes).items()})
  with pytest.raises(ValueError, match=part):
    msfp.load_lora(path, model)


def broken(lora):
  """A file for each kind of what is refused: (tensors, part of the message)."""
  names = lora_files.peft(lora)
  first = next(iter(lora))
  key = lambda end: f'transformer.{first}.{end}'
  down, up = lora[first]
  change = lambda **new: names | {
      key(name.replace('__', '.')): value for name, value in new.items()}
  bad = np.full_like(down, np.inf)
  other = np.zeros((len(down), down.shape[1] + 1), down.dtype)
  return {
      'DoRA': (change(lora_magnitude_vector=up[:, 0]),
               f'{key("lora_magnitude_vector")} is no half of a LoRA'),
      'kohya DoRA': (change(dora_scale=up), 'dora_scale is no half'),
      'LoKr': (change(lokr_w1=up), 'lokr_w1 is no half'),
      'LoHa': (change(hada_w1_a=up), 'hada_w1_a is no half'),
      'mid': (change(lora_mid__weight=up), 'lora_mid.weight is no half'),
      'bias': (change(lora_B__bias=up[:, 0]), 'lora_B.bias is no half'),
      'whole': (change(diff=up), 'diff is no half'),
      'norm': (names | {'transformer.norm.weight': up}, 'norm.weight is no'),
      'no up': ({n: v for n, v in names.items() if n != key('lora_B.weight')},
                f'{key("").rstrip(".")} has no up'),
      'twice': (change(lora_down__weight=down), 'a second one for'),
      'shape': (change(lora_A__weight=other), 'does not fit a layer of'),
      'ranks': (change(lora_A__weight=down[:1]), 'is no product'),
      'type': (change(lora_A__weight=down.astype(np.int32)), 'int32'),
      'not finite': (change(lora_A__weight=bad),
                     f'holds {bad.size} values that are not finite'),
      'alpha 0': (change(alpha=np.float32(0)), 'alpha that is 0'),
      'alpha nan': (change(alpha=np.float32(np.nan)), 'or no number'),
      'alphas': (change(alpha=np.ones(3, np.float32)), 'or no number')}


KINDS = broken({'x': (np.ones((2, 3)), np.ones((4, 2)))})


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_no_plain_lora_is_refused_by_name(tmp_path, kind):
  model, state, _ = flux()
  tensors, part = broken(lora_of(state, only='to_add_out'))[kind]
  path = lora_files.write(tmp_path / 'a.safetensors', tensors)
  with pytest.raises(ValueError) as error:
    msfp.load_lora(path, model)
  assert part in str(error.value) and str(path) in str(error.value)


def test_changes_of_0_are_none(tmp_path):
  """Trainers write them for what they did not train."""
  case = _, state, _ = flux()
  lora = lora_of(state, only='to_add_out')
  zero = np.zeros(16, np.float16)
  path = lora_files.write(tmp_path / 'a.safetensors', lora_files.kohya(
      lora, 'lora_transformer_') | {
          'lora_transformer_proj_out.diff_b': zero,
          'lora_transformer_x_embedder.diff': zero})
  assert_adds(case, path, lora, 1)


def test_all_misfits_are_listed_those_alike_as_one(tmp_path):
  """A FLUX LoRA for a UNet, and one of a wider FLUX."""
  _, state, _ = flux()
  path = lora_files.write(
      tmp_path / 'a.safetensors', lora_files.peft(lora_of(state)))
  with pytest.raises(ValueError) as error:
    msfp.load_lora(path, unet()[0])
  lines = str(error.value).splitlines()
  assert 'is no LoRA for this model' in lines[0]
  assert ('  transformer.transformer_blocks.*.attn.to_q is no layer of the '
          'model (2 of them)') in lines
  with pytest.raises(ValueError, match='does not fit a layer of') as error:
    msfp.load_lora(path, flux('guided')[0])
  assert 'transformer.x_embedder of down [2, 12]' in str(error.value)


def test_nothing_is_read_of_what_is_refused(tmp_path, monkeypatch):
  _, state, _ = flux()
  path = lora_files.write(
      tmp_path / 'a.safetensors', lora_files.peft(lora_of(state)))
  monkeypatch.setattr(
      convert.source, '_safetensors_reader',
      lambda path, name: lambda: pytest.fail(f'read {name}'))
  with pytest.raises(ValueError, match='no LoRA for this model'):
    msfp.load_lora(path, flux('guided')[0])


@pytest.mark.parametrize('name, content, error, part', [
    ('a.safetensors', None, FileNotFoundError, 'no LoRA at'),
    ('', None, FileNotFoundError, 'no LoRA in'),
    ('a.pt', b'\x80\x04', ValueError, 'from .safetensors files alone'),
    ('a.safetensors', b'nothing', ValueError, 'is no safetensors file')])
def test_files_that_are_none(tmp_path, name, content, error, part):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(error, match=part):
    msfp.load_lora(tmp_path / name, flux()[0])


def test_models_of_no_known_kind():
  with pytest.raises(TypeError, match='it must be what msfp.load_pretrained'):
    msfp.load_lora('a.safetensors', None)


def test_guidance_and_v_have_the_layers_of_what_they_wrap(tmp_path):
  model, state, _ = unet()
  path = lora_files.write(tmp_path / 'a.safetensors', lora_files.kohya(
      lora_of(state, only='attn1')))
  plain = msfp.load_lora(path, model)
  wrapped = GuidedByText(AsNoise(model, 'v', (0.9, 0.5)), 3.0)
  assert msfp.load_lora(path, wrapped).layers.keys() == plain.layers.keys()


def text_encoder(tmp_path, kind):
  config, shapes = {'clip': (text_oracle.CLIP, text_oracle.clip_shapes),
                    't5': (text_oracle.T5, text_oracle.t5_shapes)}[kind]
  state = text_oracle.state_of(shapes(config))
  text_oracle.write(tmp_path / kind, config, state)
  return (*convert.load_text_encoder(tmp_path / kind), config, state)


@pytest.mark.parametrize('kind, prefix, naming', [
    ('clip', 'lora_te_', 'kohya'), ('clip', 'lora_te1_', 'kohya'),
    ('clip', 'text_encoder.', 'peft'), ('clip', 'text_encoder.', 'linear'),
    ('clip', 'text_encoders.clip_l.transformer.', 'peft'),
    ('t5', 'lora_te3_', 'kohya'), ('t5', 'text_encoder_2.', 'peft')])
def test_text_encoders(tmp_path, caplog, kind, prefix, naming):
  """Each model has its own part of a file, and the rest is counted."""
  model, params, config, state = text_encoder(tmp_path, kind)
  lora = lora_of({
      name: value for name, value in state.items() if re.search(
          r'layers|block', name) and 'relative' not in name})
  tensors = {
      'kohya': lambda: lora_files.kohya(lora, prefix),
      'peft': lambda: lora_files.peft(lora, prefix),
      'linear': lambda: {
          f'{prefix}{module}.lora_linear_layer.{half}.weight': value
          for module, halves in lora.items()
          for half, value in zip(('down', 'up'), halves, strict=True)}}[
              naming]()
  ours, flux_state, _ = flux()
  of_flux = lora_of(flux_state, only='to_q')
  path = lora_files.write(tmp_path / 'a.safetensors', tensors
                          | lora_files.peft(of_flux))
  read = msfp.load_lora(path, model)
  assert len(read.layers) == len(lora)
  assert read.left_out == {'the denoiser': len(of_flux)}
  # The same change in a file of the encoder's own.
  changed = {name: np.float32(value) for name, value in lora_files.added(
      state, lora, 0.5).items()}
  text_oracle.write(tmp_path / 'changed', config, changed)
  _, expected = convert.load_text_encoder(tmp_path / 'changed')
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6,
                                 atol=1e-6),
               msfp.merge_loras(params, [(read, 0.5)]), expected)
  caplog.clear()
  assert len(msfp.load_lora(path, ours).layers) == len(of_flux)
  assert f"'s text encoder ({len(lora)}) are not for this model" in caplog.text
  assert convert.holds_lora(path, model) and convert.holds_lora(path, ours)


def test_a_file_for_text_encoders_alone_has_nothing_for_a_denoiser(tmp_path):
  _, _, _, state = text_encoder(tmp_path, 'clip')
  lora = lora_of({n: v for n, v in state.items() if 'layers' in n})
  path = lora_files.write(tmp_path / 'a.safetensors', lora_files.kohya(
      lora, 'lora_te_'))
  with pytest.raises(ValueError, match=(
      rf"nothing for the denoiser, but modules of CLIP's .*\({len(lora)}\)")):
    msfp.load_lora(path, flux()[0])


def of_layers(layers, source='mine'):
  return lora_lib.Lora(source, {
      name: lora_lib.LowRank(np.float32(down), np.float32(up), 1.0)
      for name, (down, up) in layers.items()})


PARAMS = {'a': {'kernel': np.ones((3, 4), np.float32), 'bias': np.ones(4)},
          'b': {'kernel': np.ones((3, 3, 3, 4), ml_dtypes.bfloat16)}}
LORA = of_layers({'a': (np.ones((3, 1)), 2 * np.ones((1, 4))),
                  'b': (np.ones((3, 3, 3, 1)), np.ones((1, 4)))})


def test_merged_weights_keep_their_type_and_their_names():
  merged = msfp.merge_loras({'params': PARAMS}, [(LORA, 0.5), (LORA, 1)])
  np.testing.assert_array_equal(merged['params']['a']['kernel'], 4)
  assert merged['params']['b']['kernel'].dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(
      np.float32(merged['params']['b']['kernel']), 2.5)
  assert merged['params']['a']['bias'] is PARAMS['a']['bias']
  np.testing.assert_array_equal(PARAMS['a']['kernel'], 1)


def test_strength_0_merges_nothing():
  merged = msfp.merge_loras(PARAMS, [(LORA, 0.0)])
  assert merged['a']['kernel'] is PARAMS['a']['kernel']


@pytest.mark.parametrize('loras, error, part', [
    ([LORA], TypeError, 'must be pairs'), ([('x', 1)], TypeError, "is 'x'"),
    ([(LORA, '1')], ValueError, "strength '1' of mine"),
    ([(LORA, np.nan)], ValueError, 'strength nan'),
    ([(LORA, None)], ValueError, 'strength None'),
    ([(of_layers({'c': (np.ones((3, 1)), np.ones((1, 4)))}), 1)], ValueError,
     r"mine belongs to another model: 1 of its 1 layers.*\['c'\]"),
    ([(of_layers({'a': (np.ones((2, 1)), np.ones((1, 4)))}), 1)], ValueError,
     'belongs to another model')])
def test_what_cannot_be_merged(loras, error, part):
  with pytest.raises(error, match=part):
    msfp.merge_loras(PARAMS, loras)


def test_bfloat16_files_stay_in_their_type(tmp_path):
  model, state, _ = flux()
  lora = lora_of(state, only='to_q', dtype=ml_dtypes.bfloat16)
  read = msfp.load_lora(lora_files.write(
      tmp_path / 'a.safetensors', lora_files.peft(lora)), model)
  assert {half.dtype.name for down, up, _ in read.layers.values()
          for half in (down, up)} == {'bfloat16'}
