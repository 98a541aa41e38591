"""Tables that the reader of a report sorts and filters."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

# Of the column that a table is filtered by.
KIND = 'kind'


def table(id: str, label: str, unit: str, columns: Sequence[tuple[str, str]],
          rows: Iterable[Sequence[Any]], kinds: Sequence[str],
          show: Callable[[float], str]) -> dict[str, Any]:
  """What templates/sortable.html lays out.

  Args:
    id: of its HTML elements, before -table and -filter.
    label: for those who hear the page.
    unit: what its rows are, in the plural.
    columns: (heading, what it means) of each; KIND is among the headings.
    rows: the values by column; None where there is nothing.
    kinds: that there are, to choose from.
    show: a float -> text.
  """
  return {'id': id, 'label': label, 'unit': unit, 'columns': columns,
          'kinds': kinds, 'kind_column': [name for name, _ in columns].index(
              KIND),
          'rows': [[_cell(value, show) for value in row] for row in rows]}


def _cell(value: Any, show: Callable[[float], str]) -> dict[str, Any]:
  # 'value' is what the page's script sorts by: all digits, not those shown.
  if value is None:
    return {'text': '', 'value': '', 'number': False}
  text = show(value) if isinstance(value, float) else str(value)
  number = isinstance(value, int | float)
  return {'text': text, 'value': repr(value) if number else text,
          'number': number}
