"""Imports run downwards only (CONTRIBUTING.md, Style)."""

import ast
import pathlib
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'msfp_jax'

# A module imports only rooms of rows above its own (and its own room).
ORDER = [
    {'pickle_names'},
    {'devices', 'files', 'pickles', 'progress'},
    {'conditions', 'formats', 'layers', 'pictures', 'data', 'diffusion',
     'models',
     'checkpoint'},
    {'writer', 'convert'},
    {'quantizers', 'losses', 'loop', 'metrics'},
    {'search', 'pretrain', 'kernels'},
    {'spec'},
    {'calibrate', 'inference', 'quantize'},
    {'talora'},
    {'student', 'experiment'},
    {'packed'},
    {'packed_header', 'packed_reader'},
    {'export'},
    {'finetune', 'generate', 'sample_store', 'report'},
    {'rows'},
]
# On top of all: they may import each other, and nothing below imports them.
TOP = {'__init__', 'cli', 'evaluate', 'make_stats', 'study'}

QUANTIZATION = {'formats', 'quantizers', 'search', 'spec', 'calibrate',
                'quantize', 'talora', 'student', 'losses', 'finetune', 'rows',
                'kernels', 'inference', 'packed', 'packed_header',
                'packed_reader', 'export'}
ENTRY_POINTS = {'train', 'eval', 'configs'}
FRAMEWORKS = {'torch', 'torchvision', 'tensorflow'}

RANK = {room: row for row, rooms in enumerate([*ORDER, TOP])
        for room in rooms}
# Commands (python -m) stand above all rooms.
FILES = sorted(set(PACKAGE.rglob('*.py')) - set(PACKAGE.rglob('__main__.py')))


def room_of(path):
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imports(path):
  """Lists the dotted names that a file imports, also inside functions."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = '.' * node.level + (node.module or '')
      names |= {f'{base}.{alias.name}' for alias in node.names}
  return names


def rooms_imported(path):
  """Lists the rooms that a file imports; '__init__' for the package."""
  rooms = set()
  for name in imports(path):
    head, *rest = name.split('.')
    if head == 'msfp_jax':
      known = rest and ((PACKAGE / f'{rest[0]}.py').exists()
                        or (PACKAGE / rest[0]).is_dir())
      rooms.add(rest[0] if known else '__init__')
  return rooms


by_file = pytest.mark.parametrize(
    'path', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))


def test_files_are_found():
  assert {'formats', 'models', 'search', 'spec'} <= set(map(room_of, FILES))


@by_file
def test_every_room_has_a_place(path):
  assert room_of(path) in RANK, 'add it to ORDER or TOP in this file'


@by_file
def test_imports_run_downwards_only(path):
  room = room_of(path)
  row = RANK.get(room, RANK['__init__'])
  below = {other for other in RANK if RANK[other] < row}
  allowed = below | {room} | (TOP if room in TOP else set())
  assert rooms_imported(path) <= allowed


@by_file
def test_no_entry_points_no_other_frameworks_no_relative_imports(path):
  heads = {name.split('.')[0] for name in imports(path)}
  assert not heads & (ENTRY_POINTS | FRAMEWORKS | {''})


@pytest.mark.parametrize(
    'path', [p for p in FILES if room_of(p) == 'models'],
    ids=lambda p: p.name)
def test_models_are_plain_flax(path):
  outside = {name.split('.')[0] for name in imports(path)
             if not name.startswith('msfp_jax.models')}
  assert outside <= sys.stdlib_module_names | {'jax', 'flax', 'numpy'}, (
      'models import nothing of the package but models')


@by_file
def test_only_the_report_draws_and_only_evaluation_reports(path):
  """So that training waits for no drawing library."""
  heads = {name.split('.')[0] for name in imports(path)}
  room = room_of(path)
  assert room == 'report' or not heads & {'matplotlib', 'jinja2'}
  assert room in ('report', 'evaluate') or 'report' not in rooms_imported(path)


@pytest.mark.parametrize('room', ['metrics', 'data', 'writer', 'models'])
def test_no_quantization_beneath(room):
  """Rooms below import no quantization, directly or through others."""
  reached, todo = set(), {room}
  while todo:
    reached |= todo
    todo = {other for path in FILES if room_of(path) in todo
            for other in rooms_imported(path)} - reached
  assert not reached & QUANTIZATION
