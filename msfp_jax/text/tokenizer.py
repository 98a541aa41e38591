"""Texts to tokens as CLIP and T5 take them, from transformers' files."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
import textwrap
from typing import Any, NamedTuple

from absl import logging
import numpy as np

from msfp_jax.text import backends

_CONFIG, _SPECIAL = 'tokenizer_config.json', 'special_tokens_map.json'
_FILES = ('tokenizer.json', 'spiece.model', 'vocab.json')
_ADDED, _MERGES = 'added_tokens.json', 'merges.txt'
# All that is read of a folder.
READ = frozenset({*_FILES, _CONFIG, _SPECIAL, _ADDED, _MERGES})
# What transformers writes for tokenizers of any length is larger.
_LONGEST = 10**6
# What stands around a text: begin and end, or the end alone.
_AROUND = {backends.CLIP: 2, backends.T5: 1}
_FLAGS = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')


class Tokens(NamedTuple):
  """The tokens of texts.

  Attributes:
    ids: int32 `[B, L]`, each padded behind its end.
    lengths: int32 `[B]`, how many of them are the text's, begin and end among
      them.
    cut: bool `[B]`, whether the text was longer, and lost its last words.
  """

  ids: np.ndarray
  lengths: np.ndarray
  cut: np.ndarray


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Makes tokens of texts, `length` of each.

  Attributes:
    kind: 'clip' or 't5'.
    backend: of the library `tokenizers`.
    length: of what it gives, in tokens.
    eos_id: the token behind a text.
    pad_id: the token behind that one, up to the length.
    vocab_size: its highest token, plus one.
    source: the file, for messages.
  """

  kind: str
  backend: Any
  length: int
  eos_id: int
  pad_id: int
  vocab_size: int
  source: str

  def __call__(self, prompts: Sequence[str]) -> Tokens:
    """Takes texts apart; says how many were cut.

    Raises:
      TypeError: a single text, or what is no text.
      ValueError: a text that is no Unicode, or a tokenizer that does not know
        what to make of one.
    """
    check_texts(prompts)
    found = _encoded(self.backend, list(prompts), self.source)
    ids = np.full((len(found), self.length), self.pad_id, np.int32)
    for row, tokens in zip(ids, found, strict=True):
      # Of a text that is too long the end is kept, and what is before is cut.
      kept = tokens if len(tokens) <= self.length else [
          *tokens[:self.length - 1], tokens[-1]]
      row[:len(kept)] = kept
    lengths = np.array([len(tokens) for tokens in found], np.int32)
    cut = lengths > self.length
    if cut.any():
      first = int(np.argmax(cut))
      logging.warning(
          '%s of %s prompts are longer than the %s tokens that the encoder '
          'takes, and are cut; the first is prompt %s, of %s tokens: %s',
          cut.sum(), len(found), self.length, first + 1, lengths[first],
          textwrap.shorten(prompts[first], 80))
    return Tokens(ids, np.minimum(lengths, self.length), cut)


def _encoded(backend, texts, source):
  """The numbers of the tokens of each text."""
  # As of a vocabulary without the token of what it lacks.
  with backends.blaming(f'{source} makes no tokens of the prompts'):
    return [encoding.ids for encoding in backend.encode_batch(texts)]


def check_texts(prompts: Sequence[str]) -> None:
  """Raises TypeError or ValueError unless it is a list of Unicode texts."""
  if isinstance(prompts, str):
    raise TypeError(f'prompts={prompts!r}: must be a list of texts')
  for number, text in enumerate(prompts, 1):
    if not isinstance(text, str):
      raise TypeError(f'prompt {number} is {text!r}: must be a text')
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise ValueError(f'prompt {number}, {text!r}, is no text of Unicode: '
                       f'{error.reason}') from error


def load_tokenizer(path: str | pathlib.Path, length: int | None = None,
                   most: int | None = None) -> Tokenizer:
  """Loads CLIP's or T5's tokenizer.

  Args:
    path: a folder of transformers with tokenizer.json, spiece.model (T5), or
      vocab.json and merges.txt (CLIP); or one of these files. Beside it
      tokenizer_config.json and special_tokens_map.json say what is padded
      with: Stable Diffusion 1 and FLUX with the end of CLIP's texts, Stable
      Diffusion 2 with '!', T5 with 0.
    length: in tokens, of what it gives; by default as tokenizer_config.json
      says (`model_max_length`).
    most: as many tokens as the encoder takes: `length` is no more, whatever
      the file says.

  Raises:
    FileNotFoundError: none of these files.
    ValueError: the library `tokenizers` is not installed, files that hold
      another tokenizer or none, or nothing tells the length.
  """
  file = _file(pathlib.Path(path).expanduser())
  try:
    return _load(file, length, most)
  except (ValueError, TypeError, AttributeError) as error:
    # Other types come of a list, say, where a table of tokens should stand.
    if isinstance(error, ValueError) and str(file.parent) in str(error):
      raise
    raise ValueError(f'{file}, with {_CONFIG} and {_SPECIAL} beside it: '
                     f'{error}') from error


