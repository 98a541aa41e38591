"""Files of every kind, damaged: refused by name, or loaded as they may be.

What `make test` does to each kind with few damages, `make test-long` does with
1,000 bits flipped and 1,000 ends cut off; -s shows what became of them.
"""

import gc
import logging

from damage import try_all
from damaged_checkpoints import CHECKPOINTS
from damaged_data import DATA
from damaged_ours import OURS
import pytest

KINDS = OURS | CHECKPOINTS | DATA
CUT = pytest.mark.parametrize('cut', [False, True], ids=['flipped', 'cut'])


@pytest.fixture(autouse=True)
def quiet(caplog):
  caplog.set_level(logging.CRITICAL)


@pytest.fixture(scope='module', autouse=True)
def collected():
  """A file that was left open is this module's fault, and no later one's."""
  yield
  gc.collect()


@CUT
@pytest.mark.parametrize('name', KINDS)
def test_some_damages(name, cut, tmp_path):
  try_all(KINDS[name], tmp_path, 8, cut, seed=1)


@pytest.mark.long
@CUT
@pytest.mark.parametrize('name', KINDS)
def test_1000_damages(name, cut, tmp_path):
  found = try_all(KINDS[name], tmp_path, 1000, cut)
  print(f'{name}, {"cut" if cut else "flipped"}: {dict(found)}')
