"""Live comparison of text encoders with transformers (`make parity`)."""

import jax
import numpy as np
import pytest
import text_files
import unet_oracle

from msfp_jax.convert.text_encoder import load_text_encoder
from msfp_jax.models import t5 as t5_lib
from msfp_jax.text import tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings(
    'ignore::DeprecationWarning', 'ignore::FutureWarning')]

CLIP = dict(vocab_size=99, hidden_size=24, intermediate_size=40,
            num_hidden_layers=3, num_attention_heads=3,
            max_position_embeddings=11, projection_dim=20, eos_token_id=2,
            bos_token_id=0, pad_token_id=1)
T5 = dict(vocab_size=99, d_model=24, d_kv=5, d_ff=40, num_layers=3, num_heads=4,
          feed_forward_proj='gated-gelu')
CLIPS = {
    'clip-l': {}, 'openclip-h': {'hidden_act': 'gelu'},
    'new eos': {'eos_token_id': 7}, 'eos of several': {'eos_token_id': 98},
    'tanh, eps': {'hidden_act': 'gelu_new', 'layer_norm_eps': 1e-2}}
T5S = {
    'v1.1': {}, 'plain': {'feed_forward_proj': 'relu'},
    'silu': {'feed_forward_proj': 'gated-silu'},
    'exact': {'feed_forward_proj': 'gelu'},
    'classes, eps': {'relative_attention_num_buckets': 14,
                     'relative_attention_max_distance': 9,
                     'layer_norm_epsilon': 1e-2}}


def randomized(model, seed=0):
  """Weights that no initializer would give, norms and biases among them."""
  import torch
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for name, value in sorted(model.named_parameters()):
      scale = 1 if value.ndim < 2 else value.shape[-1] ** -0.5
      values = rng.standard_normal(value.shape) * scale
      if value.ndim < 2 and name.endswith('weight'):
        values = 1 + 0.3 * values
      value.copy_(torch.from_numpy(values.astype(np.float32)))
  return model.eval()


def clip_of(changes, projects=False):
  import transformers
  kind = 'CLIPTextModelWithProjection' if projects else 'CLIPTextModel'
  return randomized(getattr(transformers, kind)(
      transformers.CLIPTextConfig(**CLIP | changes)))


def t5_of(changes, kind='T5EncoderModel'):
  import transformers
  return randomized(getattr(transformers, kind)(
      transformers.T5Config(**T5 | changes)))


def ids_of(length=11):
  """Four texts that end at different places, one of them at once."""
  rng = np.random.default_rng(1)
  ids = rng.integers(3, 98, (4, length))
  for row, end in enumerate((1, 4, 4, length - 1)):
    # 98 is the highest token, and the padding too; 7 another one's end.
    ids[row, end] = 7
    ids[row, end:] = [98 if row % 2 else 7] + [98] * (length - 1 - end)
  return ids


def theirs(model, ids):
  import torch
  with torch.inference_mode():
    return model(torch.from_numpy(ids))


def ours(path, ids, **options):
  model, params = load_text_encoder(path, **options)
  return jax.jit(model.apply)({'params': params}, ids.astype(np.int32))


def close(actual, expected):
  return unet_oracle.rel_l2(np.asarray(actual), expected.numpy()) < 5e-6


@pytest.mark.parametrize('name', CLIPS)
def test_clip_equals_transformers(name, tmp_path):
  model, ids = clip_of(CLIPS[name]), ids_of()
  model.save_pretrained(tmp_path)
  expected, actual = theirs(model, ids), ours(tmp_path, ids)
  assert close(actual.hidden, expected.last_hidden_state)
  assert close(actual.pooled, expected.pooler_output)


def test_clip_projects_like_transformers(tmp_path):
  model, ids = clip_of({}, projects=True), ids_of()
  model.save_pretrained(tmp_path)
  assert close(ours(tmp_path, ids).pooled, theirs(model, ids).text_embeds)


@pytest.mark.parametrize('name', T5S)
def test_t5_equals_transformers(name, tmp_path):
  model, ids = t5_of(T5S[name]), ids_of(40)
  model.save_pretrained(tmp_path)
  assert close(ours(tmp_path, ids), theirs(model, ids).last_hidden_state)


def test_a_whole_t5_gives_its_encoder(tmp_path):
  import transformers
  t5_of({}, 'T5ForConditionalGeneration').save_pretrained(tmp_path)
  encoder = transformers.T5EncoderModel.from_pretrained(tmp_path).eval()
  ids = ids_of()
  assert close(ours(tmp_path, ids), theirs(encoder, ids).last_hidden_state)


