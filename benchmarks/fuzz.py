"""Coverage-guided fuzzing of the parsers that are this project's own.

  pip install atheris
  python -m benchmarks.fuzz --parser=pickle --minutes=10

libFuzzer changes the bytes of small whole files and keeps what reaches new
code of this package. A finding is what a reader may not do with a file (see
tests/damage.py): any error but the expected ones, one that does not name the
file, more than 2 s, or memory without end. Every place that findings come from
is shown once, and the fuzzing goes on; the first file of each stays in --keep,
to become a test.
"""

from collections.abc import Callable
import copy
import io
import json
import os
import pathlib
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from typing import Any, NamedTuple
import warnings
import zipfile

from absl import app
from absl import flags
from absl import logging
import atheris

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'tests'))
with atheris.instrument_imports(include=['msfp_jax', 'pickletools']):
  import damage  # noqa: E402
  from damaged_checkpoints import CHECKPOINTS  # noqa: E402
  from damaged_checkpoints import tensors_of  # noqa: E402
  from damaged_data import DATA  # noqa: E402
  from damaged_ours import OURS  # noqa: E402
  import numpy as np  # noqa: E402
  import torch_writer  # noqa: E402
  import toy  # noqa: E402

  from msfp_jax import convert  # noqa: E402
  from msfp_jax.base import errors  # noqa: E402
  from msfp_jax.base import pickles  # noqa: E402
  from msfp_jax.convert import contents  # noqa: E402
  from msfp_jax.convert import source  # noqa: E402
  from msfp_jax.convert import tensors as tensors_lib  # noqa: E402
  from msfp_jax.convert import text_encoder  # noqa: E402
  from msfp_jax.convert import torch_file  # noqa: E402
  from msfp_jax.convert import torch_tensors  # noqa: E402
  from msfp_jax.packed import file as packed_file  # noqa: E402

_SECONDS = 2
_MEMORY = 2**31  # bytes beyond what is held at the beginning
_CONTENT = {'a.weight': np.arange(6, dtype=np.float32).reshape(2, 3),
            'b': [np.ones(3, np.float16), (1, None, 'x', 2.5)]}


class Parser(NamedTuple):
  """A parser to fuzz.

  Attributes:
    write: writes a small whole file into a folder; returns it.
    read: (file) -> anything.
    head: of a file whose body stays as it is, the part that is changed, and
      its inverse, (part, whole file) -> file.
  """

  write: Callable[[pathlib.Path], pathlib.Path]
  read: Callable[[pathlib.Path], Any]
  head: tuple[Callable[[bytes], bytes], Callable[[bytes, bytes], bytes]] = (
      lambda whole: whole, lambda part, whole: part)


def _of(kind: str, read: Callable[[pathlib.Path], Any] | None = None) -> Parser:
  found = (OURS | CHECKPOINTS | DATA)[kind]
  return Parser(found.write, read or found.read)


def _write(name, make):
  def write(folder):
    make(folder / name)
    return folder / name

  return write


def _write_pickle(path):
  torch_writer.save_zip(path.with_suffix('.zip'), _CONTENT)
  with zipfile.ZipFile(path.with_suffix('.zip')) as archive:
    path.write_bytes(archive.read('archive/data.pkl'))


def _read_pickle(path):
  def resolve(pid):
    dtype, _, count = torch_file._parse_id(pid)
    if count > 1000:
      raise torch_file.TorchFileError('truncated')
    return tensors_lib.Storage(dtype, count, lambda first, number: np.zeros(
        number, dtype))

  try:
    content = pickles.read_pickle(io.BytesIO(path.read_bytes()),
                                  torch_tensors.CALLS, resolve,
                                  torch_file._other)
    contents.told(content)
    for tensor in tensors_lib.flatten(content).values():
      if not tensor.refused:
        tensor.read()
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error


def _unsealed(write):
  """The file without its digest, which would refuse all that follows."""
  def unsealed(folder):
    path = write(folder)
    whole = path.read_bytes()
    if path.suffix == '.json':
      content = json.loads(whole)
      del content['digest']
      path.write_text(json.dumps(content))
    else:
      content = json.loads(_json_of(whole))
      del content['__metadata__']['digest']
      content['__metadata__'].pop('header_digest', None)
      path.write_bytes(_with_json(json.dumps(content).encode(), whole))
    return path

  return unsealed


def _json_of(whole):
  size, = struct.unpack('<Q', whole[:8])
  return whole[8:8 + size]


