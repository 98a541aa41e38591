"""Which cases of a test are quick, and which slow."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(few: Collection[Any], cases: Iterable[Any]) -> list[Any]:
  """The cases of `parametrize`, of which all but a few are slow tests."""
  return [case if case in few else pytest.param(case, marks=pytest.mark.slow)
          for case in cases]


def slow(few: Collection[Any], cases: Iterable[Any]) -> list[Any]:
  """The cases of `parametrize`: a few are slow tests, and the others long."""
  return [pytest.param(case, marks=pytest.mark.slow if case in few
                       else pytest.mark.long) for case in cases]
