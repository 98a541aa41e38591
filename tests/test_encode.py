"""From prompts to conditions, and embeddings in files."""

import sys

import hub_cache
import lora_files
import numpy as np
import pytest
import text_files
import text_oracle
import unet_oracle

from msfp_jax.text import embeddings
from msfp_jax.text import encode
from msfp_jax.text import tokenizer

PROMPTS = ['a cat', 'a painting of a café, in the rain and on mars', '',
           'a cat', 'an astronaut']


def write_encoder(folder, kind, **changes):
  """A small encoder, and what it computes in float64 of tokens."""
  config = getattr(text_oracle, kind.upper()) | changes
  state = text_oracle.state_of(getattr(text_oracle, f'{kind}_shapes')(config))
  text_oracle.write(folder, config, state)
  return lambda ids: getattr(text_oracle, kind)(config, state, ids)


def write_pipeline(folder, flux=True, **changes):
  """A pipeline's folder; {part: what it computes}."""
  count = text_files.write_clip(folder / 'tokenizer', length=11)
  found = {'clip': write_encoder(folder / 'text_encoder', 'clip', **{
      'vocab_size': count} | changes)}
  if flux:
    text_files.write_t5(folder / 'tokenizer_2')
    found['t5'] = write_encoder(folder / 'text_encoder_2', 't5',
                                vocab_size=128)
  return found


@pytest.fixture(scope='module')
def flux(tmp_path_factory):
  folder = tmp_path_factory.mktemp('flux')
  return folder, write_pipeline(folder)


def is_close(actual, expected):
  assert actual.shape == expected.shape and actual.dtype == np.float32
  return unet_oracle.rel_l2(actual, expected) < 5e-6


def test_flux(flux):
  """Through tokens that are looked at elsewhere, more prompts than a batch."""
  folder, oracles = flux
  found = encode.encode_prompts(encode.load_encoders(folder, 9), PROMPTS * 3)
  assert found.family == 'flux' and len(found) == 15
  assert list(found.conditions) == ['text', 'pooled']
  assert found.negative is None
  text = tokenizer.load_tokenizer(folder / 'tokenizer_2', 9)(PROMPTS * 3)
  clip = tokenizer.load_tokenizer(folder / 'tokenizer')(PROMPTS * 3)
  assert is_close(found.conditions['text'], oracles['t5'](text.ids))
  assert is_close(found.conditions['pooled'], oracles['clip'](clip.ids)[1])
  assert found.cut == text.cut.sum() == 6  # twice in three rounds


@pytest.mark.slow
def test_more_prompts_than_go_through_at_once(flux):
  """In batches, of which the last is not full, each row is its own prompt's."""
  folder, oracles = flux
  clip = encode.load_encoders(folder).clip
  texts = [f'a cat {i}' for i in range(7)]
  found, cut = clip(texts, at_once=3)
  expected = oracles['clip'](clip.tokenizer(texts).ids)
  assert is_close(found.hidden, expected[0])
  assert is_close(found.pooled, expected[1]) and cut == 0


def test_stable_diffusion_with_guidance(tmp_path):
  """Against nothing, one text for all, or one for each."""
  oracles = write_pipeline(tmp_path, flux=False)
  encoders = encode.load_encoders(tmp_path)
  for negative, texts in (('', [''] * 5), ('red', ['red'] * 5),
                          (list('abcab'), list('abcab'))):
    found = encode.encode_prompts(encoders, PROMPTS, negative)
    assert found.family == 'stable_diffusion' and found.cut == 1
    for conditions, prompts in ((found.conditions, PROMPTS),
                                (found.negative, texts)):
      ids = encoders.clip.tokenizer(prompts).ids
      assert list(conditions) == ['context']
      assert is_close(conditions['context'], oracles['clip'](ids)[0])


