"""The section with the rows of results.json as a table, and their sizes."""

from collections.abc import Mapping
from typing import Any

from msfp_jax.metrics import registry
from msfp_jax.metrics import results as results_lib
from msfp_jax.quant.quantizers import FULL_BITS
from msfp_jax.report.section import Section
from msfp_jax.report.section import Source

# Beside a column's name: which way is better.
_ARROWS = {registry.HIGH: '↑', registry.LOW: '↓', '': ''}


def section(source: Source) -> Section:
  results = source.results
  table = results_lib.table(results)
  winners = {name: best(results['rows'], name, column)
             for name, column in table.columns.items()}
  rows = [
      {'name': row['name'], 'cells': [
          {'text': text, 'best': row.get(name) is not None
           and row.get(name) == winners[name]}
          for name, text in cells.items()]}
      for row, cells in zip(results['rows'], table.cells, strict=True)]
  return Section('results', 'Results', 'Results', 'results.html', {
      'columns': [
          {'name': name, 'arrow': _ARROWS[column.better],
           'verdict': column.verdict, 'meaning': explained(column)}
          for name, column in table.columns.items()],
      'rows': rows, 'sizes': sizes(results['rows']),
      'num_samples': results['num_samples'],
      'marked': any(value is not None for value in winners.values())})


def explained(column: registry.Column) -> str:
  """Says what a column means and which way is better; '' if nobody knows."""
  return '; '.join(filter(None, (column.meaning, column.verdict)))


def best(rows: list[Mapping[str, Any]], name: str, column: registry.Column
         ) -> float | None:
  """The best value of quantized rows; None where there is no contest."""
  # Full precision would win nearly everything: it is what the others are
  # measured by, and takes no part.
  values = [row[name] for row in rows if name in row and _quantized(row)]
  return column.best(values) if len(values) > 1 else None


def _quantized(row: Mapping[str, Any]) -> bool:
  return min(row['weight_bits'], row['act_bits']) < FULL_BITS


def sizes(rows: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """The bytes of each row, as text and as a share of the largest."""
  # Bars are drawn relative to the longest, whichever row that is.
  largest = max(row['bytes'] for row in rows)
  full = next((row['bytes'] for row in rows if not _quantized(row)), None)
  return [{'name': row['name'], 'bytes': f'{row["bytes"]:,}',
           'percent': f'{100 * row["bytes"] / largest:.2f}',
           'ratio': '' if full is None else
           f'{full / row["bytes"]:.2f} times smaller' if full > row['bytes']
           else 'full precision' if full == row['bytes'] else
           f'{row["bytes"] / full:.2f} times larger'}
          for row in rows]
