"""The figures that benchmarks compute from the files of runs."""

import pytest

from benchmarks import ranks
from benchmarks import routing


def test_routing_by_hand():
  found = routing.summarize({
      'timesteps': [750, 500, 250, 0],
      'banks': {'a': [1, 1, 0, 0], 'b': [1, 1, 1, 1], 'c': [0, 1, 0, 1]}})
  assert found == {
      'layers': 3, 'one_bank': 1, 'changes': 2.0,
      'noisy_half': pytest.approx([1 / 6, 5 / 6]),
      'other_half': pytest.approx([3 / 6, 3 / 6])}


def test_ranks_by_hand():
  rows = [{'fd': 1.0, 'psnr': 9.0, 'same': 3}, {'fd': 2.0, 'psnr': 7.0,
          'same': 3}, {'fd': 3.0, 'psnr': 8.0, 'same': 3}]
  assert ranks.correlations(rows, 'fd') == {'psnr': pytest.approx(-0.5)}
