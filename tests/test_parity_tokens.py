"""Live comparison of tokens with transformers (`make parity`)."""

import pytest
import text_files

from msfp_jax.text import tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings(
    'ignore::DeprecationWarning', 'ignore::FutureWarning')]


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