def _with_json(text, whole):
  body = whole[8 + len(_json_of(whole)):]
  text += b' ' * (-len(text) % 8)
  return struct.pack('<Q', len(text)) + text + body


_HEAD = (_json_of, _with_json)


def _inner(key):
  """A text in the metadata of a safetensors file, such as its plan."""
  def part(whole):
    return json.loads(_json_of(whole))['__metadata__'][key].encode()

  def into(text, whole):
    header = json.loads(_json_of(whole))
    header['__metadata__'][key] = text.decode('utf-8', 'replace')
    return _with_json(json.dumps(header).encode(), whole)

  return part, into


def _read_packed(path):
  packed_file.load(path, model=toy.Toy())


def _origin_beside(file):
  return lambda path: convert.load_origin(str(path.parent / file))


_PACKED = _unsealed(OURS['packed'].write)
_TEACHER = _unsealed(OURS['teacher'].write)
PARSERS = {
    'pickle': Parser(_write('p.pkl', _write_pickle), _read_pickle),
    'zip': Parser(_write('m.pt', lambda path: torch_writer.save_zip(
        path, _CONTENT)), tensors_of),
    'stream': Parser(_write('m.pt', lambda path: torch_writer.save_legacy(
        path, _CONTENT)), tensors_of),
    'safetensors': _of('LoRA', tensors_of),
    'safetensors_head': _of('LoRA', tensors_of)._replace(head=_HEAD),
    'lora': _of('LoRA')._replace(head=_HEAD),
    'lora_config': _of('adapter_config.json'),
    'index': _of('index of shards', lambda path: source.open_source(path)),
    **{f'packed_{key}': Parser(_PACKED, _read_packed, _inner(key))
       for key in ('layers', 'plan', 'others', 'vectors')},
    'packed_head': Parser(_PACKED, _read_packed, _HEAD),
    'packed_1': Parser(OURS['packed of version 1'].write, _read_packed,
                       _inner('layers')),
    'model': Parser(_TEACHER, lambda path: convert.open_pretrained(str(path)),
                    _inner('model')),
    'origin': Parser(_TEACHER, OURS['origin'].read, _inner('origin')),
    'spec': Parser(_unsealed(OURS['spec'].write), OURS['spec'].read),
    'spec_1': _of('spec of version 1'),
    'statistics': _of('statistics of others'),
    'embeddings': _of('embeddings'),
    'images': _of('images, npz'),
    'cifar': _of('CIFAR-10, Python 2'),
    'journal': _of('file in pieces, its journal'),
    'metrics': _of('metrics'),
    'compvis': _of('CompVis yaml', _origin_beside('m.ckpt')),
    'diffusers': _of('diffusers, config.json', lambda path: (
        convert.load_origin(str(path.parent)))),
    'flux': _of('FLUX, config.json', lambda path: (
        convert.load_origin(str(path.parent)))),
    'clip': _of('CLIP, config.json', lambda path: (
        text_encoder.open_text_encoder(path.parent))),
    't5': _of('T5, config.json', lambda path: (
        text_encoder.open_text_encoder(path.parent))),
    'scheduler': _of('scheduler'),
    'flow': _of('scheduler of a flow'),
    'sentencepiece': _of('spiece.model'),
    'tokenizer_config': _of("CLIP's tokenizer_config.json"),
    'special_tokens': _of("CLIP's special_tokens_map.json"),
    'vocabulary': _of("CLIP's vocab.json"),
    'tokenizer_json': _of('tokenizer.json'),
    'prompts': _of('prompts'),
}
PARSER = flags.DEFINE_enum('parser', None, sorted(PARSERS), 'Which.',
                           required=True)
MINUTES = flags.DEFINE_float('minutes', 10, 'How long.')
KEEP = flags.DEFINE_string('keep', 'findings', 'Folder of findings.')


# Values that stand in the place of any in JSON.
_ODD = (None, True, -1, 0, 1, 2, 7, 2**31, 2**63, 10**30, -0.5, 1e-300, 1e308,
        float('nan'), float('inf'), '', 'x', 'E2M1', 'E9M9', [], [[]], [0, -1],
        [2**40, 2**40], {}, {'kind': 'Static'}, {'value': 0}, {'shape': [-1]})


