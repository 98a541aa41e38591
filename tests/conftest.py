"""Set-up that all tests share: compiled programs, and processes."""

import os
import pathlib
import re
import shutil

import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest

# Pallas's interpreter of GPUs has a thread a warpgroup, three for ours, each of
# which waits for the others on a thread of XLA's pool. That has one a core, or
# as many as this says, and with two the third warpgroup would never run.
if jax.__version_info__ >= (0, 11):
  os.environ.setdefault('NPROC', str(max(4, os.cpu_count())))

_COMPILED = pathlib.Path(__file__).parents[1] / '.pytest_cache/jax'
_LARGEST = 2**30  # bytes, after which it starts anew
# Files whose tests take minutes begin first: begun last, one process would be
# left with them while the others have nothing to do.
_FIRST = ('experiment', 'test_gpu_session', 'test_smoke', 'test_wheel',
          'test_aot_gpu_stages', 'test_aot_tpu')


def pytest_configure():
  """Keeps what any run of the tests compiled for the next ones.

  JAX's own variables choose another folder; programs that tests start use it
  too.
  """
  if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  if _COMPILED.is_dir() and sum(
      path.stat().st_size for path in _COMPILED.iterdir()) > _LARGEST:
    shutil.rmtree(_COMPILED)
  for name, value in {
      'jax_compilation_cache_dir': str(_COMPILED),
      'jax_persistent_cache_min_compile_time_secs': 0,
      'jax_persistent_cache_min_entry_size_bytes': -1}.items():
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)


def pytest_ignore_collect(collection_path, config):
  """Leaves files without a test of what is asked for by -m unread.

  All of them together take longer to import than some of these tests to run.
  """
  mark = config.option.markexpr.partition(' ')[0]
  if (mark in ('aot', 'browser', 'long', 'optimized', 'parity', 'slow')
      and collection_path.match('test_*.py')
      and not re.search(rf'mark\.{mark}\b|\bmarks\.(quick|slow)\(',
                        collection_path.read_text())):
    return True
  return None  # as pytest decides


@pytest.fixture(scope='module')
def uncached():
  """Makes compilers run, whatever is kept from before."""
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()
  yield
  jax.config.update('jax_enable_compilation_cache', True)
  compilation_cache.reset_cache()


@pytest.fixture
def on_cpu(monkeypatch):
  """Runs the test on the CPU, as where there is nothing else."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
  with jax.default_device(jax.devices('cpu')[0]):
    yield


def pytest_collection_modifyitems(items):
  def place(item):
    names = (item.path.parent.name, item.path.stem)
    return min((_FIRST.index(name) for name in names if name in _FIRST),
               default=len(_FIRST))

  items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Keeps a file's tests in one process, as they share compilations.

  Those of the folder experiment/ share one training, and stay together too.
  """
  from xdist.scheduler import LoadScopeScheduling

  class ByFile(LoadScopeScheduling):

    def _split_scope(self, nodeid: str) -> str:
      path = nodeid.split('::')[0]
      folder = path.rpartition('/')[0]
      return folder if folder.endswith('experiment') else path

  return ByFile(config, log)
