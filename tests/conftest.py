"""Which tests share a process, where they are spread over several."""

import jax
import pytest


@pytest.fixture
def on_cpu(monkeypatch):
  """Runs on the CPU, as where there is nothing else."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
  with jax.default_device(jax.devices('cpu')[0]):
    yield


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
