"""Texts to tokens; `make parity` compares them with transformers'."""

import json
import sys

import numpy as np
import pytest
import text_files

from msfp_jax.text import sentencepiece_file
from msfp_jax.text import tokenizer

END, BEGIN = '<|endoftext|>', '<|startoftext|>'


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
  """A folder with CLIP's files, and its vocabulary."""
  folder = tmp_path_factory.mktemp('clip')
  text_files.write_clip(folder)
  return folder, text_files.clip_vocabulary()[0]


def tokens(*texts, pads=0, vocab, pad=END):
  return [vocab[text] for text in (BEGIN, *texts, END)] + [vocab[pad]] * pads


def test_clip_by_hand(clip):
  """Letters that are no part of learnt words, in lower case, spaces aside."""
  folder, vocab = clip
  found = tokenizer.load_tokenizer(folder, 6)(['', 'q  Q', "q's", 'é!', END])
  assert found.ids.dtype == np.int32
  assert found.lengths.tolist() == [2, 4, 5, 4, 3]
  row = lambda *texts: tokens(*texts, pads=4 - len(texts), vocab=vocab)
  # 's is one word of two letters, and é of two bytes, which have letters too.
  assert found.ids.tolist() == [
      row(), row('q</w>', 'q</w>'), row('q</w>', "'", 's</w>'),
      row('Ã©</w>', '!</w>'), row(END)]


def test_longest_merges_first(clip):
  folder, vocab = clip
  assert 'astronaut</w>' in vocab
  found = tokenizer.load_tokenizer(folder)(['an ASTRONAUT', 'astronauts'])
  assert found.ids.shape == (2, 77)
  assert found.ids[0].tolist() == tokens(
      'an</w>', 'astronaut</w>', pads=73, vocab=vocab)
  assert vocab['astronaut</w>'] not in found.ids[1]


def test_stable_diffusion_2_pads_with_0_and_so_takes_exclamation_marks(
    tmp_path):
  text_files.write_clip(tmp_path, pad='!', length=6)
  vocab = text_files.clip_vocabulary()[0]
  assert vocab['!'] == 0
  found = tokenizer.load_tokenizer(tmp_path)(['q!'])
  assert found.ids.tolist() == [tokens('q</w>', '!', pads=2, pad='!',
                                       vocab=vocab)]
  assert found.lengths.tolist() == [4]


