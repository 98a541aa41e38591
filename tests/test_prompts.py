"""Files of prompts, and what is said of bad ones."""

import pytest

from msfp_jax.text import prompts
from msfp_jax.text.prompts import Prompt


def read(folder, name, content, **options):
  (folder / name).write_bytes(content.encode())
  return prompts.read_prompts(folder / name, **options)


def test_a_prompt_a_line(tmp_path):
  """Lines of Windows, its mark, and characters that end lines elsewhere."""
  found = read(tmp_path, 'a.txt', '\ufeffa cat\r\ntwo\u2028parts, é\n', seed=5)
  assert found == [Prompt('a cat', 5), Prompt('two\u2028parts, é', 6)]


def test_objects(tmp_path):
  found = read(tmp_path, 'a.jsonl', '\n'.join([
      '{"prompt": "a cat"}', '{"prompt": "", "seed": 9}',
      '{"prompt": "a dog", "negative_prompt": "red"}']), seed=3)
  assert found == [Prompt('a cat', 3), Prompt('', 9), Prompt('a dog', 5, 'red')]


@pytest.mark.parametrize('name, content, said', [
    ('a.txt', 'a\n\nb\n  \n', 'blank lines.*: 2, 4'),
    ('a.txt', '\n', 'blank lines.*: 1'), ('a.txt', '', 'no prompts'),
    ('a.csv', 'a', 'must be a file of'),
    ('a.jsonl', '{"prompt": "a"}\n{', 'line 2: no JSON'),
    ('a.jsonl', '["a"]', 'line 1: must be an object'),
    ('a.jsonl', '{"seed": 1}', 'line 1: prompt=None'),
    ('a.jsonl', '{"prompt": 3}', 'prompt=3'),
    ('a.jsonl', '{"prompt": "a", "negative_prompt": null}', 'negative_prompt'),
    ('a.jsonl', '{"prompt": "a", "style": "b"}', 'style'),
    ('a.jsonl', '{"prompt": "a", "seed": -1}', 'seed=-1'),
    ('a.jsonl', '{"prompt": "a", "seed": 4294967296}', 'seed=4294967296'),
    ('a.jsonl', '{"prompt": "a", "seed": true}', 'seed=True'),
    ('a.jsonl', '{"prompt": 3}\n{"prompt": "a", "seed": 1.5}',
     '(?s)line 1.*line 2')])
def test_bad_files_are_refused(name, content, said, tmp_path):
  with pytest.raises(ValueError, match=said):
    read(tmp_path, name, content)


def test_other_encodings_are_refused(tmp_path):
  (tmp_path / 'a.txt').write_bytes('café'.encode('latin-1'))
  with pytest.raises(ValueError, match='UTF-8'):
    prompts.read_prompts(tmp_path / 'a.txt')


def test_a_seed_beyond_the_last_is_refused(tmp_path):
  with pytest.raises(ValueError, match='line 2: seed'):
    read(tmp_path, 'a.txt', 'a\nb', seed=2**32 - 1)
