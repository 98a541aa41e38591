"""What the documentation names exists: files, anchors, names, commands."""

import ast
import functools
import importlib
import pathlib
import re
import runpy

import pytest

import msfp_jax as msfp
from msfp_jax.quant import recipes
from msfp_jax.quant import roles

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ('benchmarks', 'configs', 'msfp_jax', 'tests')
DOCS = sorted(str(path.relative_to(ROOT)) for path in (
    ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *ROOT.glob('docs/*.md'),
    ROOT / 'msfp_jax/assets/README.md'))
# Dotted names that are not ours.
OTHERS = {'builtins', 'flax', 'jax', 'lax', 'ml_dtypes', 'nn', 'np', 'os',
          'optax', 'torch', 'xla'}
# Ends of file names: what they end is no name in Python.
FILE_ENDS = ('ckpt', 'html', 'json', 'jsonl', 'md', 'npz', 'png', 'pth', 'py',
             'safetensors', 'txt', 'yaml')
DOTTED = re.compile(r'([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\(.*\))?')

by_doc = pytest.mark.parametrize('doc', DOCS)


@functools.cache
def python_files():
  """Every Python file of the repository, '/quant/roles.py' at its end."""
  found = [*ROOT.glob('*.py')]
  for folder in FOLDERS:
    found += (ROOT / folder).rglob('*.py')
  return sorted('/' + str(path.relative_to(ROOT)) for path in found)


def read(doc):
  return (ROOT / doc).read_text()


def without_blocks(text):
  """Without fenced and indented code."""
  text = re.sub(r'^```.*?^```$', '', text, flags=re.M | re.S)
  return re.sub(r'^    .*$', '', text, flags=re.M)


def spans(text):
  """What stands in single backticks."""
  return re.findall(r'`([^`\n]+)`', without_blocks(text))


def code(text):
  """Spans and blocks, a line each."""
  blocks = re.findall(r'^```.*?^```$', text, flags=re.M | re.S)
  return '\n'.join(
      [*spans(text), *blocks, *re.findall(r'^    .*$', text, flags=re.M)])


def slugs(text):
  """The anchors of the headings, as GitHub makes them."""
  headings = re.findall(r'^#+ (.+)$', without_blocks(text), flags=re.M)
  return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
          for heading in headings}


def broken_links(doc, text):
  """Relative links whose file or anchor is not there."""
  found = []
  for target in re.findall(r'\]\(([^)\s]+)\)', without_blocks(text)):
    if re.match(r'[a-z]+:', target):
      continue
    path, _, anchor = target.partition('#')
    file = (ROOT / doc).parent / path if path else ROOT / doc
    if not file.exists() or (
        anchor and anchor not in slugs(file.read_text())):
      found.append(target)
  return found


def missing_files(text):
  """Python files that are named and not there; PLACEHOLDERS are not looked at.

  A name may leave out the folders that a reader knows: `roles.py`.
  """
  named = set(re.findall(r'(?<![\w*>/.])[a-z_][\w/]*\.py\b', text))
  return {name for name in named if name.islower() and not any(
      file.endswith('/' + name) for file in python_files())}


@functools.cache
def tree(file):
  return ast.parse((ROOT / file[1:]).read_text())


def _bound(node):
  """Names that a statement binds."""
  if isinstance(node, ast.FunctionDef | ast.ClassDef):
    return {node.name}
  if isinstance(node, ast.Import | ast.ImportFrom):
    return {alias.asname or alias.name for alias in node.names}
  targets = getattr(node, 'targets', [getattr(node, 'target', None)])
  names = set()
  for target in targets:
    parts = target.elts if isinstance(target, ast.Tuple) else [target]
    names |= {part.id for part in parts if isinstance(part, ast.Name)}
  return names


@functools.cache
def classes():
  """{class of the package: (names in its body, names of its bases)}."""
  found = {}
  for file in python_files():
    if not file.startswith('/msfp_jax/'):
      continue
    for node in ast.walk(tree(file)):
      if isinstance(node, ast.ClassDef):
        names = set().union(*map(_bound, node.body))
        bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
        found[node.name] = (names, bases)
  return found


def has_member(name, member):
  names, bases = classes().get(name, ((), ()))
  return member in names or any(has_member(base, member) for base in bases)


def is_name(dotted):
  """Whether `module.name`, `Class.member` or `config.field` exists."""
  first, *rest = dotted.split('.')
  if first == 'config':
    return is_field(rest)
  if first == 'msfp':
    return len(rest) == 1 and hasattr(msfp, rest[0])
  if first in classes():
    return len(rest) == 1 and has_member(first, rest[0])
  parts = [first, *rest]
  for cut in range(len(parts), 0, -1):
    path = '/' + '/'.join(parts[:cut])
    for file in python_files():
      if file.endswith((path + '.py', path + '/__init__.py')) and (
          not parts[cut:] or _holds(file, parts[cut:])):
        return True
  return False


def _holds(file, names):
  """Whether a module has a name, or a class with a member."""
  first, *rest = names
  if not any(first in _bound(node) for node in tree(file).body):
    return False
  return not rest or (len(rest) == 1 and has_member(first, rest[0]))


def unknown_names(text):
  """Dotted names in backticks that are not there."""
  found = set()
  for span in spans(text):
    match = DOTTED.fullmatch(span)
    if match and (dotted := match[1]).split('.')[-1] not in FILE_ENDS:
      if dotted.split('.')[0] not in OTHERS and not is_name(dotted):
        found.add(dotted)
  return found


@functools.cache
def fields():
  return importlib.import_module('configs.common').get_config()


