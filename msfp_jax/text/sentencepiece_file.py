"""Reads sentencepiece's file of a unigram vocabulary: T5's spiece.model.

The file is a message of protocol buffers, which is read here as data: fields
of a number and a type, of which those that matter are taken
(sentencepiece_model.proto of github.com/google/sentencepiece).
"""

from collections.abc import Iterator
import dataclasses
import math
import pathlib
import struct

# Fields of ModelProto, of a SentencePiece, of its TrainerSpec and of its
# NormalizerSpec.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE = 3
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES = 2, 3, 4
# Types of models by their numbers, and of pieces.
_MODELS = {1: 'unigram', 2: 'BPE', 3: 'word', 4: 'char'}
_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3
_KINDS = {_NORMAL: 'normal', _UNKNOWN: 'unknown', _CONTROL: 'control',
          4: 'user-defined', 5: 'unused', 6: 'byte'}


@dataclasses.dataclass(frozen=True)
class SentencePieces:
  """A unigram vocabulary.

  Attributes:
    pieces: (text, logarithm of its probability); the place is the token.
    unknown: the token of what no piece covers.
    controls: pieces that stand for no text, such as the end.
    charsmap: sentencepiece's own table of characters and what they become; may
      be empty.
  """

  pieces: tuple[tuple[str, float], ...]
  unknown: int
  controls: tuple[str, ...]
  charsmap: bytes


def read(path: str | pathlib.Path) -> SentencePieces:
  """Reads a file.

  Raises:
    ValueError: it is none of sentencepiece, it is no unigram model, or it has
      what T5's do not have.
  """
  try:
    return _read(pathlib.Path(path).read_bytes())
  # A number where a text or a message stands has none of their methods.
  except (IndexError, struct.error, UnicodeDecodeError, TypeError,
          AttributeError) as error:
    raise ValueError(f"{path} is no model of sentencepiece's, or a damaged "
                     f'one: {error}') from error
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error


def _read(data):
  pieces, trainer, normalizer = [], {}, {}
  for number, value in _fields(data):
    if number == _PIECES:
      fields = dict(_fields(value))
      pieces.append((fields[_TEXT].decode() if _TEXT in fields else '',
                     *struct.unpack('<f', fields.get(_SCORE, bytes(4))),
                     fields.get(_TYPE, _NORMAL)))
    elif number == _TRAINER:
      trainer = dict(_fields(value))
    elif number == _NORMALIZER:
      normalizer = dict(_fields(value))
  if not pieces:
    raise ValueError("no model of sentencepiece's: it holds no pieces")
  _check(pieces, trainer, normalizer)
  charsmap = normalizer.get(_CHARSMAP, b'')
  if not isinstance(charsmap, bytes):
    raise TypeError('a number where its table of characters stands')
  kinds = [kind for *_, kind in pieces]
  return SentencePieces(
      tuple((text, score) for text, score, _ in pieces),
      kinds.index(_UNKNOWN),
      tuple(text for text, _, kind in pieces if kind == _CONTROL),
      charsmap)


def _check(pieces, trainer, normalizer):
  model = trainer.get(_MODEL_TYPE, 1)
  if model != 1:
    raise ValueError(f'a {_MODELS.get(model, model)} model of sentencepiece: '
                     "T5's are unigram models")
  odd = sorted({_KINDS.get(kind, str(kind)) for *_, kind in pieces}
               - {'normal', 'unknown', 'control'})
  if odd:
    raise ValueError(f"it holds pieces that are {odd}, which T5's vocabulary "
                     'does not')
  if not all(math.isfinite(score) for _, score, _ in pieces):
    raise ValueError('it holds pieces whose probability is no number')
  if sum(kind == _UNKNOWN for *_, kind in pieces) != 1:
    raise ValueError('it must have one piece for what is unknown')
  if not (normalizer.get(_DUMMY_PREFIX, 1) and
          normalizer.get(_REMOVE_SPACES, 1)):
    raise ValueError("it keeps spaces that T5's vocabulary does not")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
  """The fields of a message, in order: (number, value).

  Values are whole numbers, or bytes of all else. Raises IndexError where the
  data ends within one.
  """
  at = 0
  while at < len(data):
    tag, at = _varint(data, at)
    kind = tag & 7
    if kind == 0:
      value, at = _varint(data, at)
    else:
      if kind == 2:
        size, at = _varint(data, at)
      elif kind in (1, 5):
        size = 8 if kind == 1 else 4
      else:
        raise IndexError(f'a field of type {kind}')
      if at + size > len(data):
        raise IndexError(f'a field of {size} bytes, of which {len(data) - at} '
                         'are there')
      value, at = data[at:at + size], at + size
    yield tag >> 3, value


def _varint(data, at):
  """A number of seven bits a byte, the lowest first: (number, place behind)."""
  number = shift = 0
  while True:
    if shift > 63:
      raise IndexError('a number of more than 64 bits')
    byte = data[at]
    at += 1
    number |= (byte & 0x7f) << shift
    if byte < 0x80:
      return number, at
    shift += 7
