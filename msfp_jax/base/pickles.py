"""Pickles read as data: nothing is imported and nothing is called.

A pickle is a program whose instructions may name any function of any module
and call it. This reader runs the instructions that build plain containers;
a name stays a `Global`, and what calling it would have made is an `Opaque`,
unless the caller supplies a function for exactly that name. So a checkpoint
whose pickle names classes of a training framework opens without it.
"""

from collections.abc import Callable, Mapping
import pickletools
from typing import Any, BinaryIO
import warnings

from msfp_jax.base.pickle_names import BUILTINS
from msfp_jax.base.pickle_names import check_global
from msfp_jax.base.pickle_names import check_key
from msfp_jax.base.pickle_names import first_words
from msfp_jax.base.pickle_names import Global
from msfp_jax.base.pickle_names import Opaque
from msfp_jax.base.pickle_names import PickleError
from msfp_jax.base.pickle_names import shown


class Buildable:
  """Base of objects that a pickle fills in after it has made them (BUILD)."""

  def build(self, state: Any) -> None:
    """Takes the state that the pickle would pass to `__setstate__`."""
    raise NotImplementedError


class _Mark:
  """Marks on the stack where the items of a container or a call begin."""


_MARK = _Mark()


def _latin1(text: str, encoding: str) -> bytes:
  """Bytes as protocols before 3 spell them: a call of `_codecs.encode`."""
  if encoding not in ('latin1', 'latin-1'):
    raise PickleError(f'damaged: encoding {shown(encoding)}')
  return text.encode('latin1')


def _dict(items: Any = ()) -> dict[Any, Any]:
  if isinstance(items, dict):
    return dict(items)
  return {check_key(key): value for key, value in items}


# Calls that make plain containers, in every spelling. Sets become lists, as
# their entries would have to be hashed (see `pickle_names`).
_CONTAINERS: dict[Global, Callable[..., Any]] = {
    Global('_codecs', 'encode'): _latin1,
    Global('collections', 'OrderedDict'): _dict,
    Global('collections', 'defaultdict'):
        lambda factory=None, items=(): _dict(items),
    **{Global(module, name): make for module in BUILTINS for name, make in {
        'bytes': lambda items=(): bytes(list(items)),
        'dict': _dict,
        'frozenset': lambda items=(): list(items),
        'list': lambda items=(): list(items),
        'set': lambda items=(): list(items)}.items()},
}

# How many values calls may copy: what a file holds, it holds about once.
# Without a bound, n instructions could double a list n times.
_COPIES_PER_BYTE = 4
_COPIES_OF_ANY = 1_000_000


def _opaque(name: Global) -> Opaque:
  return Opaque(str(name))


def read_pickle(file: BinaryIO, calls: Mapping[Global, Callable[..., Any]] = {},
                persistent: Callable[[Any], Any] | None = None,
                other: Callable[[Global], Any] = _opaque) -> Any:
  """Reads one pickle and leaves the file behind its end.

  Args:
    file: binary, at the start of a pickle.
    calls: for names whose calls are understood, what to call instead.
    persistent: resolves persistent ids; without it they are refused.
    other: what stands for the result of a call of any other name.

  Returns:
    Numbers, strings, bytes, None, lists (also for sets), tuples, dicts, what
    `calls`, `persistent` and `other` returned, `Global` and `Opaque`.

  Raises:
    PickleError: not a pickle, a truncated one, or one with names that have no
      place in a checkpoint.
  """
  machine = _Machine({**_CONTAINERS, **calls}, persistent, other)
  try:
    start = file.tell()
    with warnings.catch_warnings():
      # Of a backslash in a text of protocol 0 that escapes nothing.
      warnings.filterwarnings('ignore', 'invalid escape', DeprecationWarning)
      # genops decodes one instruction after the other and executes nothing.
      for opcode, argument, position in pickletools.genops(file):
        machine.consumed = position - start
        machine.step(opcode.name, argument)
  except PickleError:
    raise
  except (ValueError, TypeError, KeyError, IndexError, AttributeError,
          OverflowError, RecursionError, UnicodeError, MemoryError) as error:
    raise PickleError('not a pickle, or a damaged one: '
                      f'{type(error).__name__}: {first_words(error)}'
                      ) from error
  return machine.result


