"""Pickles are read as data; nothing in them runs."""

import collections
import datetime
import io
import os
import pickle
import pickletools

import pytest

from msfp_jax import pickles


def read(content, **options):
  return pickles.read_pickle(io.BytesIO(content), **options)


PLAIN = {
    'numbers': [0, 1, -1, 255, 256, 65536, -2**31, 2**40, 10**30, 1.5, -0.0],
    'strings': ['', 'a', 'ü' * 300, b'', b'\x00\xff', b'x' * 300],
    'containers': {'a': (1,), 'b': (1, 2), 'c': (1, 2, 3), 'd': (1, 2, 3, 4),
                   'e': [], 'f': (), 'g': {}, 3: None, (1, 2): True},
    'flags': [True, False, None],
}


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_containers_are_as_pickle_reads_them(protocol):
  assert read(pickle.dumps(PLAIN, protocol)) == PLAIN


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_ordered_dicts_are_dicts_and_sets_are_lists(protocol):
  content = {'o': collections.OrderedDict([('b', 1), ('a', 2)]),
             's': {1, 2, 3}, 'f': frozenset({4})}
  assert read(pickle.dumps(content, protocol)) == {
      'o': {'b': 1, 'a': 2}, 's': [1, 2, 3], 'f': [4]}


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_shared_values_are_shared(protocol):
  shared = [1]
  first, second = read(pickle.dumps([shared, shared], protocol))
  assert first is second
  circle = []
  circle.append(circle)
  result = read(pickle.dumps(circle, protocol))
  assert result[0] is result


class Custom:
  """An object with state, of a module that is no library."""

  def __init__(self):
    self.value = 3


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_other_objects_are_opaque(protocol):
  result = read(pickle.dumps({'a': Custom(), 'b': 2}, protocol))
  assert result['b'] == 2
  assert isinstance(result['a'], pickles.Opaque)


def test_harmless_objects_of_the_standard_library_are_opaque():
  result = read(pickle.dumps(datetime.date(2020, 1, 2)))
  assert result.made_by == 'datetime.date'


ran = []


def harm(*args):
  ran.append(args)


class Harm:
  """Its pickle calls a function of this module."""

  def __reduce__(self):
    return harm, (1,)


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_called(protocol):
  ran.clear()
  content = pickle.dumps([Harm(), {'nested': (Harm(),)}], protocol)
  pickle.loads(content)
  assert ran  # the attack works on pickle itself
  ran.clear()
  first, _ = read(content)
  assert isinstance(first, pickles.Opaque) and first.made_by.endswith('.harm')
  assert not ran


def reduce_pickle(function, *args):
  """A pickle that calls any function."""

  class Call:

    def __reduce__(self):
      return function, args

  return Call()


@pytest.mark.parametrize('protocol', [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize('function, args, name', [
    (os.system, ('touch {}',), 'posix.system'),
    (os.popen, ('touch {}',), 'os.popen'),
    (eval, ('open("{}", "w")',), 'eval'),
    (exec, ('open("{}", "w")',), 'exec'),
    (open, ('{}', 'w'), 'open'),
    (__import__, ('antigravity',), '__import__'),
    (getattr, ('', 'join'), 'getattr'),
], ids=lambda value: value if isinstance(value, str) else None)
def test_functions_of_the_system_are_refused_by_name(
    tmp_path, protocol, function, args, name):
  target = tmp_path / 'proof'
  args = [a.format(target) for a in args]
  content = pickle.dumps({'state_dict': [reduce_pickle(function, *args)]},
                         protocol)
  with pytest.raises(pickles.PickleError, match=rf'{name}\b.*Nothing was run'):
    read(content)
  assert not target.exists()


@pytest.mark.parametrize('text', [
    b'(S"touch proof"\nios\nsystem\n.',  # INST
    b'(cos\nsystem\nS"touch proof"\no.',  # OBJ
    b'cos\nsystem\nS"touch proof"\n\x85R.',  # GLOBAL, REDUCE
    b'\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x05touch\x85R.',  # STACK_GLOBAL
    b'\x80\x02cos\nsystem\n)\x81.',  # NEWOBJ
    b'\x80\x04cos\nsystem\n)}\x92.',  # NEWOBJ_EX
], ids=['inst', 'obj', 'reduce', 'stack_global', 'newobj', 'newobj_ex'])
def test_every_way_to_call_is_refused(text):
  pickletools.dis(text, io.StringIO())  # well formed
  with pytest.raises(pickles.PickleError, match=r'os\.system'):
    read(text)


def test_values_cannot_be_called():
  # A dict's method is no name; only names can be called, and none is.
  with pytest.raises(pickles.PickleError, match='a call of dict'):
    read(b'\x80\x02})R.')


@pytest.mark.parametrize('instruction', [b'\x82\x01', b'\x97'])
def test_other_instructions_are_refused(instruction):
  with pytest.raises(pickles.PickleError, match='EXT1|NEXT_BUFFER'):
    read(b'\x80\x05' + instruction + b'.')


def test_any_truncation_or_change_is_an_error_or_a_value():
  """No damage leads to anything but PickleError or plain data."""
  content = pickle.dumps(PLAIN, 2)
  for end in range(len(content)):
    with pytest.raises(pickles.PickleError):
      read(content[:end])
  for i in range(len(content)):
    for value in (0, 0x28, 0x52, 0x63, 0x81, 0xff):
      changed = bytes([*content[:i], value, *content[i + 1:]])
      try:
        read(changed)
      except pickles.PickleError:
        pass


def test_persistent_ids_and_calls():
  class Pickler(pickle.Pickler):

    def persistent_id(self, obj):
      return ('id', 7) if isinstance(obj, Custom) else None

  buffer = io.BytesIO()
  Pickler(buffer, 2).dump([Custom()])
  with pytest.raises(pickles.PickleError, match='outside'):
    read(buffer.getvalue())
  assert read(buffer.getvalue(), persistent=lambda pid: pid) == [('id', 7)]
  name = pickles.Global(harm.__module__, 'harm')
  assert read(pickle.dumps(Harm(), 2), calls={name: lambda x: x + 1}) == 2
  with pytest.raises(pickles.PickleError, match=r'harm.*positional'):
    read(pickle.dumps(Harm(), 2), calls={name: lambda: 0})
