"""Kinds of values that keys of foreign configurations take, with bounds.

A table {key: kind} says what each key that is used may be. Values are looked at
before any is computed with, so that whatever else stands there is refused by
its key and never ends in an error of Python's.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
import sys
from typing import Any


@dataclasses.dataclass(frozen=True)
class Kind:
  """Values of one kind.

  Attributes:
    what: that one of them is, for messages: 'a positive whole number'.
    has: whether a value, whatever a JSON or YAML file may hold, is one.
  """

  what: str
  has: Callable[[Any], bool]


def number(low: float = -math.inf, high: float = math.inf) -> Kind:
  """Finite numbers from low to high, both among them."""
  texts = [f'{word} {bound:g}' for word, bound in (('from', low), ('to', high))
           if math.isfinite(bound)]
  # Not math.isfinite, which whole numbers beyond floats make fail.
  return Kind(' '.join(['a number', *texts]), lambda value: (
      type(value) in (int, float) and abs(value) <= sys.float_info.max
      and low <= value <= high))


def or_none(kind: Kind) -> Kind:
  return Kind(f'{kind.what}, or null',
              lambda value: value is None or kind.has(value))


def listed(kind: Kind, least: int = 1) -> Kind:
  """Lists of `least` values or more, each of a kind."""
  some = f'{least} or more values' if least else 'values'
  return Kind(f'a list of {some}, each {kind.what}', lambda value: (
      isinstance(value, list | tuple) and len(value) >= least
      and all(map(kind.has, value))))


def by_level(kind: Kind) -> Kind:
  """One value for all levels, or a list of one for each."""
  lists = listed(kind)
  return Kind(f'{kind.what}, or a list of such',
              lambda value: kind.has(value) or lists.has(value))


def as_text(kind: Kind) -> Kind:
  """Numbers of a kind, also where YAML 1.1 has read text: 1e-4."""
  def has(value):
    try:
      return kind.has(float(value) if isinstance(value, str) else value)
    except ValueError:
      return False
  return Kind(kind.what, has)


# A bool is an int to isinstance.
WHOLE = Kind('a positive whole number',
             lambda value: type(value) is int and value > 0)
# CompVis writes -1 for what is not stated.
WHOLE_OR_NONE = Kind('a positive whole number, or -1 or null for none',
                     lambda value: value in (None, -1) or WHOLE.has(value))
ABOVE_ZERO = Kind('a number above 0',
                  lambda value: number().has(value) and value > 0)
FLAG = Kind('true or false', lambda value: isinstance(value, bool))
TEXT = Kind('text', lambda value: isinstance(value, str))
SECTION = Kind('a section of keys', lambda value: isinstance(value, Mapping))
SIDES = Kind('one number of pixels, or height and width', lambda value: (
    WHOLE.has(value) or listed(WHOLE).has(value) and len(value) == 2))
PROBABILITY = number(0, 1)
