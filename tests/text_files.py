"""Tokenizers' files as transformers has them, made of a small text here."""

import json
import struct

CORPUS = [
    'a photograph of an astronaut riding a horse on mars',
    'a cat sitting on a mat, in the style of a painting!',
    'an oil painting of a café in the rain, 8k, trending',
    "the cat's hat isn't red: it's blue and it'll stay 1234",
    'naïve façade, piñata, smörgåsbord; crème brûlée',
    'a beautiful landscape with mountains and a river at sunset',
    '日本の山 и река на закате 🙂 🚀',
]
# Every one of them has gone wrong in some tokenizer.
NASTY = [
    '', ' ', '!', 'hello!', '!!! a cat!', 'A  Cat   SITTING', '  a cat ',
    'a\tcat\n\non a mat', 'café', 'cafe\u0301', 'naïve FAÇADE', 'İstanbul ẞ',
    '🙂', 'a 🙂🚀 cat', '👩\u200d👩\u200d👧', '日本の山', 'река', 'ﬁne ﬂ ½ ①',
    '12345 1,000.5',
    "the cat's hat isn't; we'll I'm", "CAT'S", 'a\u00a0cat\u3000on\u200bmat',
    '<|endoftext|>', 'a <|startoftext|> b', '<|ENDOFTEXT|>', '</s>', 'a</s>b',
    '<pad> <unk>', '<extra_id_0> a <extra_id_99>', '▁a cat', 'a_b-c/d\\e',
    '&amp; <b>', 'ª º ² ⅷ', 'e\u0301\u0323', '\ufeffa cat', '\x00\x07a',
    'zzzzqqqq', 'a photograph of an astronaut ' * 30, 'x' * 300, '! ' * 200,
]
CLIP_ENDS = ['<|startoftext|>', '<|endoftext|>']


def write_json(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content, ensure_ascii=False), encoding='utf-8')


def _bytes_as_letters():
  """CLIP's letters for bytes, '!' first."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  odd = [byte for byte in range(256) if byte not in plain]
  return [*map(chr, plain), *(chr(256 + i) for i in range(len(odd)))]


def clip_vocabulary(merges=200):
  """A BPE learnt from CORPUS: ({token: number}, its merges)."""
  import tokenizers
  learnt = tokenizers.Tokenizer(tokenizers.models.BPE(
      end_of_word_suffix='</w>'))
  learnt.normalizer = tokenizers.normalizers.Lowercase()
  learnt.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
      tokenizers.pre_tokenizers.Whitespace(),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False,
                                          use_regex=False)])
  letters = _bytes_as_letters()
  learnt.train_from_iterator(CORPUS, tokenizers.trainers.BpeTrainer(
      vocab_size=512 + merges, show_progress=False, initial_alphabet=letters,
      end_of_word_suffix='</w>'))
  pairs = [tuple(pair) for pair in json.loads(learnt.to_str())['model'][
      'merges']]
  tokens = [*letters, *(letter + '</w>' for letter in letters),
            *dict.fromkeys(map(''.join, pairs)), *CLIP_ENDS]
  return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, pairs


def _flagged(text, **flags):
  return {'content': text, 'lstrip': False, 'normalized': True,
          'rstrip': False, 'single_word': False} | flags


def write_clip(folder, pad='<|endoftext|>', length=77, form='old'):
  """CLIP's tokenizer as Stable Diffusion's and FLUX's folders have it.

  Args:
    folder: made if it is not there.
    pad: '!' in Stable Diffusion 2's.
    length: its model_max_length.
    form: 'old': special tokens in a file of their own, with flags; 'new': a
      table of added tokens; 'bare': the vocabulary alone.

  Returns:
    Its number of tokens.
  """
  vocab, pairs = clip_vocabulary()
  write_json(folder / 'vocab.json', vocab)
  (folder / 'merges.txt').write_text('\n'.join(
      ['#version: 0.2', *map(' '.join, pairs), '']), encoding='utf-8')
  config = {'model_max_length': length, 'tokenizer_class': 'CLIPTokenizer',
            'do_lower_case': True, 'add_prefix_space': False, 'pad_token': pad}
  begin, end = CLIP_ENDS
  if form == 'old':
    special = {'bos_token': _flagged(begin), 'eos_token': _flagged(end),
               'unk_token': _flagged(end), 'pad_token': pad}
    write_json(folder / 'special_tokens_map.json', special)
    config |= {name: {'__type': 'AddedToken'} | special[name]
               for name in ('bos_token', 'eos_token', 'unk_token')}
  if form == 'new':
    config |= {'bos_token': begin, 'eos_token': end, 'unk_token': end}
    config['added_tokens_decoder'] = {
        str(vocab[text]): _flagged(text, special=True,
                                   normalized=text in CLIP_ENDS)
        for text in dict.fromkeys((*CLIP_ENDS, pad))}
  if form != 'bare':
    write_json(folder / 'tokenizer_config.json', config)
  return len(vocab)


def _varint(number):
  out = bytearray()
  while number > 0x7f:
    out.append(number & 0x7f | 0x80)
    number >>= 7
  return bytes([*out, number])


def message(*fields):
  """A message of protocol buffers of (number, whole number, float or bytes).
  """
  out = b''
  for number, value in fields:
    if isinstance(value, int):
      out += _varint(number << 3) + _varint(value)
    elif isinstance(value, float):
      out += _varint(number << 3 | 5) + struct.pack('<f', value)
    else:
      out += _varint(number << 3 | 2) + _varint(len(value)) + value
  return out


# T5's first three, and pieces with the logarithms of their probabilities.
PIECES = [('<pad>', 0.0, 3), ('</s>', 0.0, 3), ('<unk>', 0.0, 2),
          ('▁', -2.5, 1), ('▁a', -2.0, 1), ('▁cat', -4.0, 1), ('c', -6.0, 1),
          ('a', -5.0, 1), ('t', -5.5, 1), ('at', -6.5, 1), ('▁m', -6.0, 1)]


def spiece(pieces=PIECES, model_type=1, **normalizer):
  """The bytes of a spiece.model of (piece, score, type)."""
  numbers = {'dummy_prefix': 3, 'remove_spaces': 4}
  return message(
      *((1, message((1, text.encode()), (2, score), (3, kind)))
        for text, score, kind in pieces),
      (2, message((3, model_type), (40, 2))),
      (3, message((1, b'identity'), *(
          (numbers[name], value) for name, value in normalizer.items()))))


def write_t5(folder, length=16, data=None):
  """T5's tokenizer: a spiece.model, by default that of PIECES."""
  write_json(folder / 'tokenizer_config.json', {
      'model_max_length': length, 'tokenizer_class': 'T5Tokenizer',
      'eos_token': '</s>', 'unk_token': '<unk>', 'pad_token': '<pad>'})
  (folder / 'spiece.model').write_bytes(spiece() if data is None else data)
