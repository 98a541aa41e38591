"""The section with the rows of results.json as a table, and their sizes."""

import dataclasses
import re
from typing import Any

from msfp_jax.quant.quantizers import FULL_BITS
from msfp_jax.report import numbers
from msfp_jax.report.section import Section
from msfp_jax.report.section import Source


@dataclasses.dataclass(frozen=True)
class Column:
  """The heading, meaning and format of a column of the results.

  Attributes:
    pattern: of its whole name.
    meaning: for its title and the legend.
    better: min or max, of the values of quantized models; None for columns
      without a winner.
  """

  pattern: str
  meaning: str
  better: Any = None


# In the order in which patterns are tried: '.*_to_fp' must come before 'fid'.
COLUMNS = (
    Column('weight_bits', 'bits of the weights, but for the exceptions'),
    Column('act_bits', 'bits of the layers\' inputs, but for the exceptions'),
    Column('psnr_to_fp', 'dB, image by image to those that full precision '
           'makes from the same noise; high is good', max),
    Column('ssim_to_fp', 'structural similarity to the same images, 1 where '
           'equal; high is good', max),
    Column('.*_to_fp', 'the same distance, to the full-precision model\'s '
           'images; low is good', min),
    Column('is(_.*)?_std', 'standard deviation over the splits'),
    Column('(kid|kd)(_.*)?_std', 'standard deviation over the subsets'),
    Column('is(_.*)?', 'inception score; high is good', max),
    Column('(kid|kd)(_.*)?', 'kernel distance to the data; low is good', min),
    Column('sfid(_.*)?|fd_spatial_.*', 'Fréchet distance to the data on '
           'features that know places; low is good', min),
    Column('fid(_.*)?', 'Fréchet distance to the data on Inception\'s '
           'features; low is good', min),
    Column('fd_.*', 'Fréchet distance to the data on the named features; '
           'comparable only on the same features at an equal number of '
           'images; low is good', min),
    Column('precision(_.*)?', 'share of the images that lie among the '
           'data\'s; high is good', max),
    Column('recall(_.*)?', 'share of the data that lie among the images; high '
           'is good', max),
    Column('label_agreement', 'share of images in which the classifier sees '
           'the same as in the full-precision model\'s; high is good', max),
    Column('confidence', 'how sure the classifier is, 0 to 1'),
    Column('class_balance', 'how evenly the classes appear; 1 is even'),
    Column('bytes', 'size with weights packed at their bits, all banks, scales '
           'and zero points counted', min),
)
_UNKNOWN = Column('', '')


def column_of(name: str) -> Column:
  """Finds the first of COLUMNS that describes a field; else an empty one."""
  return next((column for column in COLUMNS
               if re.fullmatch(column.pattern, name)), _UNKNOWN)


def best(rows: list[dict[str, Any]], name: str) -> float | None:
  """The best value of quantized rows; None where there is no contest."""
  better = column_of(name).better
  values = [row[name] for row in rows if name in row and _quantized(row)]
  return better(values) if better and len(values) > 1 else None


def _quantized(row: dict[str, Any]) -> bool:
  return min(row['weight_bits'], row['act_bits']) < FULL_BITS


def section(source: Source) -> Section:
  rows = source.results['rows']
  # Of all rows, in the order of their first appearance: a metric that a row
  # does not have leaves its cell empty.
  names = list(dict.fromkeys(key for row in rows for key in row))
  names.remove('name')
  winners = {name: best(rows, name) for name in names}
  table = [{'name': row['name'],
            'cells': [_cell(row.get(name), winners[name]) for name in names]}
           for row in rows]
  return Section('results', 'Results', 'Results', 'results.html', {
      'names': names, 'rows': table, 'sizes': sizes(rows),
      'meanings': [(name, column_of(name).meaning) for name in names
                   if column_of(name).meaning],
      'num_samples': source.results['num_samples'],
      'marked': any(value is not None for value in winners.values())})


def _cell(value: Any, winner: float | None) -> dict[str, Any]:
  text = ''
  if isinstance(value, int):
    text = f'{value:,}'
  elif value is not None:
    text = numbers.significant(value, 4)
  return {'text': text, 'best': value is not None and value == winner}


def sizes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The bytes of each row, as text and as a share of the largest."""
  largest = max(row['bytes'] for row in rows)
  full = next((row['bytes'] for row in rows if not _quantized(row)), None)
  return [{'name': row['name'], 'bytes': f'{row["bytes"]:,}',
           'percent': f'{100 * row["bytes"] / largest:.2f}',
           'ratio': '' if full is None else
           f'{full / row["bytes"]:.2f} times smaller' if full > row['bytes']
           else 'full precision' if full == row['bytes'] else
           f'{row["bytes"] / full:.2f} times larger'}
          for row in rows]
