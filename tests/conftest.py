"""Which tests share a process, where they are spread over several."""

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """A file's tests stay together, as they share compilations.

  Those of the folder experiment/ share one training, and stay together too.
  """
  from xdist.scheduler import LoadScopeScheduling

  class ByFile(LoadScopeScheduling):

    def _split_scope(self, nodeid: str) -> str:
      path = nodeid.split('::')[0]
      folder = path.rpartition('/')[0]
      return folder if folder.endswith('experiment') else path

  return ByFile(config, log)
