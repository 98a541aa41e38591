"""Settings of several processes, and what one process does alone."""

import jax
import numpy as np
import pytest
import runs

from msfp_jax.base import devices
from msfp_jax.run import cluster
from msfp_jax.run import train


def config(**fields):
  return runs.config_of('x.npz', {
      f'mesh.{name}': value for name, value in fields.items()})


@pytest.mark.parametrize('fields, parts', [
    ({'model': 0}, ['config.mesh.model=0', 'at least 1']),
    ({'num_processes': -1}, ['config.mesh.num_processes=-1']),
    ({'coordinator': 'host:1234'}, ['num_processes and process_id']),
    ({'coordinator': 'host:1234', 'num_processes': 2, 'process_id': 2},
     ['num_processes=2, process_id=2']),
    ({'coordinator': 'host', 'num_processes': 2, 'process_id': 1},
     ["'host'", 'HOST:PORT']),
    ({'coordinator': 'auto', 'process_id': 1}, ["'auto' leave them out"]),
    ({'num_processes': 2}, ["coordinator='' leave them out"])])
def test_what_does_not_go_together_is_refused(tmp_path, fields, parts):
  for refuse in (cluster.join, lambda given: train.run(
      given, str(tmp_path / 'w'))):
    with pytest.raises(ValueError) as error:
      refuse(config(**fields))
    for part in parts:
      assert part in str(error.value)
  assert not (tmp_path / 'w').exists()


def test_devices_that_do_not_divide():
  with pytest.raises(ValueError, match=r'config.mesh.model=3: must divide the '
                     'number of devices, 1'):
    cluster.layout(config(model=3))


def test_one_process_alone():
  """It joins nobody, waits for nobody, and agrees with itself."""
  cluster.join(config())
  assert not cluster.is_joined() and devices.is_first()
  done = []
  devices.by_first(lambda: done.append(1), 'here')
  assert done == [1]
  assert devices.agreed([True, False]).tolist() == [True, False]


def test_one_device_places_nothing():
  layout = devices.layout()
  assert layout.is_single and layout.num_parts == 1
  tree = {'a': np.ones((4, 2**15))}
  assert layout.put(tree) is tree
  assert layout.constrain(tree, layout.batch) is tree
  assert layout.rows(12) == slice(0, 12)
  assert layout.put_rows(tree['a'], 4) is tree['a']
  found = layout.of_weights({'w': jax.ShapeDtypeStruct((4, 2**15), 'float32')})
  assert found['w'].is_fully_replicated
  with pytest.raises(ValueError, match='b=0: must be a multiple of 1'):
    layout.check_batch('b', 0)