def _load(file, length, most):
  config = _read(file.parent / _CONFIG)
  _check_sides(config, file)
  # As transformers does: where the first has a table of added tokens, that is
  # newer.
  if 'added_tokens_decoder' not in config:
    config |= _read(file.parent / _SPECIAL)
  plain = ()
  if file.name.endswith('.json') and file.name != 'vocab.json':
    backend, kind = backends.from_json(file)
    named = _named(config, kind)
  elif file.suffix == '.model':
    kind = backends.T5
    named = _named(config, kind)
    backend, plain = backends.from_sentencepiece(file, named)
  else:
    kind = backends.CLIP
    named = _named(config, kind)
    backend = backends.from_vocabulary(file, file.parent / _MERGES, named)
  _add_tokens(backend, config, named, plain, file)
  # Both are done here, so that what was cut is known.
  backend.no_padding()
  backend.no_truncation()
  return _made(kind, backend, named, _length(config, length, most, file),
               file)


def _made(kind, backend, named, length, file):
  (empty,), around = _encoded(backend, [''], file), _AROUND[kind]
  eos_id = backend.token_to_id(named['eos_token'])
  if len(empty) != around or empty[-1] != eos_id:
    raise ValueError(
        f'{file} makes {empty} of an empty text: must be {around} tokens, the '
        f'last of them the end, {named["eos_token"]!r} ({eos_id})')
  size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
  # What is put around a text has numbers of its own.
  if (highest := max(size - 1, *empty)) > np.iinfo(np.int32).max:
    raise ValueError(f'{file}: a token has the number {highest}, which no '
                     'encoder has a vector for')
  if length <= around:
    raise ValueError(f'length={length}: must be more than the {around} tokens '
                     'around a text')
  return Tokenizer(
      kind, backend, length, eos_id, backend.token_to_id(named['pad_token']),
      size, str(file))


def _file(path):
  if path.is_file():
    return path
  for name in _FILES:
    if (path / name).is_file():
      return path / name
  raise FileNotFoundError(f'no tokenizer at {path}: it has none of '
                          f'{list(_FILES)}')


def _read(path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    found = json.loads(path.read_text(encoding='utf-8-sig'))
    if not isinstance(found, dict):
      raise ValueError('no table of keys')
    return found
  except ValueError as error:
    raise ValueError(f'{path} is no configuration: {error}') from error


def _check_sides(config, file):
  for key in ('padding_side', 'truncation_side'):
    if config.get(key, 'right') != 'right':
      raise ValueError(f'{file.parent / _CONFIG}: {key}={config[key]!r}: must '
                       "be 'right', where the pipelines of these encoders pad "
                       'and cut')


def _length(config, length, most, file):
  stated = config.get('model_max_length')
  if (length is None and isinstance(stated, int | float)
      and 0 < stated < _LONGEST):
    length = int(stated)
  found = [number for number in (length, most) if number is not None]
  if not found:
    raise ValueError(f'nothing tells how many tokens {file} is to give '
                     f'(model_max_length in {_CONFIG}): pass length, the '
                     "encoder's")
  return min(found)


def _content(token: Any) -> str:
  """The text of a token, which files have with or without its flags.

  Raises:
    ValueError: neither a text nor flags with one.
  """
  text = token.get('content') if isinstance(token, Mapping) else token
  if not isinstance(text, str):
    raise ValueError(f'a token of {token!r}: must be a text, or flags with '
                     "its text as 'content'")
  return text


def _named(config, kind):
  """The special tokens by name, as texts."""
  defaults = backends.NAMED[kind]
  return {name: _content(config.get(name) or default)
          for name, default in defaults.items()}


def _add_tokens(backend, config, named, plain, file):
  """Tells the backend which tokens are taken whole out of a text.

  Stable Diffusion 2 pads with '!', which is so taken out of prompts too: a '!'
  in one becomes the padding's token, as in its own pipeline.
  """
  added, numbers = {}, {}
  for number, token in sorted(
      config.get('added_tokens_decoder', {}).items(),
      key=lambda item: int(item[0])):
    numbers[_content(token)] = int(number)
    added[_content(token)] = token
  for text, number in _read(file.parent / _ADDED).items():
    numbers.setdefault(text, number)
    if text not in named.values():
      added.setdefault(text, {'content': text, 'special': False})
  # Of several names for one token the last one's flags count.
  added |= {text: config.get(name) or text for name, text in named.items()
            if text not in numbers}
  added |= {text: text for text in plain if text not in added}
  # A tokenizer.json has its own of them.
  for token in backend.get_added_tokens_decoder().values():
    added.pop(token.content, None)
  make = backends.import_tokenizers().AddedToken
  backend.add_tokens([
      make(text, **{'special': True} | (
          {flag: token[flag] for flag in _FLAGS if flag in token}
          if isinstance(token, Mapping) else {}))
      for text, token in added.items()])
  if odd := {text: backend.token_to_id(text) for text, number
             in numbers.items() if backend.token_to_id(text) != number}:
    raise ValueError(f'{file}: added tokens have other numbers in {_CONFIG} '
                     f'than in the vocabulary, which says {odd}')