@pytest.mark.parametrize('make', [clip_of, t5_of])
@pytest.mark.parametrize('kind', ['float16', 'bfloat16'])
def test_half_precision_in_shards(make, kind, tmp_path):
  """Weights of half precision, computed with in float32, from several files."""
  import torch
  model, ids = make({}).to(getattr(torch, kind)), ids_of()
  model.save_pretrained(tmp_path, max_shard_size=4000)
  assert len(list(tmp_path.glob('*.safetensors'))) > 2
  expected = theirs(model.float(), ids).last_hidden_state
  for options in ({}, {'keep_half': True}):
    actual = ours(tmp_path, ids, **options)
    assert close(getattr(actual, 'hidden', actual), expected)


@pytest.mark.parametrize('buckets, far', [
    (32, 128), (32, 20), (8, 64), (14, 9), (33, 100), (64, 512)])
def test_classes_of_distances_equal_transformers(buckets, far):
  import torch
  from transformers.models.t5.modeling_t5 import T5Attention
  places = torch.arange(700)
  expected = T5Attention._relative_position_bucket(
      places[None] - places[:, None], True, buckets, far)
  np.testing.assert_array_equal(
      t5_lib.distance_classes(700, buckets, far), expected)


def equal_ids(ours, theirs, length):
  """Token by token, over texts that have gone wrong in some tokenizer."""
  found = ours(text_files.NASTY)
  expected = theirs(text_files.NASTY, padding='max_length', max_length=length,
                    truncation=True, return_tensors='np')
  for text, row, wanted in zip(
      text_files.NASTY, found.ids, expected.input_ids, strict=True):
    assert row.tolist() == wanted.tolist(), text
  whole = theirs(text_files.NASTY)
  assert found.cut.tolist() == [len(ids) > length for ids in whole.input_ids]
  assert found.cut.any()
  assert found.lengths.tolist() == [
      min(len(ids), length) for ids in whole.input_ids]


@pytest.mark.parametrize('form', ['old', 'new'])
@pytest.mark.parametrize('pad', ['<|endoftext|>', '!'])
def test_clip_tokens_equal_transformers(form, pad, tmp_path):
  import transformers
  text_files.write_clip(tmp_path, pad, form=form)
  theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
  equal_ids(tokenizer.load_tokenizer(tmp_path), theirs, 77)
  # And from the one file that it writes of them.
  theirs.save_pretrained(tmp_path / 'json')
  assert not (tmp_path / 'json/vocab.json').exists()
  equal_ids(tokenizer.load_tokenizer(tmp_path / 'json'), theirs, 77)


def test_bare_clip_vocabulary_equals_transformers(tmp_path):
  import transformers
  text_files.write_clip(tmp_path, form='bare')
  equal_ids(tokenizer.load_tokenizer(tmp_path, 20),
            transformers.CLIPTokenizer.from_pretrained(tmp_path), 20)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A spiece.model as T5's, trained by sentencepiece."""
  import sentencepiece
  folder = tmp_path_factory.mktemp('t5')
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(text_files.CORPUS * 20), vocab_size=150,
      hard_vocab_limit=False,
      model_prefix=str(folder / 'spiece'), model_type='unigram', pad_id=0,
      eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
  return folder / 'spiece.model'


def test_t5_tokens_equal_transformers(trained, tmp_path):
  import transformers
  text_files.write_t5(tmp_path, 24, trained.read_bytes())
  theirs = transformers.T5Tokenizer.from_pretrained(tmp_path)
  equal_ids(tokenizer.load_tokenizer(tmp_path), theirs, 24)
  theirs.save_pretrained(tmp_path / 'json')
  assert not (tmp_path / 'json/spiece.model').exists()
  equal_ids(tokenizer.load_tokenizer(tmp_path / 'json'), theirs, 24)


def test_t5_tokens_equal_sentencepiece(trained, tmp_path):
  """But for special tokens, which sentencepiece itself takes as letters, and
  for two marks on a letter, which the library normalizes together, as
  transformers does.
  """
  import sentencepiece
  processor = sentencepiece.SentencePieceProcessor(model_file=str(trained))
  ours = tokenizer.load_tokenizer(trained, 4000)
  texts = [text for text in text_files.NASTY
           if '<' not in text and '\u0323' not in text]
  found = ours(texts)
  for text, row, length in zip(texts, found.ids, found.lengths, strict=True):
    assert row[:length].tolist() == [*processor.encode(text), 1], text
