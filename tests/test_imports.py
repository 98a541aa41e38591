"""Imports run downwards only, file by file (CONTRIBUTING.md, Style)."""

import ast
import functools
import pathlib
import re
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'msfp_jax'

# Each room and those that its files may import beside their own. All of a
# row's words stand above it, with all of theirs: so what metrics and data do
# not name they do not reach either.
ROOMS = {
    'base': '',
    'models': '',
    'diffusion': 'base',
    'data': 'base',
    # A model of v is one of the noise by the schedule that it was trained on.
    'convert': 'base models diffusion',
    # Prompts become conditions by encoders that convert reads; nothing in it
    # knows of quantization.
    'text': 'base models diffusion convert',
    'metrics': 'base models diffusion data convert',
    'quant': 'base diffusion',
    'kernels': 'base diffusion quant',
    'tune': 'base models diffusion data convert quant kernels',
    'packed': 'base models diffusion data convert quant kernels tune',
    # Below run/, since it draws what it is given and evaluation calls it.
    'report': 'base models diffusion data convert metrics quant kernels tune '
              'packed',
    'run': 'base models diffusion data convert text metrics quant kernels tune '
           'packed report',
}
ENTRY_POINTS = {'train', 'eval', 'configs'}
FRAMEWORKS = {'torch', 'torchvision', 'tensorflow'}
DRAWING = {'matplotlib', 'jinja2'}

# The one file that knows which kernels there are, each in a folder beside it.
DOOR = 'kernels/choice.py'
CHIPS = sorted(path.parent.name
               for path in (PACKAGE / 'kernels').glob('*/__init__.py'))
# Not inside of words, such as outputs.
CHIP_NAMES = re.compile(
    r'(?<![a-z])(tpu|gpu|mosaic|hopper|blackwell|ampere|cuda|nvidia|rocm|'
    r'wgmma|sm_?[89]0|[ah][12]00(?!\d)|v[4-7][epx](?![a-z]))', re.IGNORECASE)

# The public names stand above all rooms, and so do commands (python -m).
FILES = sorted(
    str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob('*.py')
    if path.name != '__main__.py' and path.parent != PACKAGE)

by_file = pytest.mark.parametrize('file', FILES)


def room_of(file):
  return file.split('/')[0]


def chip_of(file):
  """The chip whose folder holds the file; None elsewhere."""
  room, name, *_ = file.split('/')
  return name if room == 'kernels' and name in CHIPS else None


@functools.cache
def tree_of(file):
  return ast.parse((PACKAGE / file).read_text())


@functools.cache
def imports(file):
  """Dotted names of all that a file imports, also inside functions."""
  names = set()
  for node in ast.walk(tree_of(file)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = '.' * node.level + (node.module or '')
      names |= {f'{base}.{alias.name}' for alias in node.names}
  return names


def file_of(name):
  """The file that 'msfp_jax.room.module.thing' is imported from."""
  parts = name.split('.')[1:]
  for end in range(len(parts), -1, -1):
    path = PACKAGE.joinpath(*parts[:end])
    for found in (path.with_suffix('.py'), path / '__init__.py'):
      if found.is_file():
        return str(found.relative_to(PACKAGE))
  raise AssertionError(f'{name} is of no file')


@functools.cache
def imported_files(file):
  return {file_of(name) for name in imports(file)
          if name.split('.')[0] == 'msfp_jax'}


def reached(file):
  """All files that are imported with a file, and itself."""
  found, todo = set(), {file}
  while todo:
    found |= todo
    todo = {other for one in todo for other in imported_files(one)} - found
  return found


def code_of(file):
  """The file without comments and docstrings, as Python writes it."""
  tree = ast.parse((PACKAGE / file).read_text())
  for node in ast.walk(tree):
    body = getattr(node, 'body', None)
    if isinstance(body, list) and body and isinstance(
        body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
      body[0].value.value = ''
  return ast.unparse(tree)


def test_files_are_found():
  assert {'base/files.py', 'models/unet.py', 'quant/calibrate.py',
          'run/train.py', DOOR} <= set(FILES)
  assert CHIPS
  assert file_of('msfp_jax.base.files.write_json') == 'base/files.py'
  assert file_of('msfp_jax.diffusion') == 'diffusion/__init__.py'


def test_rooms_are_in_order():
  seen = set()
  for room, below in ROOMS.items():
    below = set(below.split())
    assert below <= seen, room
    assert all(set(ROOMS[other].split()) <= below for other in below), room
    seen.add(room)


@by_file
def test_imports_run_downwards_only(file):
  room = room_of(file)
  assert room in ROOMS, 'add its room to ROOMS in this file'
  allowed = {room, *ROOMS[room].split()}
  assert {room_of(other) for other in imported_files(file)} <= allowed


@by_file
def test_no_file_imports_itself_by_a_circle(file):
  assert all(file not in reached(other) for other in imported_files(file))


@by_file
def test_no_entry_points_no_other_frameworks_no_relative_imports(file):
  heads = {name.split('.')[0] for name in imports(file)}
  assert not heads & (ENTRY_POINTS | FRAMEWORKS | {''})


@pytest.mark.parametrize('file', [f for f in FILES if room_of(f) == 'models'])
def test_models_are_plain_flax(file):
  outside = {name.split('.')[0] for name in imports(file)} - {'msfp_jax'}
  assert outside <= sys.stdlib_module_names | {'jax', 'flax', 'numpy'}


@by_file
def test_only_the_report_draws(file):
  heads = {name.split('.')[0] for name in imports(file)}
  assert room_of(file) == 'report' or not heads & DRAWING


def test_training_waits_for_no_drawing_library():
  assert not {other for other in reached('run/train.py')
              if room_of(other) == 'report'}


@by_file
def test_a_chip_is_imported_by_the_door_alone(file):
  """And by its own folder."""
  chips = {chip_of(other) for other in imported_files(file)} - {None}
  assert chips <= ({*CHIPS} if file == DOOR else {chip_of(file)})


@pytest.mark.parametrize(
    'file', [f for f in FILES if f != DOOR and chip_of(f) is None])
def test_a_chip_is_named_by_the_door_alone(file):
  """In comments and docstrings all may speak of it."""
  found = {match.group() for match in CHIP_NAMES.finditer(code_of(file))}
  assert not found


@pytest.mark.parametrize('text, found', [
    ('outputs = HOPPER', ['HOPPER']), ("kernel == 'mosaic_gpu'", [
        'mosaic', 'gpu']), ("kind = 'TPU7x'", ['TPU']), ('_tpu_only', ['tpu']),
    ('V5e', ['V5e']), ("'H100'", ['H100']), ('sm_90a', ['sm_90']),
    ('input_units, a1000, save_vexed', [])])
def test_names_of_chips_are_told_from_other_words(text, found):
  assert CHIP_NAMES.findall(text) == found
