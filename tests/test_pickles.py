"""Pickles are read as data; nothing in them runs."""

import collections
import datetime
import io
import os
import pickle
import pickletools
import random

import pytest

from msfp_jax.base import pickles


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
  """An object with state, whose module is not a library's."""

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
  """An object whose pickle calls a function of this module."""

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
  """Makes a pickle that calls any function."""

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


# A tuple of 2**40 leaves in 80 bytes: whoever prints or hashes it never ends.
ENDLESS = b'N\x85' + b'2\x86' * 40


@pytest.mark.parametrize('content, message', [
    (b'\x80\x04' + ENDLESS + b')}K\x01K\x02s\x92.', 'a call of tuple'),
    (b'\x80\x04' + ENDLESS + b')}\x92.', 'a call of tuple'),
    (b'\x80\x02}' + ENDLESS + b'Ns.', '<tuple>.* as the key of a dict'),
    (b'\x80\x02(' + ENDLESS + b'Nd.', '<tuple>.* as the key of a dict'),
    (b'\x80\x02}(' + ENDLESS + b'Nu.', '<tuple>.* as the key of a dict'),
    (b'\x80\x02c__builtin__\ndict\n]' + ENDLESS + b'N\x86a\x85R.',
     '<tuple>.* as the key of a dict'),
    (b'\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00a' + ENDLESS + b'\x86R.',
     'encoding .*<tuple>'),
    (b'\x80\x02c__builtin__\nlist\n' + b'I7\nR.', 'list called with 7'),
], ids=['newobj_ex', 'newobj_ex_plain', 'setitem', 'dict', 'setitems',
        'call_of_dict', 'encoding', 'arguments'])
def test_shared_structures_are_neither_printed_nor_hashed(content, message):
  pickletools.dis(content, io.StringIO())  # well formed
  with pytest.raises(pickles.PickleError, match=message):
    read(content)


@pytest.mark.parametrize('key', [
    ((1,),), 'x' * 20_000, b'x' * 20_000, 2**100, tuple(range(100))],
    ids=lambda key: type(key).__name__)
def test_keys_that_are_slow_to_hash_or_compare_are_refused(key):
  with pytest.raises(pickles.PickleError, match='the key of a dict'):
    read(pickle.dumps({key: 1}))


def test_keys_of_every_plain_kind():
  content = {'a': 0, 1: 1, 2.5: 2, False: 3, None: 4, b'b': 5,
             ('a', 1, None, b'c', 2.5): 6, (): 7, 2**63: 8, 'x' * 9_000: 9}
  assert read(pickle.dumps(content)) == content


def test_names_are_short():
  with pytest.raises(pickles.PickleError, match='name of 100003 characters'):
    read(b'\x80\x02cabc\n' + b'x' * 100_000 + b'\n.')


@pytest.mark.parametrize('protocol', [0, 1, 2, 4])
def test_large_files_of_the_ordinary_kind(protocol):
  content = {
      'bytes': bytes(range(256)) * 20_000,  # one call of encode
      'set': set(range(300_000)),
      'small': [collections.OrderedDict(step=i, data=bytes([i % 256]))
                for i in range(20_000)],
      'wide': collections.OrderedDict((f'p{i}', (i,)) for i in range(50_000)),
  }
  loaded = read(pickle.dumps(content, protocol))
  assert loaded == content | {'set': list(content['set'])}


def test_errors_of_the_caller_pass_unchanged():
  class CallersError(pickles.PickleError):
    pass

  def fail(pid):
    raise CallersError('truncated: x')

  with pytest.raises(CallersError, match='^truncated: x$'):
    read(b'\x80\x02NQ.', persistent=fail)


@pytest.mark.parametrize('content', [
    b'I' + b'9' * 1_000_000 + b'\n.', b'L' + b'9' * 1_000_000 + b'L\n.',
    b'Np' + b'9' * 1_000_000 + b'\n.', b'g' + b'9' * 1_000_000 + b'\n.',
    b'I' + b'9' * 1_000_000, b"S'" + b'x' * 1_000_000 + b'\n.',
    b'\x8d' + b'\xff' * 8 + b'x.', b'\x8e' + b'\xff' * 7 + b'\x0fx.',
    b'T\xff\xff\xff\x7fx.', b'\x8b\xff\xff\xff\x7fx.', b'jxxxx.', b'NI1'],
    ids=lambda content: repr(content[:3]))
def test_huge_arguments_are_short_errors(content):
  with pytest.raises(pickles.PickleError) as error:
    read(content)
  assert len(str(error.value)) < 500


def test_huge_indices_of_the_memo_take_no_memory():
  assert read(b'I5\np' + b'9' * 4_000 + b'\n0g' + b'9' * 4_000 + b'\n.') == 5
  assert read(b'\x80\x02K\x05r\xff\xff\xff\xff0j\xff\xff\xff\xff.') == 5
  assert read(b'F' + b'9' * 100_000 + b'\n.') == float('inf')


def test_a_backslash_that_escapes_nothing():
  """Without a warning, which would name no file."""
  assert read(b"S'a\\qb'\n.") == 'a\\qb'


def test_garbage_is_an_error_or_a_value():
  rng = random.Random(0)
  codes = [op.code.encode('latin1') for op in pickletools.opcodes]
  values = 0
  for _ in range(5_000):
    try:
      read(b''.join(rng.choice(codes) + rng.randbytes(rng.randrange(3))
                    for _ in range(rng.randrange(30))) + b'.')
      values += 1
    except pickles.PickleError:
      pass
  assert 0 < values < 5_000  # both were met