def _change_json(text: bytes, rng: random.Random) -> bytes:
  """Changes, removes or copies one value of a JSON text."""
  content = json.loads(text)
  places, waiting = [], [content]
  while waiting:
    part = waiting.pop()
    keys = (list(part) if isinstance(part, dict) else range(len(part))
            if isinstance(part, list) else ())
    places += [(part, key) for key in keys]
    waiting += [part[key] for key in keys]
  if not places:
    return json.dumps(rng.choice(_ODD)).encode()
  (part, key), (other, from_key) = rng.choice(places), rng.choice(places)
  how = rng.randrange(5)
  if how == 0:
    del part[key]
  elif how == 1:
    part[key] = copy.deepcopy(other[from_key])
  elif how == 2 and isinstance(part, dict):
    part[rng.choice(['x', 'kind', str(from_key)])] = part.pop(key)
  elif how == 3 and isinstance(part[key], int | float):
    part[key] = rng.choice([-part[key], part[key] * 2, part[key] + 1, 1.5])
  else:
    part[key] = rng.choice(_ODD)
  return json.dumps(content).encode()


def _mutate(part: bytes, most: int, seed: int) -> bytes:
  """libFuzzer's changes of bytes; of JSON as often those of a value."""
  rng = random.Random(seed)
  if rng.random() < 0.5:
    try:
      return _change_json(part, rng)[:most]
    except (ValueError, RecursionError):
      pass
  return atheris.Mutate(part, most)


class _Fuzzer:
  """Feeds one parser, and keeps account of what it may not do."""

  def __init__(self, parser: Parser, folder: pathlib.Path, keep: pathlib.Path):
    self.parser, self.folder, self.keep = parser, folder, keep
    self.file = parser.write(folder)
    self.whole = self.file.read_bytes()
    self.runs = self.loads = self.refused = 0
    self.found: dict[str, int] = {}
    self.read()  # imports, and compiles, what is not to be timed

  def read(self) -> None:
    self.parser.read(self.file)

  def one(self, part: bytes) -> None:
    """Reads one changed file."""
    self.file.write_bytes(self.parser.head[1](part, self.whole))
    self.runs += 1
    start = time.process_time()
    what = ''
    try:
      self.read()
      self.loads += 1
    except errors.EXPECTED as error:
      self.refused += 1
      if str(self.folder) not in str(error):
        what = f'{error!r:.300} does not name the file {damage.place(error)}'
        key = f'unnamed {type(error).__name__} {damage.place(error)}'
    except Exception as error:
      what = f'{error!r:.300} {damage.place(error)}'
      key = f'{type(error).__name__} {damage.place(error)}'
    if (took := time.process_time() - start) > _SECONDS:
      what = key = f'took {took:.0f} s'
    if what:
      self.tell(key, what)

  def tell(self, key: str, what: str) -> None:
    self.found[key] = self.found.get(key, 0) + 1
    if self.found[key] == 1:
      self.keep.mkdir(parents=True, exist_ok=True)
      kept = self.keep / f'{PARSER.value}_{len(self.found)}{self.file.suffix}'
      shutil.copy(self.file, kept)
      print(f'finding: {what}: {kept}', flush=True)


def main(argv: list[str]) -> None:
  logging.set_verbosity(logging.FATAL)
  # None may come out of a reader, but NumPy's of arrays that Python 2 wrote.
  warnings.simplefilter('error')
  warnings.filterwarnings('ignore', 'Reading .* additional header parsing')
  parser = PARSERS[PARSER.value]
  with tempfile.TemporaryDirectory(dir='/dev/shm') as scratch:
    folder, seeds = (pathlib.Path(scratch, name) for name in 'fs')
    folder.mkdir(), seeds.mkdir()
    fuzzer = _Fuzzer(parser, folder, pathlib.Path(KEEP.value))
    (seeds / 'whole').write_bytes(parser.head[0](fuzzer.whole))
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (
        pages * resource.getpagesize() + _MEMORY, resource.RLIM_INFINITY))
    end = time.monotonic() + 60 * MINUTES.value

    def one(part: bytes) -> None:
      # By hand: libFuzzer ends the process, and nothing could be told.
      if time.monotonic() > end:
        print(f'{PARSER.value}: {fuzzer.runs:,} files, {fuzzer.refused:,} '
              f'refused, {fuzzer.loads:,} loaded, findings: '
              f'{fuzzer.found or "none"}', flush=True)
        shutil.rmtree(scratch)
        os._exit(bool(fuzzer.found))
      fuzzer.one(part)

    atheris.Setup([argv[0], '-timeout=60', '-rss_limit_mb=8192',
                   f'-max_len={2 * len(fuzzer.whole) + 4096}', '-verbosity=0',
                   str(seeds)], one, custom_mutator=_mutate)
    atheris.Fuzz()


if __name__ == '__main__':
  app.run(main)
