"""Tokenizers of the library `tokenizers`, from the files of CLIP's and T5's.

What a text becomes is what transformers 5 makes of the same files.
"""

from collections.abc import Iterator, Mapping
import contextlib
import json
import pathlib
from typing import Any

from msfp_jax.text import sentencepiece_file

CLIP, T5 = 'clip', 't5'
# What the kinds of special tokens are by default.
NAMED = {CLIP: {'bos_token': '<|startoftext|>', 'eos_token': '<|endoftext|>',
                'unk_token': '<|endoftext|>', 'pad_token': '<|endoftext|>'},
         T5: {'eos_token': '</s>', 'unk_token': '<unk>', 'pad_token': '<pad>'}}
# Words as CLIP takes a text apart, before they are taken apart into tokens.
_CLIP_WORDS = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
               r'|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+')
_WORD_END = '</w>'
_SPACE = '▁'
# T5 has tokens for gaps, which its own training asked to be filled; they stand
# behind sentencepiece's pieces, the first of them last.
_GAPS = 100


def import_tokenizers() -> Any:
  """The library `tokenizers`, with which texts become tokens.

  Raises:
    ValueError: it is not installed; says how to.
  """
  try:
    import tokenizers
  except ImportError as error:
    raise ValueError(
        'prompts need the library tokenizers, which is not installed: pip '
        "install 'msfp-jax[text]' or tokenizers; or pass embeddings that were "
        'made elsewhere, as an .npz file') from error
  return tokenizers


@contextlib.contextmanager
def blaming(words: str) -> Iterator[None]:
  """Turns what goes wrong in the library into ValueError(words: why).

  It raises Exception itself; and where its code in Rust stops, what comes is
  not even one of these, and would end a program that expects them.
  """
  try:
    yield
  except BaseException as error:
    if not isinstance(error, Exception) and (
        type(error).__name__ != 'PanicException'):
      raise
    raise ValueError(f'{words}: {error}') from error


def from_json(path: pathlib.Path) -> tuple[Any, str]:
  """Opens a tokenizer.json: (backend, CLIP or T5).

  Raises:
    ValueError: it is none, or one of neither kind.
  """
  tokenizers = import_tokenizers()
  with blaming(f'{path} is no tokenizer.json'):
    found = tokenizers.Tokenizer.from_str(_text(path))
  model = found.model
  if isinstance(model, tokenizers.models.Unigram):
    kind = T5
  elif (isinstance(model, tokenizers.models.BPE)
        and model.end_of_word_suffix == _WORD_END):
    kind = CLIP
  else:
    raise ValueError(
        f"{path} is a tokenizer of another kind ({type(model).__name__}): "
        f"CLIP's is a BPE whose words end in {_WORD_END}, T5's a Unigram")
  return found, kind


def from_vocabulary(vocab: pathlib.Path, merges: pathlib.Path,
                    named: Mapping[str, str]) -> Any:
  """CLIP's tokenizer from its vocab.json and merges.txt.

  Args:
    vocab: {token: number}.
    merges: pairs that become one, a line each, the most common first.
    named: special tokens by name, as in NAMED.

  Raises:
    ValueError: files that are none of CLIP's.
  """
  tokenizers = import_tokenizers()
  if not merges.is_file():
    raise ValueError(f'{vocab} has no {merges.name} beside it, which says how '
                     'words become its tokens')
  with blaming(f"{vocab} and {merges.name} are no vocabulary of CLIP's"):
    numbers = json.loads(_text(vocab))
    # The first line is the version.
    lines = [line for line in _text(merges).split('\n')
             if line.strip() and not line.startswith('#version')]
    found = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab=numbers, merges=[tuple(line.split()) for line in lines],
        continuing_subword_prefix='', end_of_word_suffix=_WORD_END,
        fuse_unk=False, unk_token=named['unk_token']))
  ends = [(named[name], numbers.get(named[name]))
          for name in ('eos_token', 'bos_token')]
  for token, number in ends:
    if number is None:
      raise ValueError(f'{vocab} lacks the token {token!r}')
  found.normalizer = tokenizers.normalizers.Sequence([
      tokenizers.normalizers.NFC(),
      tokenizers.normalizers.Replace(tokenizers.Regex(r'\s+'), ' '),
      tokenizers.normalizers.Lowercase()])
  found.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
      tokenizers.pre_tokenizers.Split(
          tokenizers.Regex(_CLIP_WORDS), behavior='removed', invert=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
  found.post_processor = tokenizers.processors.RobertaProcessing(
      *ends, trim_offsets=False, add_prefix_space=False)
  return found


def from_sentencepiece(path: pathlib.Path, named: Mapping[str, str]
                       ) -> tuple[Any, tuple[str, ...]]:
  """T5's tokenizer from its spiece.model.

  Returns:
    The backend, and tokens of it that no text may become by its letters.

  Raises:
    ValueError: as `sentencepiece_file.read`; or it lacks the end.
  """
  tokenizers = import_tokenizers()
  held = sentencepiece_file.read(path)
  gaps = tuple(f'<extra_id_{i}>' for i in reversed(range(_GAPS)))
  with blaming(f"{path} is no vocabulary of T5's"):
    found = tokenizers.Tokenizer(tokenizers.models.Unigram(
        [*held.pieces, *((gap, 0.0) for gap in gaps)], unk_id=held.unknown,
        byte_fallback=False))
    if held.charsmap:
      found.normalizer = tokenizers.normalizers.Precompiled(held.charsmap)
  # Words begin with a mark, which stands for the space before them.
  found.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
      tokenizers.pre_tokenizers.WhitespaceSplit(),
      tokenizers.pre_tokenizers.Metaspace(
          replacement=_SPACE, prepend_scheme='always', split=True)])
  end = named['eos_token']
  if (number := found.token_to_id(end)) is None:
    raise ValueError(f'{path} lacks the token {end!r}')
  found.post_processor = tokenizers.processors.TemplateProcessing(
      single=f'$A {end}', special_tokens=[(end, number)])
  return found, (*held.controls, *gaps)


def _text(path):
  return path.read_text(encoding='utf-8-sig')
