"""Checks of what callers from Python pass."""

from typing import Any


def check_type(name: str, value: Any, kind: type | tuple[type, ...], way: str
               ) -> None:
  """Raises TypeError unless an argument is of a kind.

  Args:
    name: of the argument.
    value: what was passed.
    kind: what it must be.
    way: what makes such a value, for the message.
  """
  if not isinstance(value, kind):
    raise TypeError(f'{name} is {describe(value)}: it must be what {way} '
                    'returns')


def describe(value: Any) -> str:
  """A value as a message names it: None, 'ddim', a list."""
  if value is None or isinstance(value, str | int | float):
    return repr(value)
  return f'a {type(value).__name__}'