def test_what_a_lora_has_for_text_encoders_is_merged(flux, tmp_path):
  """Into the one that it is for; the file's other parts are no concern."""
  folder, _ = flux
  encoders = encode.load_encoders(folder)
  name = 'text_model_encoder_layers_0_mlp_fc1'
  down, up = np.ones((1, 24), np.float32), np.ones((40, 1), np.float32)
  path = lora_files.write(tmp_path / 'a.safetensors', lora_files.kohya(
      {name: (down, up)}, 'lora_te1_') | lora_files.kohya(
          {'single_blocks_0_linear2': (down, up)}))
  merged = encoders.with_loras([(str(path), 0.5)])
  before, after = (found.clip.params['layers.0']['fc1']['kernel']
                   for found in (encoders, merged))
  np.testing.assert_allclose(after, before + 0.5, rtol=1e-6)
  assert merged.t5.params['blocks.0'].keys() == (
      encoders.t5.params['blocks.0'].keys())
  prompts = encode.encode_prompts(merged, ['a cat']).conditions
  plain = encode.encode_prompts(encoders, ['a cat']).conditions
  np.testing.assert_array_equal(prompts['text'], plain['text'])
  assert np.abs(prompts['pooled'] - plain['pooled']).max() > 1e-2


@pytest.mark.parametrize('prompts, negative, said', [
    ([], None, 'no prompts'), (['a'], ['b', 'c'], '2 negative prompts for 1')])
def test_numbers_of_prompts_that_do_not_fit(prompts, negative, said, flux):
  with pytest.raises(ValueError, match=said):
    encode.encode_prompts(encode.load_encoders(flux[0]), prompts, negative)


def test_a_single_text_is_no_list_of_prompts(flux):
  encoders = encode.load_encoders(flux[0])
  for call in (encoders.clip, lambda text: encode.encode_prompts(
      encoders, text)):
    with pytest.raises(TypeError, match='list of texts'):
      call('a cat')


def move(folder, *pairs):
  for one, other in pairs:
    (folder / one).rename(folder / other)


def test_pipelines_that_are_none_of_ours(tmp_path):
  write_pipeline(tmp_path)
  move(tmp_path, ('tokenizer', 'x'), ('tokenizer_2', 'tokenizer'),
       ('x', 'tokenizer_2'))
  with pytest.raises(ValueError, match="T5's tokenizer, and the encoder"):
    encode.load_encoders(tmp_path)
  move(tmp_path, ('text_encoder', 'x'), ('text_encoder_2', 'text_encoder'),
       ('x', 'text_encoder_2'))
  with pytest.raises(ValueError, match="is T5's, must be CLIP's"):
    encode.load_encoders(tmp_path)
  move(tmp_path, ('tokenizer', 'gone'))
  with pytest.raises(FileNotFoundError, match="'tokenizer'"):
    encode.load_encoders(tmp_path)
  (tmp_path / 'text_encoder_3').mkdir()
  with pytest.raises(ValueError, match='three text encoders'):
    encode.load_encoders(tmp_path)


@pytest.fixture
def connect(tmp_path, monkeypatch):
  """Puts a stand-in for the hub's library in place: connect(files)."""
  def put(files):
    module = hub_cache.stand_in(
        tmp_path / 'cache', None if files is None else {'a/b': files})
    monkeypatch.setitem(sys.modules, 'huggingface_hub', module)
    return module
  return put


@pytest.mark.parametrize('below', ['', 'deep/'])
def test_encoders_of_the_hub(flux, connect, below):
  """Only what is read is downloaded; the conditions are the folder's."""
  read = {f'{below}{name}': content
          for name, content in hub_cache.files_in(flux[0]).items()}
  unread = {f'{below}{name}': b'x' for name in (
      'model_index.json', 'vae/diffusion_pytorch_model.safetensors',
      'transformer/diffusion_pytorch_model.safetensors', 'flux1.safetensors',
      'text_encoder/model.fp16.safetensors', 'text_encoder_2/README.md',
      'text_encoder/pytorch_model.bin', 'tokenizer/README.md',
      'scheduler/scheduler_config.json')}
  module = connect(unread | read)
  text = 'hf:a/b' + f'/{below}'.rstrip('/')
  expected = encode.encode_prompts(encode.load_encoders(flux[0], 9), ['a cat'])
  for attempt in range(2):
    found = encode.encode_prompts(encode.load_encoders(text, 9), ['a cat'])
    for name, value in expected.conditions.items():
      np.testing.assert_array_equal(found.conditions[name], value)
    if not attempt:
      assert sorted(module.taken) == sorted(read)
      connect(None)  # without a network the cache serves


