"""Checks of what callers from Python pass, and of fields of a config."""

from collections.abc import Callable, Iterable, Mapping
import math
from typing import Any

import numpy as np


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


def _whole(value: Any, least: float = -math.inf) -> bool:
  return (isinstance(value, int | np.integer) and not isinstance(value, bool)
          and value >= least)


def _number(value: Any) -> bool:
  return (isinstance(value, int | float | np.integer | np.floating)
          and not isinstance(value, bool) and math.isfinite(value))


# What a field may be: its check, and the words for it.
WHOLE = (_whole, 'a whole number')
COUNT = (lambda value: _whole(value, 1), 'a whole number, at least 1')
COUNT_OR_NONE = (lambda value: _whole(value, 0), 'a whole number, at least 0')
NUMBER = (_number, 'a number')
RATE = (lambda value: _number(value) and value >= 0, 'a number of 0 or more')
FLAG = (lambda value: isinstance(value, bool), 'True or False')
# jax.random.key takes others too, and folds them into these without a word.
SEED = (lambda value: _whole(value, 0) and value < 2**32,
        'a whole number from 0 to 2**32 - 1')
POSITIVE = (lambda value: _number(value) and value > 0, 'a number above 0')
SHARE = (lambda value: _number(value) and 0 <= value < 1,
         'a number from 0 to below 1')


def one_of(names: Iterable[str]) -> tuple[Callable[[Any], bool], str]:
  """A rule like the above: one of these."""
  names = tuple(names)
  return lambda value: value in names, f'one of {sorted(names)}'


def check_options(options: Mapping[str, Any],
                  rules: Mapping[str, tuple[Callable[[Any], bool], str]],
                  where: str = '') -> None:
  """Raises ValueError for the options that break their rules.

  Args:
    options: {name: value}; those without a rule are not looked at.
    rules: {name: (whether a value is allowed, what it must be)}.
    where: the options belong to, such as 'config.'.
  """
  # All of them: who runs for hours wants to be told once.
  wrong = [f'{where}{name}={options[name]!r}: must be {words}'
           for name, (allowed, words) in rules.items()
           if name in options and not allowed(options[name])]
  if wrong:
    raise ValueError('; '.join(wrong))


def or_none(rule: tuple[Callable[[Any], bool], str]
            ) -> tuple[Callable[[Any], bool], str]:
  """A rule that None keeps too."""
  allowed, words = rule
  return lambda value: value is None or allowed(value), f'{words}, or None'


def check_fields(where: str, settings: Any,
                 rules: Mapping[str, tuple[Callable[[Any], bool], str]]
                 ) -> None:
  """Raises ValueError for the fields of `settings` that break their rules.

  Args:
    where: the fields belong to, such as 'config.finetune'.
    settings: has them as attributes.
    rules: {field: (whether a value is allowed, what it must be)}.
  """
  check_options({name: getattr(settings, name) for name in rules}, rules,
                f'{where}.')
