"""LoRAs read from files are what their makers added to the weights."""

import functools
import re

import families
import flux_oracle
import foreign
import jax
import lora_cases
import lora_files
import ml_dtypes
import numpy as np
import pytest
import text_oracle

import msfp_jax as msfp
from msfp_jax import convert
from msfp_jax.models.guided import GuidedByText
from msfp_jax.models.prediction import AsNoise


@pytest.mark.parametrize('name', ['tiny', 'guided'])
@pytest.mark.parametrize('naming', [
    'diffusers', 'PEFT', 'adapter', 'no prefix', 'kohya', 'bfl', 'kohya bfl',
    'xlabs'])
def test_every_layer_of_flux(tmp_path, name, naming):
  """Fused modules too, and the halves that our layers have of proj_out."""
  case = model, state, _ = lora_cases.flux(name)
  lora = lora_cases.lora_of(state)
  if naming == 'xlabs':
    lora = {module: halves for module, halves in lora.items() if re.search(
        r'attn\.to_|attn\.add_|single.*\.proj_out', module)}
  of_bfl = lambda: lora_files.bfl(lora_cases.lora_of(state), model.config)
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
  read = lora_cases.assert_adds(case, path, lora, 2 if beside.exists() else 1)
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
  case = model, state, _ = lora_cases.unet(name)
  lora = lora_cases.lora_of(state)
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
  read = lora_cases.assert_adds(case, path, lora, 1, strength=-0.5)
  kernels = [k for k, v in state.items() if v.ndim > 1
             and 'class_embedding' not in k]
  assert len(read.layers) == len(kernels)


def test_dense_layers_stand_for_convolutions_over_a_point(tmp_path):
  """And the other way round: Stable Diffusion 1 and 2 differ so."""
  case = _, state, _ = lora_cases.unet()
  # Dense layers, and convolutions of 1x1, here and there.
  lora = lora_cases.lora_of(state, only=r'proj_in|attn1\.to_q|conv_shortcut')
  for axes in ((), (1, 1)):
    path = lora_files.write(
        tmp_path / f'{len(axes)}.safetensors', lora_files.peft({
            module: tuple(half.reshape(*half.shape[:2], *axes)
                          for half in halves)
            for module, halves in lora.items()}, 'unet.'))
    lora_cases.assert_adds(case, path, lora, 1)


def test_names_of_one_lora_give_the_same_arrays(tmp_path):
  """Of the type that the file has."""
  model, state, _ = lora_cases.unet()
  lora = lora_cases.lora_of(state, only='attn|conv1', dtype=np.float16)
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


def test_guidance_and_v_have_the_layers_of_what_they_wrap(tmp_path):
  model, state, _ = lora_cases.unet()
  path = lora_files.write(tmp_path / 'a.safetensors', lora_files.kohya(
      lora_cases.lora_of(state, only='attn1')))
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
  lora = lora_cases.lora_of({
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
  ours, flux_state, _ = lora_cases.flux()
  of_flux = lora_cases.lora_of(flux_state, only='to_q')
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
  lora = lora_cases.lora_of({n: v for n, v in state.items() if 'layers' in n})
  path = lora_files.write(tmp_path / 'a.safetensors', lora_files.kohya(
      lora, 'lora_te_'))
  with pytest.raises(ValueError, match=(
      rf"nothing for the denoiser, but modules of CLIP's .*\({len(lora)}\)")):
    msfp.load_lora(path, lora_cases.flux()[0])


def test_bfloat16_files_stay_in_their_type(tmp_path):
  model, state, _ = lora_cases.flux()
  lora = lora_cases.lora_of(state, only='to_q', dtype=ml_dtypes.bfloat16)
  read = msfp.load_lora(lora_files.write(
      tmp_path / 'a.safetensors', lora_files.peft(lora)), model)
  assert {half.dtype.name for down, up, _ in read.layers.values()
          for half in (down, up)} == {'bfloat16'}