def test_t5_by_hand(tmp_path):
  """By probabilities: a whole word before its letters."""
  text_files.write_t5(tmp_path, length=7)
  found = tokenizer.load_tokenizer(tmp_path)(
      ['a cat', '  a   cat ', 'a mat', 'cab</s>', '<extra_id_0>'])
  assert found.ids.tolist() == [
      [4, 5, 1, 0, 0, 0, 0], [4, 5, 1, 0, 0, 0, 0], [4, 10, 9, 1, 0, 0, 0],
      # ▁ c a, what is unknown, a special token, and the end.
      [3, 6, 7, 2, 1, 1, 0], [len(text_files.PIECES) + 99, 1, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize('kind', ['clip', 't5'])
def test_long_prompts_are_cut_and_counted(kind, tmp_path, caplog):
  """The end stays; what fits to the last token is whole."""
  getattr(text_files, f'write_{kind}')(tmp_path)
  whole = tokenizer.load_tokenizer(tmp_path, 100)
  prompts = ['a', 'a a a a', 'a a a a a', 'a cat ' * 9]
  expected = whole(prompts)
  fits = int(expected.lengths[1])
  with caplog.at_level('WARNING'):
    found = tokenizer.load_tokenizer(tmp_path, fits)(prompts)
  assert found.cut.tolist() == [False, False, True, True]
  assert found.lengths.tolist() == [expected.lengths[0], fits, fits, fits]
  np.testing.assert_array_equal(found.ids[:, :-1], expected.ids[:, :fits - 1])
  assert (found.ids[1:, -1] == whole.eos_id).all()
  assert '2 of 4 prompts' in caplog.text and 'prompt 3' in caplog.text


def test_the_encoder_bounds_the_length(clip):
  folder, _ = clip
  assert tokenizer.load_tokenizer(folder, most=11).length == 11
  assert tokenizer.load_tokenizer(folder, most=99).length == 77


@pytest.mark.parametrize('prompts, error', [
    ('a cat', TypeError), (['a', None], TypeError), (['a\ud800'], ValueError)])
def test_what_is_no_list_of_texts_is_refused(clip, prompts, error):
  with pytest.raises(error, match='prompt'):
    tokenizer.load_tokenizer(clip[0])(prompts)


def test_without_the_library_it_says_what_to_install(clip, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(ValueError, match=r"pip install 'msfp-jax\[text\]'"):
    tokenizer.load_tokenizer(clip[0])


def _word_piece(folder):
  import tokenizers
  tokenizers.Tokenizer(tokenizers.models.WordPiece(
      {'a': 0, '[UNK]': 1}, unk_token='[UNK]')).save(
          str(folder / 'tokenizer.json'))


def _other_bpe(folder):
  import tokenizers
  tokenizers.Tokenizer(tokenizers.models.BPE({'a': 0}, [])).save(
      str(folder / 'tokenizer.json'))


def _without_end(folder):
  import tokenizers
  tokenizers.Tokenizer(tokenizers.models.Unigram(
      [('<pad>', 0.0), ('</s>', 0.0), ('<unk>', 0.0)], 2)).save(
          str(folder / 'tokenizer.json'))
  text_files.write_json(folder / 'tokenizer_config.json',
                        {'model_max_length': 9})


def _without_merges(folder):
  text_files.write_clip(folder)
  (folder / 'merges.txt').unlink()


# A pair whose whole is no token; the library's own code stops there.
_PANICS = {'vocab': {'ðŁ': 540, 'ļģ</w>': 1}, 'merges': [['ðŁ', 'ļģ</w>']]}


def _in_vocabulary(folder):
  text_files.write_clip(folder)
  vocab = json.loads((folder / 'vocab.json').read_text(encoding='utf-8'))
  text_files.write_json(folder / 'vocab.json', vocab | {'a</w>': 2**31})


def _around_texts(folder):
  text_files.write_clip(folder)
  tokenizer.load_tokenizer(folder).backend.save(str(folder / 'tokenizer.json'))
  content = json.loads((folder / 'tokenizer.json').read_text('utf-8'))
  content['post_processor']['cls'][1] = 2**31
  text_files.write_json(folder / 'tokenizer.json', content)


def _config(**changes):
  def write(folder):
    text_files.write_clip(folder, form='bare')
    text_files.write_json(folder / 'tokenizer_config.json', changes)
  return write


@pytest.mark.parametrize('write, said', [
    (_word_piece, 'WordPiece'), (_other_bpe, 'another kind'),
    (_without_end, 'of an empty text'), (_without_merges, 'merges.txt'),
    (_config(), 'pass length'), (_config(model_max_length=10**30), 'length'),
    (_config(model_max_length=2), 'more than the 2'),
    (_config(padding_side='left'), 'padding_side'),
    (_config(truncation_side='left'), 'truncation_side'),
    (_config(eos_token='<none>', model_max_length=9), '<none>'),
    (_config(model_max_length=9, added_tokens_decoder={
        '5': {'content': 'new'}}), 'other numbers'),
    (_config(eos_token={'contend': END}, model_max_length=9), "'content'"),
    (_config(eos_token=7, model_max_length=9), 'a token of 7'),
    (_config(model_max_length=9, added_tokens_decoder={'5!': 'a'}), '5!'),
    (_config(model_max_length=9, added_tokens_decoder=[1]), 'vocab.json, with'),
    (_config(model_max_length=9, pad_token={'content': '!', 'lstrip': 'x'}),
     'vocab.json, with'),
    (lambda folder: (folder / 'tokenizer.json').write_text('{'),
     'no tokenizer.json'),
    (lambda folder: (folder / 'vocab.json').write_text('[1]') and (
        folder / 'merges.txt').write_text('a b'), 'no vocabulary'),
    # Found by changing files at random.
    (lambda folder: text_files.write_json(
        folder / 'tokenizer.json', {'model': _PANICS}), 'json: .*out of'),
    (_in_vocabulary, 'number 2147483648'),
    (_around_texts, 'number 2147483648'),
    (lambda folder: (folder / 'spiece.model').write_bytes(b'\x0a\x05ab'),
     'damaged')])
def test_other_tokenizers_are_refused(write, said, tmp_path):
  write(tmp_path)
  with pytest.raises(ValueError, match=said):
    tokenizer.load_tokenizer(tmp_path)


def test_an_empty_folder(tmp_path):
  with pytest.raises(FileNotFoundError, match='spiece.model'):
    tokenizer.load_tokenizer(tmp_path)


def _pieces(*more):
  return text_files.spiece([*text_files.PIECES, *more])


@pytest.mark.parametrize('data, said', [
    (text_files.spiece(model_type=2), 'BPE'),
    (_pieces(('x', -1.0, 6)), 'byte'), (_pieces(('x', -1.0, 4)), 'user'),
    (_pieces(('x', -1.0, 2)), 'unknown'), (b'', 'no pieces'),
    (text_files.spiece(remove_spaces=0), 'keeps spaces'),
    (text_files.spiece(dummy_prefix=0), 'keeps spaces'),
    (b'\xff' * 12, 'damaged'), (b'PK\x03\x04' + bytes(9), 'damaged|pieces'),
    (text_files.spiece()[:-3], 'damaged'),
    (text_files.message((1, text_files.message((1, 5)))), 'damaged'),
    (_pieces(('x', float('nan'), 1)), 'no number'),
    (text_files.spiece() + text_files.message(
        (3, text_files.message((2, 5)))), 'damaged')])
def test_other_models_of_sentencepiece_are_refused(data, said, tmp_path):
  file = tmp_path / 'spiece.model'
  file.write_bytes(data)
  with pytest.raises(ValueError, match=said):
    sentencepiece_file.read(file)


def test_a_table_of_characters_that_is_none(tmp_path):
  text_files.write_t5(tmp_path, data=text_files.spiece()
                      + text_files.message((3, text_files.message((2, b'x')))))
  with pytest.raises(ValueError, match="spiece.model is no vocabulary of T5's"):
    tokenizer.load_tokenizer(tmp_path)


def test_a_vocabulary_without_the_token_of_what_it_lacks(tmp_path):
  text_files.write_clip(tmp_path)
  tokenizer.load_tokenizer(tmp_path).backend.save(
      str(tmp_path / 'tokenizer.json'))
  content = json.loads((tmp_path / 'tokenizer.json').read_text())
  content['model']['unk_token'] = 'gone'
  del content['model']['vocab']['q</w>']
  text_files.write_json(tmp_path / 'tokenizer.json', content)
  with pytest.raises(ValueError, match='tokenizer.json makes no tokens.*gone'):
    tokenizer.load_tokenizer(tmp_path)(['q'])
