"""The strength that a LoRA was trained with: where its file has alpha."""

import sys

import hub_cache
import lora_cases
import lora_files
import pytest

import msfp_jax as msfp


@pytest.mark.parametrize('alpha, scale', [(None, 1), (8, 2), (1, 0.25)])
def test_alpha_of_kohya(tmp_path, alpha, scale):
  """Over the rank; where there is none, it is the rank."""
  case = _, state, _ = lora_cases.flux()
  lora = lora_cases.lora_of(state, rank=4, only='to_add_out')
  path = lora_files.write(tmp_path / 'a.safetensors', lora_files.kohya(
      lora, 'lora_transformer_', alpha))
  lora_cases.assert_adds(case, path, lora, scale)


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
  _, state, _ = lora_cases.flux()
  lora = lora_cases.lora_of(state, rank=4, only=r'blocks\.0\.attn\.to_[qk]')
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
  layers = msfp.load_lora(path.parent, lora_cases.flux()[0]).layers
  assert (layers['transformer_blocks.0.attn.to_q'].scale,
          layers['transformer_blocks.0.attn.to_k'].scale) == scales


def test_peft_without_its_configuration(tmp_path):
  """Its alpha is not known, and not 1."""
  model, state, _ = lora_cases.flux()
  lora = lora_cases.lora_of(state, only='to_q')
  path = lora_files.write(
      tmp_path / 'adapter_model.safetensors',
      lora_files.peft(lora, 'base_model.model.'))
  with pytest.raises(ValueError, match='alpha in a adapter_config.json'):
    msfp.load_lora(path, model)


@pytest.mark.parametrize('file', ['', '/adapter_model.safetensors'])
def test_a_lora_of_the_hub(tmp_path, monkeypatch, file):
  """With PEFT's configuration, without which its strength is another."""
  model, state, _ = lora_cases.flux()
  folder = tmp_path / 'saved'
  folder.mkdir()
  lora_files.write(folder / 'adapter_model.safetensors', lora_files.peft(
      lora_cases.lora_of(state, rank=4, only='to_q'), 'base_model.model.'))
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
  model, state, _ = lora_cases.flux()
  lora = lora_cases.lora_of(state, only='to_q')
  path = lora_files.write(
      tmp_path / 'a.safetensors', lora_files.peft(lora),
      lora_adapter_metadata={f'transformer.{key}': value
                             for key, value in (CONFIG | changes).items()})
  with pytest.raises(ValueError, match=part):
    msfp.load_lora(path, model)
