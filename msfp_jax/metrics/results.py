"""The rows of results.json as a table of text, wherever one is shown."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from msfp_jax.metrics import registry

_UNKNOWN = registry.Column(meaning='')


@dataclasses.dataclass(frozen=True)
class Table:
  """The columns and cells of some results.

  Attributes:
    columns: {name: what it is}, in the order of the rows' fields; the rows'
      names are no column.
    names: of the rows.
    cells: {column: text} of every row; '' where nothing was computed.
  """

  columns: dict[str, registry.Column]
  names: list[str]
  cells: list[dict[str, str]]


def numbers(row: Mapping[str, Any]) -> dict[str, Any]:
  """What a row has of the whole model: no name, nothing by layer."""
  return {key: value for key, value in row.items()
          if key != 'name' and not isinstance(value, Mapping)}


def table(results: Mapping[str, Any]) -> Table:
  """Reads the content of results.json.

  Args:
    results: 'rows', each with a 'name', and the provenance of the features.
      A field of a row that is no column of `registry.columns` is shown
      without an explanation.
  """
  known = registry.columns(results)
  rows = results['rows']
  # In the order of first appearance: rows may have different metrics.
  names = dict.fromkeys(key for row in rows for key in numbers(row))
  columns = {name: known.get(name, _UNKNOWN) for name in names}
  return Table(
      columns, [row['name'] for row in rows],
      [{name: column.format(row[name]) if name in row else ''
        for name, column in columns.items()} for row in rows])