class _Machine:
  """Executes a pickle's instructions on a stack, by a method for each kind."""

  # The pickle of {'a': [1]}, and the stack (its top to the right) behind each:
  #
  #   EMPTY_DICT             {}
  #   MARK                   {} mark
  #   BINUNICODE 'a'         {} mark 'a'
  #   EMPTY_LIST             {} mark 'a' []
  #   BININT1 1              {} mark 'a' [] 1
  #   APPEND                 {} mark 'a' [1]
  #   SETITEMS               {'a': [1]}
  #   STOP
  #
  # The memo holds what PUT took from the stack's top, for GET to push again:
  # the same object, so that containers may share parts, and contain themselves.

  def __init__(self, calls, persistent, other):
    self.stack = []
    self.memo = {}
    self.calls = calls
    self.persistent = persistent
    self.other = other
    self.result = None
    self.consumed = 0  # bytes of the pickle
    self.copied = 0  # values, by calls

  def step(self, name: str, argument: Any) -> None:
    """Executes one instruction, by its name in `pickletools`."""
    if name in _NOTHING:
      return
    if name in _PUSH_ARGUMENT:
      self.stack.append(argument)
    elif name in _CONSTANTS:
      self.stack.append(_CONSTANTS[name]())
    elif name in _GET:
      self.stack.append(self.memo[int(argument)])
    elif name in _PUT:
      self.memo[int(argument)] = self.stack[-1]
    elif name == 'MEMOIZE':
      self.memo[len(self.memo)] = self.stack[-1]  # under the next free number
    elif hasattr(self, f'op_{name}'):
      getattr(self, f'op_{name}')(argument)
    else:
      raise PickleError(f'instruction {name} has no place in a checkpoint')

  def pop(self) -> Any:
    value = self.stack.pop()
    if value is _MARK:
      raise PickleError('damaged: a mark where a value should be')
    return value

  def pop_to_mark(self) -> list[Any]:
    for i in reversed(range(len(self.stack))):
      if self.stack[i] is _MARK:
        values = self.stack[i + 1:]
        del self.stack[i:]
        return values
    raise PickleError('damaged: no mark on the stack')

  def call(self, function: Any, args: Any, kwargs: Any = None) -> Any:
    """Returns what REDUCE and its like push: the result of a known call."""
    if not isinstance(function, Global):
      raise PickleError(f'damaged: a call of {type(function).__name__}')
    # Arguments of a call that is not understood are dropped unseen.
    if kwargs or function not in self.calls:
      return self.other(function)
    if not isinstance(args, tuple | list):
      raise PickleError(f'damaged: {function} called with {shown(args)}')
    self.charge(args)
    try:
      return self.calls[function](*args)
    except TypeError as error:
      raise PickleError(f'{function}: {first_words(error)}') from error

  def charge(self, args):
    """Counts the values that calls copy; stops where they are too many."""
    self.copied += len(args) + sum(
        len(arg) for arg in args
        if isinstance(arg, str | bytes | bytearray | list | tuple | dict))
    if self.copied > _COPIES_PER_BYTE * self.consumed + _COPIES_OF_ANY:
      raise PickleError(f'damaged: its first {self.consumed} bytes copy '
                        f'{self.copied} values')

  # Instructions, in the order of pickle's documentation.

  def op_MARK(self, _):
    self.stack.append(_MARK)

  def op_STOP(self, _):
    self.result = self.pop()

  def op_POP(self, _):
    self.stack.pop()

  def op_POP_MARK(self, _):
    self.pop_to_mark()

  def op_DUP(self, _):
    self.stack.append(self.stack[-1])

  def op_PERSID(self, argument):
    self.stack.append(self.resolve(argument))

  def op_BINPERSID(self, _):
    self.stack.append(self.resolve(self.pop()))

  def resolve(self, pid):
    if self.persistent is None:
      raise PickleError('a reference to data outside of the pickle')
    return self.persistent(pid)

  def op_APPEND(self, _):
    self.extend([self.pop()])

  def op_APPENDS(self, _):
    self.extend(self.pop_to_mark())

  op_ADDITEMS = op_APPENDS

  def extend(self, values):
    if isinstance(self.stack[-1], list):
      self.stack[-1].extend(values)
    # What a foreign class makes of its items is not known, nor needed.
    elif not isinstance(self.stack[-1], Opaque):
      raise PickleError('damaged: items for what is no list')

  def op_LIST(self, _):
    self.stack.append(self.pop_to_mark())

  op_FROZENSET = op_LIST

  def op_TUPLE(self, _):
    self.stack.append(tuple(self.pop_to_mark()))

  def op_TUPLE1(self, _):
    self.stack.append((self.pop(),))

  def op_TUPLE2(self, _):
    second, first = self.pop(), self.pop()
    self.stack.append((first, second))

  def op_TUPLE3(self, _):
    third, second, first = self.pop(), self.pop(), self.pop()
    self.stack.append((first, second, third))

  def op_DICT(self, _):
    items = self.pop_to_mark()
    self.stack.append({})
    self.set_items(items)

  def op_SETITEM(self, _):
    value, key = self.pop(), self.pop()
    self.set_items([key, value])

  def op_SETITEMS(self, _):
    self.set_items(self.pop_to_mark())

  def set_items(self, items):
    if isinstance(self.stack[-1], dict):
      keys = map(check_key, items[::2])
      self.stack[-1].update(zip(keys, items[1::2], strict=True))
    elif not isinstance(self.stack[-1], Opaque):
      raise PickleError('damaged: items for what is no dict')

  def op_GLOBAL(self, argument):
    module, name = argument.split(' ', 1)
    self.stack.append(check_global(Global(module, name)))

  def op_STACK_GLOBAL(self, _):
    # Protocol 4: strings on the stack, which may be any other value as well.
    name, module = self.pop(), self.pop()
    if not isinstance(name, str) or not isinstance(module, str):
      raise PickleError('damaged: a name that is no string')
    self.stack.append(check_global(Global(module, name)))

  def op_REDUCE(self, _):
    args, function = self.pop(), self.pop()
    self.stack.append(self.call(function, args))

  op_NEWOBJ = op_REDUCE  # cls.__new__(cls, *args): here, a call of the name

  def op_NEWOBJ_EX(self, _):
    kwargs, args, function = self.pop(), self.pop(), self.pop()
    self.stack.append(self.call(function, args, kwargs))

  def op_INST(self, argument):
    # Protocol 0: the name is the instruction's own, its arguments the stack's.
    args = self.pop_to_mark()
    self.op_GLOBAL(argument)
    self.stack.append(self.call(self.pop(), args))

  def op_OBJ(self, _):
    function, *args = self.pop_to_mark()
    self.stack.append(self.call(function, args))

  def op_BUILD(self, _):
    # The state of any other object is dropped: an Opaque has none.
    state = self.pop()
    if isinstance(self.stack[-1], Buildable):
      self.stack[-1].build(state)


_NOTHING = frozenset({'PROTO', 'FRAME'})
_PUSH_ARGUMENT = frozenset({
    'INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT',
    'BINFLOAT', 'STRING', 'BINSTRING', 'SHORT_BINSTRING', 'BINBYTES',
    'SHORT_BINBYTES', 'BINBYTES8', 'BYTEARRAY8', 'UNICODE', 'BINUNICODE',
    'SHORT_BINUNICODE', 'BINUNICODE8'})
_CONSTANTS = {'NONE': lambda: None, 'NEWTRUE': lambda: True,
              'NEWFALSE': lambda: False, 'EMPTY_LIST': list,
              'EMPTY_TUPLE': tuple, 'EMPTY_DICT': dict, 'EMPTY_SET': list}
_GET = frozenset({'GET', 'BINGET', 'LONG_BINGET'})
_PUT = frozenset({'PUT', 'BINPUT', 'LONG_BINPUT'})
