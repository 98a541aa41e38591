"""Tables of text, in Markdown."""

from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]],
          aligned: bool = True) -> str:
  """A Markdown table.

  Args:
    heads: of the columns.
    rows: cells, as many in each row.
    aligned: whether columns are filled with spaces, for a terminal; without,
      a long cell makes one long line and not as many as there are rows.
  """
  lines = [list(heads), *map(list, rows)]
  widths = [max(map(len, column)) if aligned else 1
            for column in zip(*lines, strict=True)]
  join = lambda cells: '| ' + ' | '.join(
      cell.ljust(width if aligned else 0) for cell, width in zip(
          cells, widths, strict=True)) + ' |'
  rule = '|' + '|'.join('-' * (width + 2) for width in widths) + '|'
  return '\n'.join([join(lines[0]), rule, *map(join, lines[1:])])