@pytest.mark.parametrize('change, said', [
    (lambda files: files | {'text_encoder_3/config.json': b'x'},
     'hf:a/b has three text encoders'),
    (lambda files: {name: x for name, x in files.items()
                    if not name.startswith('tokenizer_2/')},
     r"hf:a/b lacks \['tokenizer_2'\]"),
    (lambda files: {name: x for name, x in files.items()
                    if name != 'text_encoder_2/model.safetensors'},
     r"no weights there.*text_encoder/model.safetensors"),
    (lambda files: None, 'hf download a/b')])
def test_what_the_hub_lacks_is_said_before_a_download(
    flux, connect, change, said):
  module = connect(change(hub_cache.files_in(flux[0])))
  with pytest.raises((ValueError, FileNotFoundError), match=said):
    encode.load_encoders('hf:a/b')
  assert not module.taken


@pytest.mark.parametrize('flux, changes, said', [
    (False, {'vocab_size': 300}, 'has 693 tokens, and the embedding 300'),
    (True, {'vocab_size': 693, 'eos_token_id': 5}, 'looks for 5')])
def test_a_tokenizer_of_another_encoder_is_refused_before_weights_are_read(
    flux, changes, said, tmp_path, monkeypatch):
  write_pipeline(tmp_path, flux, **changes)
  monkeypatch.setattr(encode.text_encoder.restore, 'restore', None)
  with pytest.raises(ValueError, match=said):
    encode.load_encoders(tmp_path)


def test_a_longer_tokenizer_than_the_encoder_is_refused(flux):
  encoder = encode.load_encoders(flux[0]).clip
  longer = tokenizer.load_tokenizer(flux[0] / 'tokenizer', 12)
  with pytest.raises(ValueError, match='gives 12 tokens.*takes 11'):
    encode.TextEncoder(longer, encoder.model, encoder.params)


def arrays(*names, batch=2, axes=3):
  rng = np.random.default_rng(0)
  return {name: rng.standard_normal((batch, 3, 4)[:2 if 'pooled' in name
                                                  else axes]).astype(np.float32)
          for name in names}


@pytest.mark.parametrize('names, family', [
    (['context'], 'stable_diffusion'), (['text', 'pooled'], 'flux'),
    (['context', 'negative_context'], 'stable_diffusion')])
def test_embeddings_are_read_as_written(names, family, tmp_path):
  made = arrays(*names)
  np.savez(tmp_path / 'by_hand.npz', **made)
  found = embeddings.load_embeddings(tmp_path / 'by_hand.npz')
  embeddings.save_embeddings(tmp_path / 'again.npz', found)
  again = embeddings.load_embeddings(tmp_path / 'again.npz')
  for read in (found, again):
    assert read.family == family and len(read) == 2
    got = dict(read.conditions) | {
        f'negative_{name}': x for name, x in (read.negative or {}).items()}
    jax_free = {name: x.tolist() for name, x in got.items()}
    assert jax_free == {name: x.tolist() for name, x in made.items()}


@pytest.mark.parametrize('made, said', [
    (arrays('text'), 'text, pooled|must be the conditions'),
    (arrays('context', 'style'), 'style'),
    (arrays('text', 'pooled', 'negative_text'), 'must be the conditions'),
    (arrays('context', axes=2), 'must have 3 axes'),
    (arrays('context', batch=0), 'shape'),
    (arrays('text') | arrays('pooled', batch=3), 'different numbers'),
    ({'context': np.full((1, 2, 3), np.nan)}, 'not finite'),
    ({'context': np.ones((1, 2, 3), int)}, 'floating'),
    ({'context': np.array([None])}, 'no .npz')])
def test_bad_embeddings_are_refused(made, said, tmp_path):
  np.savez(tmp_path / 'a.npz', **made)
  with pytest.raises(ValueError, match=said):
    embeddings.load_embeddings(tmp_path / 'a.npz')


@pytest.mark.parametrize('content', [b'', b'text', b'PK\x03\x04damaged'])
def test_files_of_another_kind_are_no_embeddings(content, tmp_path):
  (tmp_path / 'a.npz').write_bytes(content)
  with pytest.raises(ValueError, match='no .npz'):
    embeddings.load_embeddings(tmp_path / 'a.npz')
