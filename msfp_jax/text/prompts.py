"""Files of prompts: a text file with one a line, or .jsonl with fields."""

from collections.abc import Callable
import dataclasses
import json
import pathlib
from typing import Any

_MOST_SEED = 2**32 - 1
_FIELDS = ('prompt', 'negative_prompt', 'seed')


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What one image is made from.

  Attributes:
    prompt: what it shows; '' for an image of anything.
    seed: of its noise, 0 to 2^32 - 1.
    negative_prompt: what guidance leads away from; '' for none.
  """

  prompt: str
  seed: int
  negative_prompt: str = ''


def read_prompts(path: str | pathlib.Path, seed: int = 0) -> list[Prompt]:
  """Reads a file of prompts.

  Args:
    path: of a .txt, with a prompt a line, or of a .jsonl, with an object a
      line: `prompt`, and, if wanted, `seed` and `negative_prompt`.
    seed: of the first prompt; each that states none has the one that follows
      from its place, seed + 0, seed + 1 and so on, whatever others state.

  Returns:
    The prompts, in order.

  Raises:
    FileNotFoundError: nothing there.
    ValueError: another file, blank lines or lines that are no such object,
      all named by their numbers, a seed out of range, or no prompts.
  """
  path = pathlib.Path(path).expanduser()
  if path.suffix not in _READERS:
    raise ValueError(f'{path}: prompts must be a file of {sorted(_READERS)}')
  if not path.is_file():
    raise FileNotFoundError(f'no prompts at {path}')
  lines = _lines(path)
  blank = [str(i) for i, line in enumerate(lines, 1) if not line.strip()]
  if blank:
    raise ValueError(
        f'{path} has blank lines, whose prompts would be empty: '
        f'{", ".join(blank)}. Delete them; an empty prompt that is meant is '
        '{"prompt": ""} in a .jsonl')
  found, problems = [], []
  for i, line in enumerate(lines):
    try:
      found.append(_prompt(_READERS[path.suffix](line), seed + i))
    except ValueError as error:
      problems.append(f'line {i + 1}: {error}')
  if problems:
    raise ValueError(f'{path}:\n  ' + '\n  '.join(problems))
  if not found:
    raise ValueError(f'{path} holds no prompts')
  return found


def _lines(path):
  try:
    text = path.read_text(encoding='utf-8-sig')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is no text in UTF-8: {error.reason} at byte '
                     f'{error.start}') from error
  # Not by str.splitlines: a prompt may hold other characters that it takes for
  # the end of a line. The end of the last line begins no other.
  lines = [line.removesuffix('\r') for line in text.split('\n')]
  return lines[:-1] if not lines[-1] else lines


def _object(line: str) -> dict[str, Any]:
  try:
    fields = json.loads(line)
  except ValueError as error:
    raise ValueError(f'no JSON ({error})') from error
  if not isinstance(fields, dict):
    raise ValueError(f'must be an object such as {{"prompt": "a cat"}}, got '
                     f'{line.strip()[:40]}')
  if odd := sorted(fields.keys() - set(_FIELDS)):
    raise ValueError(f'fields {odd}: only {list(_FIELDS)} are known')
  return fields


def _prompt(fields, seed):
  for name in ('prompt', 'negative_prompt'):
    if not isinstance(fields.get(name, '' if name != 'prompt' else None), str):
      raise ValueError(f'{name}={fields.get(name)!r}: must be a text')
  found = fields.get('seed', seed)
  if type(found) is not int or not 0 <= found <= _MOST_SEED:
    raise ValueError(f'seed={found!r}: must be a whole number from 0 to '
                     f'{_MOST_SEED}')
  return Prompt(fields['prompt'], found, fields.get('negative_prompt', ''))


# A new kind of file is one entry: a line -> the fields of a prompt.
_READERS: dict[str, Callable[[str], dict[str, Any]]] = {
    '.txt': lambda line: {'prompt': line}, '.jsonl': _object}