def is_field(names):
  """Whether a config has the field; config.model's are the family's."""
  at = fields()
  for name in names:
    if not hasattr(at, 'keys') or name not in at:
      return False
    at = at[name]
  return True


def unknown_fields(text):
  named = re.findall(r'--config((?:\.[a-z_]+)+)', text)
  return {name for name in named if not name.startswith('.model.')
          and not is_field(name[1:].split('.'))}


def unknown_variants(text):
  """configs/NAME.py:WORDS that the file does not take; STUDIES count too."""
  found = set()
  for path, words in re.findall(
      r'(configs/[a-z_0-9]+\.py):([a-z0-9_,=+-]+)', text):
    module = runpy.run_path(str(ROOT / path))
    if words in module.get('STUDIES', {}):
      continue
    try:
      module['get_config'](words)
    except ValueError:
      found.add(f'{path}:{words}')
  return found


def unknown_modules(text):
  """What `python -m` is to run and is not there."""
  named = re.findall(r'-m ((?:msfp_jax|benchmarks)[\w.]*\w)', text)
  return {name for name in named if not any(
      (ROOT / (name.replace('.', '/') + end)).is_file()
      for end in ('.py', '/__main__.py'))}


@functools.cache
def targets():
  return set(re.findall(r'^([a-z0-9-]+):.*##', read('Makefile'), flags=re.M))


def unknown_targets(text):
  commands = re.sub('#.*', '', code(text))
  named = re.findall(
      r'(?<![\w-])make (?:[A-Z_]+=\S+ )*([a-z][a-z0-9-]*)', commands)
  return set(named) - targets()


@by_doc
def test_links_lead_somewhere(doc):
  assert not broken_links(doc, read(doc))


@by_doc
def test_files_are_there(doc):
  assert not missing_files(read(doc))


@by_doc
def test_names_are_there(doc):
  assert not unknown_names(read(doc))


@by_doc
def test_commands_are_there(doc):
  text = read(doc)
  assert not unknown_modules(text)
  assert not unknown_targets(text)
  assert not unknown_fields(text)
  assert not unknown_variants(text)


def test_make_runs_modules_that_are_there():
  assert not unknown_modules(read('Makefile'))
  assert {'demo', 'test'} <= targets()


@by_doc
def test_lists_of_exceptions_have_their_present_names(doc):
  """A former name may be said to be one, in the line that says so."""
  for line in read(doc).splitlines():
    if any(name in line for name in roles.FORMER_NAMES):
      assert 'former' in line


def test_every_recipe_has_its_row():
  """Those of the package; other tests add their own while they run."""
  table = read('docs/recipes.md')
  rows = re.findall(r'^\| (`.*?`) \|', table, flags=re.M)
  named = set(re.findall(r'`(\w+)`', ' '.join(rows)))
  assert named == set(recipes.RECIPES)


def test_the_map_has_every_room():
  text = read('CONTRIBUTING.md')
  rooms = [path.parent for path in (ROOT / 'msfp_jax').glob('*/*')]
  named = set(re.findall(r'^ +(\w+)/', text, flags=re.M))
  assert {room.name for room in rooms if room.name != '__pycache__'} <= named
  assert {*FOLDERS, 'docs'} <= named


def _imports(text):
  """(old, new) of the table of names that moved."""
  table = text[text.index('| before |'):].split('\n\n')[0]
  return re.findall(r'^\| `([\w.]+)` \| `([\w.]+)`', table, flags=re.M)


def test_names_that_moved_are_where_the_changelog_says():
  rows = _imports(read('CHANGELOG.md'))
  assert len(rows) > 10
  for old, new in rows:
    assert is_name(new), new
    assert not is_name(old), old
  assert not broken_links('CHANGELOG.md', read('CHANGELOG.md'))


@pytest.mark.parametrize('find, good, bad', [
    (functools.partial(broken_links, 'docs/method.md'),
     '[a](../README.md) [b](#1-terms) [c](https://x.org/none.md)',
     '[a](README.md)'),
    (functools.partial(broken_links, 'docs/method.md'),
     '[a](evaluation.md#metrics)', '[a](evaluation.md#no-heading)'),
    (missing_files, '`quant/roles.py`, configs/NAME.py', 'see roles_.py'),
    (missing_files, '`test_<module>.py`', 'kernels/roles.py'),
    (unknown_names, '`search.search` `search.search(x)`', '`search.find`'),
    (unknown_names, '`msfp.RECIPES`', '`msfp.recipes`'),
    (unknown_names, '`msfp_jax.quant.roles`', '`msfp_jax.roles`'),
    (unknown_names, '`QTensor.nbits` `Static.is_full`', '`QTensor.bytes`'),
    (unknown_names, '`config.finetune.rank`', '`finetune.rank`'),
    (unknown_names, '`report.html` `jax.jit`', '`deployed.layers`'),
    (unknown_modules, 'python -m msfp_jax.run.study', '-m msfp_jax.study'),
    (unknown_modules, 'python -m msfp_jax.metrics', '-m benchmarks.none'),
    (unknown_targets, '`make JAX_EXTRA=tpu demo`; make suffices',
     '`make nothing`'),
    (unknown_targets, '    make test     # make sure', '    make tests'),
    (unknown_fields, '--config.eval.rows=x --config.FIELD=1',
     '--config.eval.row=x'),
    (unknown_variants, 'configs/digits.py:w6a6,skip-8 configs/digits.py:table',
     'configs/digits.py:skip-7'),
])
def test_what_is_not_there_is_found(find, good, bad):
  assert not find(good)
  assert find(bad)
