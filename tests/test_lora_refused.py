"""Files that hold no plain LoRA, or another model's."""

import lora_cases
import lora_files
import numpy as np
import pytest

import msfp_jax as msfp
from msfp_jax import convert


@pytest.mark.parametrize('first', ['ours', 'bfl'])
def test_two_halves_of_one_place(tmp_path, first):
  """Neither is dropped, in whichever order the file has them."""
  model, state, _ = lora_cases.flux()
  lora = lora_cases.lora_of(state)
  parts = {'ours': lora_files.peft(lora), 'bfl': lora_files.peft(
      lora_files.bfl(lora, model.config), 'diffusion_model.')}
  tensors = parts.pop(first) | parts.popitem()[1]
  path = lora_files.write(tmp_path / 'a.safetensors', tensors)
  with pytest.raises(ValueError, match='to_q|img_attn.qkv'):
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
  model, state, _ = lora_cases.flux()
  tensors, part = broken(lora_cases.lora_of(state, only='to_add_out'))[kind]
  path = lora_files.write(tmp_path / 'a.safetensors', tensors)
  with pytest.raises(ValueError) as error:
    msfp.load_lora(path, model)
  assert part in str(error.value) and str(path) in str(error.value)


def test_changes_of_0_are_none(tmp_path):
  """Trainers write them for what they did not train."""
  case = _, state, _ = lora_cases.flux()
  lora = lora_cases.lora_of(state, only='to_add_out')
  zero = np.zeros(16, np.float16)
  path = lora_files.write(tmp_path / 'a.safetensors', lora_files.kohya(
      lora, 'lora_transformer_') | {
          'lora_transformer_proj_out.diff_b': zero,
          'lora_transformer_x_embedder.diff': zero})
  lora_cases.assert_adds(case, path, lora, 1)


def test_all_misfits_are_listed_those_alike_as_one(tmp_path):
  """A FLUX LoRA for a UNet, and one of a wider FLUX."""
  _, state, _ = lora_cases.flux()
  path = lora_files.write(
      tmp_path / 'a.safetensors', lora_files.peft(lora_cases.lora_of(state)))
  with pytest.raises(ValueError) as error:
    msfp.load_lora(path, lora_cases.unet()[0])
  lines = str(error.value).splitlines()
  assert 'is no LoRA for this model' in lines[0]
  assert ('  transformer.transformer_blocks.*.attn.to_q is no layer of the '
          'model (2 of them)') in lines
  with pytest.raises(ValueError, match='does not fit a layer of') as error:
    msfp.load_lora(path, lora_cases.flux('guided')[0])
  assert 'transformer.x_embedder of down [2, 12]' in str(error.value)


def test_nothing_is_read_of_what_is_refused(tmp_path, monkeypatch):
  _, state, _ = lora_cases.flux()
  path = lora_files.write(
      tmp_path / 'a.safetensors', lora_files.peft(lora_cases.lora_of(state)))
  monkeypatch.setattr(
      convert.source, '_safetensors_reader',
      lambda path, name: lambda: pytest.fail(f'read {name}'))
  with pytest.raises(ValueError, match='no LoRA for this model'):
    msfp.load_lora(path, lora_cases.flux('guided')[0])


@pytest.mark.parametrize('name, content, error, part', [
    ('a.safetensors', None, FileNotFoundError, 'no LoRA at'),
    ('', None, FileNotFoundError, 'no LoRA in'),
    ('a.pt', b'\x80\x04', ValueError, 'from .safetensors files alone'),
    ('a.safetensors', b'nothing', ValueError, 'is no safetensors file')])
def test_files_that_are_none(tmp_path, name, content, error, part):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(error, match=part):
    msfp.load_lora(tmp_path / name, lora_cases.flux()[0])


def test_models_of_no_known_kind():
  with pytest.raises(TypeError, match='it must be what msfp.load_pretrained'):
    msfp.load_lora('a.safetensors', None)
