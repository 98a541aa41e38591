"""Which metrics agree over the runs of a study: Spearman's rank correlation.

  python -m benchmarks.ranks runs/choices fd_digits

Takes the rows of the study's table.json that were compared with full precision,
of all seeds and groups together, and correlates the metric named with each of
the others.
"""

from collections.abc import Sequence
import json
import pathlib

from absl import app
from scipy import stats


def correlations(rows: Sequence[dict[str, float]], metric: str
                 ) -> dict[str, float]:
  """{other metric: rank correlation with `metric` over the rows}."""
  others = [name for name in rows[0] if name != metric
            and len({row.get(name) for row in rows}) > 1]
  values = [row[metric] for row in rows]
  return {name: float(stats.spearmanr(
      values, [row[name] for row in rows]).statistic) for name in others}


def load_rows(path: pathlib.Path) -> list[dict[str, float]]:
  """The metrics of every run in a table.json (see `study.collect`)."""
  found = json.loads(path.read_text())
  return [dict(zip(values, run, strict=True))
          for group in found.values() for values in group.values()
          for run in zip(*values.values(), strict=True)]


def main(argv: Sequence[str]) -> None:
  if len(argv) != 3:
    raise app.UsageError('expected a folder and a metric')
  _, root, metric = argv
  rows = [row for row in load_rows(pathlib.Path(root) / 'table.json')
          if 'psnr_to_fp' in row]
  known = sorted(set.intersection(*map(set, rows))) if rows else []
  if metric not in known:
    raise app.UsageError(
        f'{len(rows)} rows in {root} have {known}, not {metric!r}')
  print(f'{len(rows)} runs; rank correlation with {metric}:')
  for name, value in correlations(rows, metric).items():
    print(f'  {name:20} {value:+.2f}')


if __name__ == '__main__':
  app.run(main)
