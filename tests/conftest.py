"""Which tests share a process, where they are spread over several."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """A file's tests stay together, as they share compilations.

  Those of the folder experiment/ share one training, and stay together too.
  """
  for item in items:
    folder, name = item.path.parent.name, item.path.name
    group = folder if folder == 'experiment' else name
    item.add_marker(pytest.mark.xdist_group(group))
