"""A plugin of pytest: writes the outcome of each test as soon as it is known.

A test that ended its process leaves a line that says it began, and no other.
Tests with a line in the file that MSFP_GPU_KNOWN names are not run again.
"""

import json
import os
import pathlib

KNOWN, WRITTEN = 'MSFP_GPU_KNOWN', 'MSFP_GPU_OUTCOMES'


def read(path: pathlib.Path) -> dict[str, dict]:
  """{test: its last line}, of what a crash left too."""
  found = {}
  if path.is_file():
    for line in path.read_text(encoding='utf-8').splitlines():
      try:
        row = json.loads(line)
        found[row.pop('test')] = row
      except (ValueError, KeyError):
        continue  # half a line
  return found


def forget_unfinished(path: pathlib.Path, known: pathlib.Path) -> None:
  """Drops tests that have only begun, but for those that `known` has.

  For where time ended them, and not what they did: a later call runs them.
  """
  earlier = read(known)
  rows = [{'test': test} | row for test, row in read(path).items()
          if row['outcome'] != 'began' or test in earlier]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows),
                  encoding='utf-8')


def _write(**row) -> None:
  # Opened anew: every line is on the disk before the next test begins.
  with open(os.environ[WRITTEN], 'a', encoding='utf-8') as file:
    file.write(json.dumps(row) + '\n')


class Outcomes:
  """Of the process that hears of all tests."""

  def pytest_runtest_logstart(self, nodeid, location):
    del location
    _write(test=nodeid, outcome='began')

  def pytest_runtest_logreport(self, report):
    # Set-up and tear-down count where they go wrong or skip the test.
    if report.when == 'call' or report.outcome != 'passed':
      row = {'test': report.nodeid, 'outcome': report.outcome,
             'seconds': round(report.duration, 2)}
      if report.failed:
        row['error'] = str(report.longrepr).strip()[-400:]
      _write(**row)


def pytest_configure(config):
  if not hasattr(config, 'workerinput'):  # xdist's workers report to it
    config.pluginmanager.register(Outcomes())


def pytest_collection_modifyitems(config, items):
  known = read(pathlib.Path(os.environ[KNOWN]))
  dropped = [item for item in items if item.nodeid in known]
  config.hook.pytest_deselected(items=dropped)
  items[:] = [item for item in items if item.nodeid not in known]
