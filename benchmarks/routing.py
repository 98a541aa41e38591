"""Summarizes what the routers of runs have learnt.

  python -m benchmarks.routing runs/choices

Reads every router.json below the folder (the bank of each layer at each step)
and prints a line for each run.
"""

from collections.abc import Sequence
import json
import pathlib
from typing import Any

from absl import app
import numpy as np


def summarize(router: dict[str, Any]) -> dict[str, Any]:
  """Summarizes one router.json.

  Returns:
    'layers' with banks; 'one_bank': how many of them have one bank at all
    steps; 'changes' of bank along the steps, the mean over the others;
    'noisy_half' and 'other_half': the share of every bank over layers and
    steps, with t in the upper and in the lower half of the timesteps.
  """
  t = np.array(router['timesteps'])
  banks = np.array(list(router['banks'].values()))  # [layers, steps]
  changes = np.count_nonzero(np.diff(banks, axis=1), axis=1)
  shares = lambda part: [
      float(np.mean(part == i)) for i in range(banks.max() + 1)]
  noisy = t >= (t.max() + t.min()) / 2
  moving = changes[changes > 0]
  return {'layers': len(banks), 'one_bank': int(np.sum(changes == 0)),
          'changes': float(moving.mean()) if len(moving) else 0.0,
          'noisy_half': shares(banks[:, noisy]),
          'other_half': shares(banks[:, ~noisy])}


def main(argv: Sequence[str]) -> None:
  if len(argv) != 2:
    raise app.UsageError('expected one folder')
  root = pathlib.Path(argv[1])
  print('| run | layers | one bank | changes | noisy half | other half |',
        '|---|---|---|---|---|---|', sep='\n')
  join = lambda shares: ' '.join(f'{share:.2f}' for share in shares)
  for path in sorted(root.rglob('router.json')):
    found = summarize(json.loads(path.read_text()))
    print(f'| {path.parent.relative_to(root)} | {found["layers"]} | '
          f'{found["one_bank"]} | {found["changes"]:.1f} | '
          f'{join(found["noisy_half"])} | {join(found["other_half"])} |')


if __name__ == '__main__':
  app.run(main)
