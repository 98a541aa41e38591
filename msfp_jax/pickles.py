"""Pickles read as data: nothing is imported and nothing is called.

A pickle is a program whose instructions may name any function of any module
and call it. This reader runs the instructions that build plain containers;
a name stays a `Global`, and what calling it would have made is an `Opaque`,
unless the caller supplies a function for exactly that name. So a checkpoint
whose pickle names classes of a training framework opens without it.
"""

from collections.abc import Callable, Mapping
import dataclasses
import pickletools
import sys
from typing import Any, BinaryIO


class PickleError(ValueError):
  """The pickle is damaged, or asks for what no checkpoint needs."""


@dataclasses.dataclass(frozen=True)
class Global:
  """A name that the pickle mentions, e.g. torch.FloatStorage. Never looked up.
  """

  module: str
  name: str

  def __str__(self):
    return f'{self.module}.{self.name}'


class Buildable:
  """What a caller's function may return to be given its state afterwards."""

  def build(self, state: Any) -> None:
    """Takes what the pickle has for `__setstate__`."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class Opaque:
  """Stands for an object that the pickle wanted made by a call of `made_by`."""

  made_by: str


# Modules of the standard library that checkpoints name for plain values.
# Any other one is refused: there is no harm in it here, but in a checkpoint
# os.system and its like mean that someone wants them run elsewhere.
_HARMLESS_MODULES = frozenset({
    '_codecs', '_collections', 'argparse', 'collections', 'copyreg',
    'copy_reg', 'dataclasses', 'datetime', 'decimal', 'enum', 'fractions',
    'functools', 'pathlib', 'types', 'typing', 'uuid', 'zoneinfo'})
_HARMLESS_BUILTINS = frozenset({
    'bool', 'bytearray', 'bytes', 'complex', 'dict', 'float', 'frozenset',
    'int', 'list', 'object', 'range', 'set', 'slice', 'str', 'tuple', 'type'})
_BUILTINS = ('builtins', '__builtin__')
# Of other systems' standard libraries, or of Python 2's.
_FOREIGN_MODULES = frozenset({
    'nt', 'ntpath', 'posix', 'posixpath', 'commands', 'popen2', 'winreg',
    '_winreg', 'msvcrt', 'os2'})


def check_global(name: Global) -> Global:
  """Returns the name.

  Raises:
    PickleError: it is a function of the standard library that has no place
      in a checkpoint.
  """
  module = name.module.partition('.')[0]
  if module in _BUILTINS:
    refused = name.name not in _HARMLESS_BUILTINS
  else:
    known = module in sys.stdlib_module_names or module in _FOREIGN_MODULES
    refused = known and module not in _HARMLESS_MODULES
  if refused:
    raise PickleError(
        f'the pickle names {name}, which has no place in a checkpoint: loading '
        'it elsewhere may run code. Nothing was run here. Get the file from a '
        'source that you trust, best as .safetensors')
  return name


class _Mark:
  """The pickle machine's mark on its stack."""


_MARK = _Mark()

def _latin1(text: str, encoding: str) -> bytes:
  """How protocols before 3 spell bytes."""
  if encoding not in ('latin1', 'latin-1'):
    raise TypeError(f'encoding {encoding!r}')
  return text.encode('latin1')


# Calls that make plain containers, in every spelling.
_CONTAINERS: dict[Global, Callable[..., Any]] = {
    Global('_codecs', 'encode'): _latin1,
    Global('collections', 'OrderedDict'): lambda items=(): dict(items),
    Global('collections', 'defaultdict'):
        lambda factory=None, items=(): dict(items),
    **{Global(module, name): make for module in _BUILTINS for name, make in {
        'bytes': lambda items=(): bytes(list(items)),
        'dict': lambda items=(): dict(items),
        'frozenset': lambda items=(): list(items),
        'list': lambda items=(): list(items),
        'set': lambda items=(): list(items)}.items()},
}


def read_pickle(file: BinaryIO, calls: Mapping[Global, Callable[..., Any]] = {},
                persistent: Callable[[Any], Any] | None = None) -> Any:
  """Reads one pickle and leaves the file behind its end.

  Args:
    file: binary, at the start of a pickle.
    calls: for names whose calls are understood, what to call instead.
    persistent: resolves persistent ids; without it they are refused.

  Returns:
    Numbers, strings, bytes, None, lists (also for sets), tuples, dicts, what
    `calls` and `persistent` returned, `Global` and `Opaque`.

  Raises:
    PickleError: not a pickle, a truncated one, or one with names that have no
      place in a checkpoint.
  """
  machine = _Machine({**_CONTAINERS, **calls}, persistent)
  try:
    for opcode, argument, _ in pickletools.genops(file):
      machine.step(opcode.name, argument)
  except PickleError:
    raise
  except (ValueError, TypeError, KeyError, IndexError, AttributeError,
          OverflowError, RecursionError, UnicodeError, MemoryError) as error:
    raise PickleError(f'not a pickle, or a damaged one: {error!r}') from error
  return machine.result


class _Machine:
  """The stack, the memo, and a method for every kind of instruction."""

  def __init__(self, calls, persistent):
    self.stack = []
    self.memo = {}
    self.calls = calls
    self.persistent = persistent
    self.result = None

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
      self.memo[len(self.memo)] = self.stack[-1]
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

  def call(self, function: Any, args: Any) -> Any:
    """What REDUCE and its like push."""
    if not isinstance(function, Global):
      raise PickleError(f'damaged: a call of {type(function).__name__}')
    if function not in self.calls:
      return Opaque(str(function))
    try:
      return self.calls[function](*args)
    except TypeError as error:
      raise PickleError(f'{function}: {error}') from error

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
    self.stack.append(dict(zip(items[::2], items[1::2], strict=True)))

  def op_SETITEM(self, _):
    value, key = self.pop(), self.pop()
    self.set_items([key, value])

  def op_SETITEMS(self, _):
    self.set_items(self.pop_to_mark())

  def set_items(self, items):
    if isinstance(self.stack[-1], dict):
      self.stack[-1].update(zip(items[::2], items[1::2], strict=True))
    elif not isinstance(self.stack[-1], Opaque):
      raise PickleError('damaged: items for what is no dict')

  def op_GLOBAL(self, argument):
    module, name = argument.split(' ', 1)
    self.stack.append(check_global(Global(module, name)))

  def op_STACK_GLOBAL(self, _):
    name, module = self.pop(), self.pop()
    if not isinstance(name, str) or not isinstance(module, str):
      raise PickleError('damaged: a name that is no string')
    self.stack.append(check_global(Global(module, name)))

  def op_REDUCE(self, _):
    args, function = self.pop(), self.pop()
    self.stack.append(self.call(function, args))

  op_NEWOBJ = op_REDUCE

  def op_NEWOBJ_EX(self, _):
    kwargs, args, function = self.pop(), self.pop(), self.pop()
    self.stack.append(
        Opaque(str(function)) if kwargs else self.call(function, args))

  def op_INST(self, argument):
    args = self.pop_to_mark()
    self.op_GLOBAL(argument)
    self.stack.append(self.call(self.pop(), args))

  def op_OBJ(self, _):
    function, *args = self.pop_to_mark()
    self.stack.append(self.call(function, args))

  def op_BUILD(self, _):
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
